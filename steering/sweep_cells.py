"""The cells of a sweep: how many experts, in which layers, switched off how, and how strongly.

A cell and a contrast table make a plan. `strength` weakens experts instead of masking them, in the
way of the cell's mode:

    mode           without strength (mask)             strength s
    replace        never selected, slot refilled       logit lowered by s standard deviations
    drop_renorm    weight 0, others renormalized       weight times 1 - s, renormalized
    drop           weight 0                            weight times 1 - s

The first is the soft steering of Bandarkar et al. (arXiv 2510.04694) downwards; with s = 1 the
others are their masks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, Literal, get_args

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.probe.prompts import Prompt
from moescope.steering.check import RoutedLayer
from moescope.steering.derive import plan_from_contrast
from moescope.steering.plan import Intervention, SteeringPlan

Mode = Literal["replace", "drop_renorm", "drop"]

MODES: Final[tuple[Mode, ...]] = get_args(Mode)


@dataclass(frozen=True)
class LayerWindow:
    """Decoder layers from `first` to `last`, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> LayerWindow | None:
        """`8-15` or `8`; None for `all`.

        Raises:
            PlanError: it is none of these.
        """
        if text.strip() == "all":
            return None
        found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", text)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise PlanError(f"a window of layers is FIRST-LAST, one layer, or all, not {text!r}")
        return cls(int(found[1]), int(found[2] or found[1]))

    def __str__(self) -> str:
        """`8-15`."""
        return f"{self.first}-{self.last}"


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """One dose.

    Attributes:
        count: experts, the largest effects first.
        mode: how they are switched off, as for the action `mask`.
        window: the layers they are taken from; None for all.
        strength: how strongly (see this module); None masks them.

    Raises:
        PlanError: a count below 1, or a strength that the mode does not know.
    """

    count: int
    mode: Mode = "replace"
    window: LayerWindow | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no plan."""
        if self.count < 1:
            raise PlanError(f"a sweep masks at least 1 expert, not {self.count}")
        if self.mode not in MODES:
            raise PlanError(f"a mode is {', '.join(MODES)}, not {self.mode!r}")
        if self.strength is None:
            return
        if not 0 < self.strength < float("inf"):
            raise PlanError(f"a strength is a number over 0, not {self.strength:g}")
        if self.mode != "replace" and self.strength > 1:
            raise PlanError(
                f"strength {self.strength:g} with mode {self.mode} would turn weights negative; "
                "it is at most 1 there"
            )

    @property
    def title(self) -> str:
        """`5 experts, replace, layers 8-15`, for example."""
        parts = ["1 expert" if self.count == 1 else f"{self.count} experts", self.mode]
        if self.strength is not None:
            parts.append(f"strength {self.strength:g}")
        if self.window is not None:
            parts.append(f"layers {self.window}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The cell as plain data."""
        return {
            "count": self.count,
            "mode": self.mode,
            "layers": "all" if self.window is None else str(self.window),
            "strength": self.strength,
        }


def sweep_grid(
    counts: Sequence[int],
    *,
    modes: Sequence[Mode] = ("replace",),
    windows: Sequence[LayerWindow | None] = (None,),
    strengths: Sequence[float | None] = (None,),
) -> list[SweepCell]:
    """All combinations of the lists, each once; counts vary fastest.

    Raises:
        PlanError: an empty list, or a combination that makes no plan.
    """
    cells = [
        SweepCell(count=count, mode=mode, window=window, strength=strength)
        for mode, strength, window, count in product(modes, strengths, windows, counts)
    ]
    if not cells:
        raise PlanError("a sweep needs at least one count, mode, strength and window of layers")
    return list(dict.fromkeys(cells))


def cell_plan(
    frame: pd.DataFrame,
    cell: SweepCell,
    layers: Sequence[RoutedLayer] | None,
    *,
    name: str,
    confirmed_only: bool = True,
    model: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> SteeringPlan:
    """The plan of a cell.

    Args:
        frame: a contrast table, as `plan_from_contrast` takes it.
        cell: the dose.
        layers: the model's routed layers.
        name: of the sweep.
        confirmed_only: take only experts whose effect was confirmed.
        model: of the plan.
        provenance: where the table comes from.

    Raises:
        PlanError: the table has too few experts for the cell, which the message names.
    """
    window = cell.window
    if window is not None and "layer" in frame.columns:
        frame = frame[frame["layer"].between(window.first, window.last)]
    try:
        plan = plan_from_contrast(
            frame, num_mask=cell.count, layers=layers, confirmed_only=confirmed_only,
            name=f"{name}: {cell.title}", model=model,
            provenance={**(provenance or {}), "sweep": name, "cell": cell.to_json()},
        )  # fmt: skip
    except PlanError as error:
        raise PlanError(f"cell {cell.title!r}: {error}") from error
    return SteeringPlan(
        name=plan.name,
        model=plan.model,
        provenance=plan.provenance,
        interventions=[_dosed(one, cell) for one in plan.interventions],
    )


def table_hash(frame: pd.DataFrame) -> str:
    """SHA-256 of a table's content."""
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of what of the prompts reaches the model or the evaluation."""
    content = [
        [
            one.prompt_id, one.text, [dict(turn) for turn in one.messages or ()], one.set_name,
            one.label, one.lang, one.pair_id, one.expected,
        ]
        for one in prompts
    ]  # fmt: skip
    return hash_of(content)


def hash_of(content: object) -> str:
    """SHA-256 of plain data."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _dosed(mask: Intervention, cell: SweepCell) -> Intervention:
    """A mask of the plan in the cell's mode and strength."""
    fields: dict[str, Any] = {
        "layer": mask.layer, "kind": mask.kind, "experts": mask.experts, "tokens": mask.tokens,
    }  # fmt: skip
    if cell.strength is None:
        return Intervention(action="mask", mode=cell.mode, **fields)
    if cell.mode == "replace":
        return Intervention(action="bias", value=-cell.strength, unit="std", **fields)
    renormalize = cell.mode == "drop_renorm"
    return Intervention(action="scale", value=1 - cell.strength, renormalize=renormalize, **fields)
