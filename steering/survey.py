"""The survey: everything moescope does, tried on the tiny model of every family.

    for row in survey():
        print(row.family, row.failed)

It answers, for the transformers that is installed here, which families are recorded exactly and
which steering actions work on them, and says why where one does not. `moescope families` prints it
and `docs/families.md` is its output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moescope.probe.errors import ModelInputError, MoescopeError
from moescope.probe.zoo import Family, families, tiny_model

if TYPE_CHECKING:
    from moescope.probe.routers import LayerInfo

#: Dtypes of the survey, by their names in torch.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Outcome:
    """How one check went: it held, or why not."""

    held: bool
    reason: str | None = None


@dataclass(frozen=True)
class SurveyRow:
    """One family or variant in one dtype.

    Attributes:
        family: as `tiny_model` takes it, or a family that has no tiny model.
        dtype: of its weights; empty without a tiny model.
        model_class: class of the tiny model.
        layers: its routed layers, as they were found and proved.
        outcomes: name of a check -> how it went.
        reason: why nothing was tried, if so.
    """

    family: str
    dtype: str = ""
    model_class: str = ""
    layers: tuple[LayerInfo, ...] = ()
    outcomes: dict[str, Outcome] | None = None
    reason: str | None = None

    @property
    def failed(self) -> dict[str, str]:
        """Name of a check that did not hold -> why."""
        outcomes = self.outcomes or {}
        return {name: str(one.reason) for name, one in outcomes.items() if not one.held}

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "family": self.family,
            "dtype": self.dtype,
            "model_class": self.model_class,
            "reason": self.reason,
            "layers": [_layer_json(info) for info in self.layers],
            "checks": {
                name: {"held": one.held, "reason": one.reason}
                for name, one in (self.outcomes or {}).items()
            },
        }


def survey(
    names: Sequence[str] = (),
    *,
    dtypes: Sequence[str] = DTYPES,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[SurveyRow]:
    """Try everything on every family; rows come as they are done.

    Args:
        names: families or `family+variant`; all that are installed without them. A family's name
            stands for its variants too.
        dtypes: names of torch dtypes.
        progress: called with what is done, what there is in all, and the family.

    Raises:
        ModelInputError: a name that no installed family has.
    """
    wanted = _wanted(names)
    for number, family in enumerate(wanted):
        if progress is not None:
            progress(number, len(wanted), family if isinstance(family, str) else family.name)
        if isinstance(family, Family):
            yield SurveyRow(family.name, reason=family.reason)
            continue
        for dtype in dtypes:
            yield examine(family, dtype)
    if progress is not None:
        progress(len(wanted), len(wanted), "")


def examine(family: str, dtype: str = "float32") -> SurveyRow:
    """Build the tiny model of one family or variant and try everything on it."""
    import torch

    from moescope.probe.routers import verify_routers
    from moescope.steering.survey_bench import Bench
    from moescope.steering.survey_checks import ACTIONS, RECORDING, STEERING

    tiny = tiny_model(family, dtype=getattr(torch, dtype))
    model_class = type(tiny.model).__name__
    try:
        sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    except MoescopeError as error:
        return SurveyRow(family, dtype, model_class, reason=str(error))
    bench = Bench(tiny, sites)
    outcomes = {name: _tried(check, bench) for name, check in RECORDING.items()}
    proved = outcomes["verified"].held
    refusal = None if proved else _refused(bench, str(outcomes["verified"].reason))
    for name, check in STEERING.items():
        outcomes[name] = (
            refusal if refusal is not None and name in ACTIONS else _tried(check, bench)
        )
    return SurveyRow(family, dtype, model_class, tuple(site.info for site in sites), outcomes)


def _tried(check: Callable[[Any], None], bench: Any) -> Outcome:
    try:
        check(bench)
    except MoescopeError as error:
        return Outcome(False, _sentence(error))
    except Exception as error:  # a check that breaks is a check that did not hold
        return Outcome(False, f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Outcome(True)


def _refused(bench: Any, reason: str) -> Outcome:
    """Layers that are not proved must not be steered, and the refusal must say why."""
    try:
        bench.under(bench.plan("mask", bench.most))
    except MoescopeError as error:
        return Outcome(False, _sentence(error))
    return Outcome(False, f"steered, although it is not proved ({reason})")


def _sentence(error: MoescopeError) -> str:
    """The error without the name of the survey's own plan."""
    return re.sub(r"^plan \S+, intervention \d+ \(\w+\): ", "", str(error))


def _wanted(names: Iterable[str]) -> list[str | Family]:
    found = families()
    by_name = {family.name: family for family in found}
    rows = {row for family in found for row in family.rows}
    chosen: list[str | Family] = []
    for name in list(names) or list(by_name):
        if name in by_name:
            family = by_name[name]
            chosen.extend(family.rows or [family])
        elif name in rows:
            chosen.append(name)
        else:
            raise ModelInputError(
                f"the installed transformers has no family with routed experts called {name!r}"
            )
    return chosen


def _layer_json(info: LayerInfo) -> dict[str, Any]:
    return {
        "layer": info.layer,
        "kind": info.kind,
        "module": info.module,
        "num_experts": info.num_experts,
        "top_k": info.top_k,
        "num_shared_experts": info.num_shared_experts,
        "rule": info.rule.description,
        "implementation": info.implementation,
        "verified": info.verified,
        "reason": info.reason,
    }
