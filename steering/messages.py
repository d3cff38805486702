"""pydantic's errors about a plan as one sentence for people: which intervention, which field, what.

Only the first error is told in full; that there are more is said.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from pydantic import ValidationError


def error_sentence(error: ValidationError, known_fields: Mapping[str, Sequence[str]]) -> str:
    """What is wrong with a plan, where in it, and what would be right.

    Args:
        error: what pydantic raised for a plan or an intervention.
        known_fields: the fields of each action, and under `""` those of a plan.
    """
    problems = error.errors(include_url=False)
    problem: dict[str, Any] = dict(problems[0])
    number, action, field = _place(problem["loc"], known_fields)
    tell = _TELLERS.get(problem["type"], _generic)
    sentence = tell(problem, field)
    if problem["type"] == "extra_forbidden":
        sentence += f"; known: {', '.join(known_fields[action])}"
    place = f"intervention {number}" if number else ""
    if action:
        place = f"{place} ({action})" if place else action
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}: {sentence}{more}" if place else f"{sentence}{more}"


def _place(location: Sequence[int | str], actions: Container[str]) -> tuple[int, str, str]:
    """Intervention number from 1 (or 0), action (or ""), and field of a pydantic location.

    `("interventions", 1, "mask", "experts", 0)` -> `(2, "mask", "experts[0]")`; pydantic puts the
    action, by which it chose the class, before the field.
    """
    rest = list(location)
    number = 0
    action = ""
    if len(rest) > 1 and rest[0] == "interventions" and isinstance(rest[1], int):
        number = rest[1] + 1
        rest = rest[2:]
        action = str(rest.pop(0)) if rest else ""
    elif rest and rest[0] in actions:
        action = str(rest.pop(0))
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    return number, action, field.lstrip(".")


def _generic(problem: Any, field: str) -> str:
    message = problem["msg"]
    reason = message[0].lower() + message[1:]
    reason = reason.replace("input should be", "it must be")
    return f"field {field!r} is {_shown(problem['input'])}: {reason}"


def _value_error(problem: Any, field: str) -> str:
    if not field:  # of the intervention as a whole
        return str(problem["ctx"]["error"])
    return f"field {field!r} is {_shown(problem['input'])}: it {problem['ctx']['error']}"


def _missing(problem: Any, field: str) -> str:
    del problem
    return f"field {field!r} is missing"


def _extra(problem: Any, field: str) -> str:
    del problem
    return f"field {field!r} is not known here"


def _literal(problem: Any, field: str) -> str:
    return (
        f"{field} {_shown(problem['input'])} is not available; "
        f"available: {_unquoted(problem['ctx']['expected'])}"
    )


def _unknown_action(problem: Any, field: str) -> str:
    del field
    context = problem["ctx"]
    return (
        f"action {context['tag']!r} is not available; "
        f"available: {_unquoted(context['expected_tags'])}"
    )


def _no_action(problem: Any, field: str) -> str:
    del problem, field
    return "field 'action' is missing; it names what is done, for example mask"


def _no_object(problem: Any, field: str) -> str:
    del field
    return f"an intervention is a JSON object, not {_shown(problem['input'])}"


def _no_list(problem: Any, field: str) -> str:
    return f"field {field!r} is {_shown(problem['input'])}: it must be a list"


def _no_mapping(problem: Any, field: str) -> str:
    return f"field {field!r} is {_shown(problem['input'])}: it must be a JSON object"


_TELLERS: dict[str, Callable[[Any, str], str]] = {
    "dict_type": _no_mapping,
    "extra_forbidden": _extra,
    "literal_error": _literal,
    "missing": _missing,
    "model_attributes_type": _no_object,
    "tuple_type": _no_list,
    "union_tag_invalid": _unknown_action,
    "union_tag_not_found": _no_action,
    "value_error": _value_error,
}


def _unquoted(expected: str) -> str:
    """Pydantic's `"'min', 'inf' or 'selection'"` without the quotes."""
    return expected.replace("'", "")


def _shown(value: object) -> str:
    """A value as it stands in the plan, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
