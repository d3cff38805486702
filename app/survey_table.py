"""The survey of families as a document: one line a family, reasons below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moescope.steering.survey import SurveyRow

_INTRODUCTION = """\
# Model families

Every family with routed experts in transformers {version}, found by walking the installed package,
and what moescope does with each. `moescope families --out docs/families.md` makes this page; a new
release of transformers shows up in it as new rows.

Each row is a tiny random model with the family's own code (`moescope.probe.zoo`): a few layers,
mostly 8 experts of which 2 are selected, with selection biases, groups and scales that matter.
`family+variant` is the same family with another way to route, `+whole` its model with encoders for
images or sound around the text part. What experts get is read at their own inputs.

| column | yes means |
|---|---|
| recorded | recorded ids and weights are, to the bit, those that arrived at the experts |
| verified | the proof at attach time passed: shapes, replay to the bit, influence |
| empty plan | a plan without interventions leaves the output bit-equal |
| mask | no token reaches a masked expert (via min, inf, selection), whose weights do not matter |
| force | every token reaches a forced expert (strength max, natural) |
| bias | a bias downwards (logit, std, selection only) wins its expert no token and has an effect |
| scale | only the expert's weight changes, by the factor; with renormalization, the sum stays |
| drop | a dropped expert counts for nothing (modes drop, drop_renorm) |
| top_k, top_p | one expert more and one fewer per token; one expert for a share near 0 |
| replay | the routing of another run is repeated, and with it the output |
| restored | afterwards the output is bit-equal to before |
| after an error | an exception inside a forward leaves no hook behind |
| bfloat16 | the same in bfloat16, or what differs |
"""


def document(rows: Iterable[SurveyRow], version: str) -> str:
    """The page: introduction, table, reasons; rows of one family stand together."""
    lines, reasons = _table(list(rows))
    parts = [_INTRODUCTION.format(version=version), "## Families\n", *lines, ""]
    if reasons:
        parts += ["## Reasons\n", *(f"{n}. {text}" for n, text in enumerate(reasons, 1)), ""]
    return "\n".join(parts)


def _table(rows: Sequence[SurveyRow]) -> tuple[list[str], list[str]]:
    """The lines of the table, and the reasons that its cells refer to by number from 1."""
    checks = next((list(row.outcomes) for row in rows if row.outcomes), [])
    names = ["family", "class", "layers", "rule", *checks, "bfloat16"]
    lines = [_line(names), _line(["---"] * len(names))]
    reasons: list[str] = []

    def no(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    for family, of_family in groupby(rows, key=lambda row: row.family):
        by_dtype = {row.dtype: row for row in of_family}
        first = next(iter(by_dtype.values()))
        if first.outcomes is None:
            cells = [no(str(first.reason))] + ["" for _ in checks[1:]]
            lines.append(_line([family, first.model_class, "", "", *cells, ""]))
            continue
        cells = ["yes" if one.held else no(str(one.reason)) for one in first.outcomes.values()]
        other = by_dtype.get("bfloat16")
        last = "" if other is None or other is first else _difference(first, other, no)
        lines.append(
            _line([family, first.model_class, _layers(first), _rules(first), *cells, last])
        )
    return lines, reasons


def _difference(first: SurveyRow, other: SurveyRow, no: object) -> str:
    assert callable(no)
    if other.outcomes is None:
        return str(no(str(other.reason)))
    parts = []
    for name, one in other.outcomes.items():
        held = (first.outcomes or {})[name].held
        if one.held and not held:
            parts.append(f"{name}: yes")
        elif not one.held and (held or one.reason != (first.outcomes or {})[name].reason):
            parts.append(f"{name}: {no(str(one.reason))}")
    return ", ".join(parts) if parts else "same"


def _layers(row: SurveyRow) -> str:
    """How many layers of each kind, with experts and top-k."""
    counted: dict[str, int] = {}
    for info in row.layers:
        shared = f" + {info.num_shared_experts}" if info.num_shared_experts else ""
        words = f"{info.kind}: {info.num_experts}{shared}, top-{info.top_k}"
        counted[words] = counted.get(words, 0) + 1
    return "; ".join(f"{count} {words}" for words, count in counted.items())


def _rules(row: SurveyRow) -> str:
    return "; ".join(dict.fromkeys(info.rule.description for info in row.layers))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
