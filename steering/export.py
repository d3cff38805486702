"""Plans in the forms of other steering systems, and back.

Both forms are one matrix [L, E] over decoder layers and experts: -1 switches an expert off, +1
switches it on, 0 leaves it alone.

- `steermoe`: `moe_manual_weights` of SteerMoE (arXiv 2509.09660), as `.npy` (int8) or a JSON list
  of lists.
- `ds4`: the pair `x.f32`, `x.json` of ds4's expert steering (`ds4-expert-steering-v1`): the matrix
  as little-endian float32, and a report of what it does.

They mean what `mask` with mode `replace` via `min` and `force` with strength `max` mean, on all
tokens; a plan that says anything else cannot be written so. SteerMoE edits the logits alone, so a
matrix of its form is read as masks that fill up; written, masks look alike with and without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope.probe.errors import ImportFileError, InputError, PlanError
from moescope.probe.interchange.exporting import check_target, whole
from moescope.probe.interchange.files import existing_file, parse_json, read_bytes, read_text
from moescope.probe.interchange.imported import MOST_EXPERTS, MOST_LAYERS
from moescope.probe.interchange.loads import write_matrix
from moescope.steering.interventions import Force, Intervention, Mask
from moescope.steering.plan import SteeringPlan

Array = NDArray[Any]

OFF, ON = -1, 1

DS4_FORMAT: Final = "ds4-expert-steering-v1"
DS4_SHAPE: Final = (43, 256)
"""Layers and experts of the one model that ds4 runs."""
DS4_HASH_LAYERS: Final = 3
"""Its first layers choose experts by token id: they have no router to steer."""
_DS4_SCALE: Final = 0.01  # SteerMoE's step over the largest or under the smallest logit
_LARGEST_FILE: Final = 1 << 30


def plan_weights(plan: SteeringPlan, num_layers: int, num_experts: int) -> Array:
    """A plan as int8[L, E] of -1, 0 and +1.

    Raises:
        PlanError: an intervention is no plain mask or force, names a layer or expert outside of
            the matrix, or an expert is both masked and forced.
    """
    weights = np.zeros((num_layers, num_experts), np.int8)
    for number, intervention in enumerate(plan.interventions, 1):
        place = f"intervention {number}"
        value = _value_of(intervention, place)
        for layer in intervention.on_layers:
            for expert in intervention.experts:
                if layer >= num_layers or expert >= num_experts:
                    raise PlanError(
                        f"{place}: layer {layer}, expert {expert} is outside of {num_layers} "
                        f"layers of {num_experts} experts"
                    )
                if weights[layer, expert] == -value:
                    raise PlanError(f"{place}: layer {layer}, expert {expert} is masked and forced")
                weights[layer, expert] = value
    return weights


def _value_of(intervention: Intervention, place: str) -> int:
    cannot = "which a matrix of -1, 0 and +1 cannot say"
    is_mask = (
        isinstance(intervention, Mask)
        and intervention.mode == "replace"
        and intervention.via == "min"
    )
    is_force = isinstance(intervention, Force) and intervention.strength == "max"
    if not (is_mask or is_force):
        raise PlanError(f"{place} is {intervention.setting!r}, {cannot}")
    for field, plain in (("tokens", ("all",)), ("kind", (None, "mlp")), ("prompt_ids", (None,))):
        if getattr(intervention, field) not in plain:
            raise PlanError(f"{place} acts on certain {field} only, {cannot}")
    return OFF if is_mask else ON


def plan_of_weights(
    weights: Array, *, name: str | None = None, model: str | None = None, fill_up: bool = False
) -> SteeringPlan:
    """The plan of a matrix [L, E]: a mask and a force for each layer that has any, ascending.

    Args:
        weights: of -1, 0 and +1.
        name: of the plan.
        model: of the plan.
        fill_up: whether masked experts take slots that too few others are left for.
    """
    interventions: list[dict[str, Any]] = []
    masked, forced = {"action": "mask", "fill_up": fill_up}, {"action": "force"}
    for layer, row in enumerate(weights):
        for action, value in ((masked, OFF), (forced, ON)):
            experts = np.flatnonzero(row == value).tolist()
            if experts:
                interventions.append({**action, "layer": layer, "experts": experts})
    return SteeringPlan(interventions=interventions, name=name, model=model)


def _write_steermoe(plan: SteeringPlan, path: Path, shape: tuple[int, int], force: bool) -> None:
    weights = plan_weights(plan, *shape)
    check_target(path, is_folder=False, force=force)
    with whole(path) as unfinished:
        write_matrix(unfinished, weights)


def _read_steermoe(path: Path, name: str | None, model: str | None) -> SteeringPlan:
    if path.suffix.lower() == ".npy":
        weights = _load_npy(path)
    else:
        try:
            weights = np.array(parse_json(read_text(path), str(path)))
        except (ValueError, OverflowError) as error:
            raise ImportFileError(f"{path}: expected a list of rows of one length") from error
    return plan_of_weights(_checked(weights, path), name=name, model=model, fill_up=True)


def _load_npy(path: Path) -> Array:
    """The array of a `.npy` file, which is of the size that its header says."""
    if existing_file(path).stat().st_size > _LARGEST_FILE:
        raise ImportFileError(f"{path} is larger than any such matrix")
    try:  # mapped, so that the header alone makes nothing be allocated
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.array(mapped)
    except (ValueError, OSError, EOFError, OverflowError, TypeError, SyntaxError) as error:
        raise ImportFileError(f"{path} is no .npy file of numbers: {error}") from error


def _checked(weights: Array, path: Path) -> Array:
    """The matrix as int8, which must be of -1, 0 and +1 alone."""
    if weights.ndim != 2 or weights.dtype.kind not in "iuf" or 0 in weights.shape:
        raise ImportFileError(
            f"{path}: expected numbers as [layers, experts], got {weights.dtype} "
            f"{list(weights.shape)}"
        )
    if weights.shape[0] > MOST_LAYERS or weights.shape[1] > MOST_EXPERTS:
        raise ImportFileError(f"{path}: no model has {list(weights.shape)} layers and experts")
    strange = ~np.isin(weights, (OFF, 0, ON))
    if strange.any():
        layer, expert = np.argwhere(strange)[0].tolist()
        raise ImportFileError(
            f"{path}: layer {layer}, expert {expert} has {weights[layer, expert]}, "
            "expected -1, 0 or 1"
        )
    return weights.astype(np.int8)


def _write_ds4(plan: SteeringPlan, path: Path, shape: tuple[int, int], force: bool) -> None:
    if shape != DS4_SHAPE:
        raise InputError(f"ds4 steers {_shown(DS4_SHAPE)}, not {_shown(shape)}")
    weights = plan_weights(plan, *shape)
    if weights[:DS4_HASH_LAYERS].any():
        raise PlanError(
            f"the plan steers one of the layers 0 to {DS4_HASH_LAYERS - 1}, which have no router "
            "in ds4: they choose experts by token id"
        )
    about = path.with_suffix(".json")
    for target in (about, path):
        check_target(target, is_folder=False, force=force)
    with whole(about) as json_file, whole(path) as numbers:
        text = json.dumps(_ds4_report(plan, weights), ensure_ascii=False, indent=1)
        json_file.write_text(text + "\n", encoding="utf-8")
        numbers.write_bytes(weights.astype("<f4").tobytes())


def _ds4_report(plan: SteeringPlan, weights: Array) -> dict[str, Any]:
    """What `x.json` says; rates and files of a measurement are null, for a plan has none."""
    unmeasured = {"rd": None, "target_rate": None, "contrast_rate": None}
    layers = [
        {
            "layer": layer,
            "enabled": bool(row.any()),
            "activate": [{"expert": e, **unmeasured} for e in np.flatnonzero(row == ON).tolist()],
            "deactivate": [
                {"expert": e, **unmeasured} for e in np.flatnonzero(row == OFF).tolist()
            ],
        }
        for layer, row in enumerate(weights)
    ]
    return {
        "format": DS4_FORMAT,
        "shape": list(weights.shape),
        "method": "moescope_plan",
        "default_runtime_scale": _DS4_SCALE,
        "target_file": None,
        "contrast_file": None,
        "model": plan.model,
        "pairs": None,
        "target_rows": None,
        "contrast_rows": None,
        "layers": [report["layer"] for report in layers if report["enabled"]],
        "hash_layers": DS4_HASH_LAYERS,
        "activate_per_layer": int((weights == ON).sum(axis=1).max()),
        "deactivate_per_layer": int((weights == OFF).sum(axis=1).max()),
        "min_rd": None,
        "focus_last_tokens": None,
        "layer_report": layers,
    }


def _read_ds4(path: Path, name: str | None, model: str | None) -> SteeringPlan:
    numbers, about = path.with_suffix(".f32"), path.with_suffix(".json")
    report = parse_json(read_text(about), str(about))
    if not isinstance(report, dict) or report.get("format") != DS4_FORMAT:
        raise ImportFileError(f"{about}: field 'format' is not {DS4_FORMAT!r}")
    if report.get("shape") != list(DS4_SHAPE):
        raise ImportFileError(
            f"{about}: expected shape {list(DS4_SHAPE)}, got {report.get('shape')}"
        )
    expected = 4 * DS4_SHAPE[0] * DS4_SHAPE[1]
    size = existing_file(numbers).stat().st_size
    if size != expected:
        raise ImportFileError(f"{numbers} has {size:,} bytes, {expected:,} are expected")
    weights = np.frombuffer(read_bytes(numbers), "<f4").reshape(DS4_SHAPE)
    weights = _checked(weights, numbers)
    if weights[:DS4_HASH_LAYERS].any():
        raise ImportFileError(f"{numbers} steers a layer that has no router in ds4")
    stated = report.get("model")
    if model is None and isinstance(stated, str):
        model = stated
    return plan_of_weights(weights, name=name, model=model)


def _shown(shape: tuple[int, int]) -> str:
    return f"{shape[0]} layers of {shape[1]} experts"


@dataclass(frozen=True, kw_only=True)
class PlanFormat:
    """A form of another system that plans can be written in and read from.

    Attributes:
        suffixes: what the name of its file ends in; the first is the usual one.
        shape: layers and experts where the system fixes them.
        write: plan, file, layers and experts, and whether to replace a file.
        read: file, name and model of the plan.
    """

    suffixes: tuple[str, ...]
    shape: tuple[int, int] | None
    write: Callable[[SteeringPlan, Path, tuple[int, int], bool], None]
    read: Callable[[Path, str | None, str | None], SteeringPlan]


PLAN_FORMATS: Final = {
    "steermoe": PlanFormat(
        suffixes=(".npy", ".json"), shape=None, write=_write_steermoe, read=_read_steermoe
    ),
    "ds4": PlanFormat(suffixes=(".f32",), shape=DS4_SHAPE, write=_write_ds4, read=_read_ds4),
}
"""Every form, by name."""


def plan_format(name: str) -> PlanFormat:
    """One form.

    Raises:
        InputError: there is none of this name; the message lists those there are.
    """
    if name not in PLAN_FORMATS:
        known = ", ".join(PLAN_FORMATS)
        raise InputError(f"there is no form of plans {name!r}; known are {known}")
    return PLAN_FORMATS[name]


def write_plan(
    plan: SteeringPlan,
    path: str | Path,
    form: str,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    force: bool = False,
) -> None:
    """Write a plan for another system, whole or not at all.

    Args:
        plan: masks via `min` and forces with strength `max`, on all tokens.
        path: `.npy` or `.json` for steermoe; `.f32` for ds4, which has a `.json` beside it.
        form: `steermoe` or `ds4`.
        num_layers: L, all decoder layers of the model; ds4 knows it.
        num_experts: E; ds4 knows it.
        force: replace files that are there.

    Raises:
        PlanError: the plan says what that system cannot do.
        InputError: the name is taken or of another suffix, or L and E are not known.
        MoescopeError: the place cannot be written.
    """
    target, known = Path(path), plan_format(form)
    if target.suffix.lower() not in known.suffixes:
        raise InputError(f"{form!r} is written to {' or '.join(known.suffixes)}, not to {target}")
    default = known.shape or (None, None)
    layers = default[0] if num_layers is None else num_layers
    experts = default[1] if num_experts is None else num_experts
    if layers is None or experts is None:
        raise InputError(
            f"{form!r} needs the numbers of layers and experts of the model: give --num-layers and "
            "--num-experts, or a run of it with --store and --run"
        )
    if not (0 < layers <= MOST_LAYERS and 0 < experts <= MOST_EXPERTS):
        raise InputError(f"no model has {_shown((layers, experts))}")
    known.write(plan, target, (layers, experts), force)


def read_plan(
    path: str | Path, form: str, *, name: str | None = None, model: str | None = None
) -> SteeringPlan:
    """The plan in a file of another system: a mask and a force for each layer, ascending.

    Masks read from `steermoe` fill up, as they do there.

    Args:
        path: as `write_plan` writes it; for ds4 either file of the pair.
        form: `steermoe` or `ds4`.
        name: of the plan; these files have none.
        model: of the plan; that in the file without it.

    Raises:
        ImportFileError: the file is missing or not what it should be.
    """
    return plan_format(form).read(Path(path), name, model)
