"""Prompt templates: a line of a prompt file that stands for many prompts.

    {"template": "What happened {time}{place}?", "time": ["in 1990 ", ""], "place": ["in Oslo"]}

It expands to the product of the lists that its placeholders name, as the questions for fTRI are
made. Like `prompt_fields.py` this makes lines of our own format, which `prompts.py` then checks.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from moescope.probe.prompt_fields import OWN_TEXT, FieldError

MAX_PROMPTS = 100_000
"""Prompts that one line may expand to; more is most likely a list too many."""


def is_template(record: Mapping[str, Any]) -> bool:
    """Whether a line is a template; one with a `prompt` of its own keeps `template` as meta."""
    return "template" in record and not OWN_TEXT & record.keys()


def expand_template(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of our own format that a template stands for; the last placeholder runs fastest.

    A placeholder's value is kept under its name. `id` is the line's id (or `template`) and the
    place of each value, `pair_id` the value of the first placeholder unless the line gives one.

    Raises:
        FieldError: a placeholder without a list of values, a list without values, text that is
            no template, or more than `MAX_PROMPTS` prompts.
    """
    parts = _parts(record["template"])
    names = list(dict.fromkeys(name for _, name in parts if name is not None))
    if not names:
        raise FieldError("template", "names no {placeholder}")
    lists = [_values(record, name) for name in names]
    count = math.prod(len(values) for values in lists)
    if count > MAX_PROMPTS:
        raise FieldError("template", f"expands to {count:,} prompts; at most {MAX_PROMPTS:,}")
    rest = {name: value for name, value in record.items() if name != "template"}
    own: list[dict[str, Any]] = []
    for places in itertools.product(*(range(len(values)) for values in lists)):
        chosen = {
            name: values[place] for name, values, place in zip(names, lists, places, strict=True)
        }
        text = "".join(
            before + ("" if name is None else str(chosen[name])) for before, name in parts
        )
        own.append({**rest, **chosen, **_identity(record, chosen, places), "prompt": text})
    return own


def _identity(
    record: Mapping[str, Any], chosen: Mapping[str, Any], places: Sequence[int]
) -> dict[str, str]:
    """The `id`, and the `pair_id` where the line gives none."""
    base = record.get("id", "template")
    if not isinstance(base, (str, int)):
        raise FieldError("id", f"expected text or a whole number, got {base!r}")
    identity = {"id": "-".join([str(base), *map(str, places)])}
    if record.get("pair_id") is None:
        # An empty text (no time at all, say) still makes a pair, but cannot be its name.
        identity["pair_id"] = str(next(iter(chosen.values()))) or f"{base}-{places[0]}"
    return identity


def _parts(template: object) -> list[tuple[str, str | None]]:
    """Literal text and the placeholder after it; a brace that is text is written twice."""
    if not isinstance(template, str):
        raise FieldError("template", f"expected text, got {template!r}")
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FieldError("template", f"{error}; a brace that is text is written twice") from error
    for _, name, form, conversion in parsed:
        if name == "" or form or conversion:
            raise FieldError("template", "a placeholder is a field's name in braces, no more")
    return [(before, name) for before, name, _, _ in parsed]


def _values(record: Mapping[str, Any], name: str) -> list[Any]:
    if name in ("id", "template"):
        raise FieldError("template", f"{{{name}}} cannot be a placeholder")
    if name not in record:
        raise FieldError("template", f"names {{{name}}}, but the line has no field {name!r}")
    values = record[name]
    if not isinstance(values, list):
        raise FieldError(name, f"expected a list of values for {{{name}}}, got {values!r}")
    if not values:
        raise FieldError(name, f"the list of values for {{{name}}} is empty")
    for value in values:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise FieldError(name, f"expected texts or numbers, got {value!r}")
    return values
