"""Which prompts and which tokens an analysis counts: one vocabulary for all analyses.

Prompts are chosen by fields (a column of `prompts`, or a key of its `meta`), tokens by a scope, by
phase and segment, routers by layer and kind. By default only content tokens count: not those of
the chat template and no special tokens, because they are the same in every prompt and would
dominate every count (methods of contrast; SteerMoE counts spans for the same reason).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moescope.probe.errors import AnalysisInputError

# What a scope needs: usage knows the phase of a token but not its position.
USAGE_SCOPES = ("all", "prompt", "generated")
POSITION_SCOPES = ("last_prompt", "first_generated", "span")

# Scopes that lie within one phase.
PHASE_OF_SCOPE = {
    "prompt": "prompt",
    "last_prompt": "prompt",
    "generated": "generated",
    "first_generated": "generated",
}

SEGMENTS = ("system", "user", "template", "thinking", "answer")
KINDS = ("mlp", "attention", "encoder", "mtp")

TokenScope = str | Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What is counted.

    Attributes:
        fields: prompt field -> the values kept; several fields must all hold.
        tokens: `all`, `prompt`, `generated`, `last_prompt` (the last token of the prompt, which
            decides the first answer token; it counts even where it belongs to the template),
            `{"first_generated": N}` (the first N generated tokens) or `span`.
        phase: `prompt` or `generated`; None for both.
        segments: the segments kept; None for all. Naming segments replaces the exclusion of
            template tokens that `content_only` makes; special tokens stay out.
        layers: decoder layers kept; None for all.
        kind: the kind of router kept (`mlp`, `attention`, `encoder`, `mtp`); None for all.
        content_only: leave out template and special tokens.

    Raises:
        AnalysisInputError: for a scope, phase, segment or kind that does not exist.
    """

    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: TokenScope = "all"
    phase: Literal["prompt", "generated"] | None = None
    segments: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    kind: str | None = None
    content_only: bool = True

    def __post_init__(self) -> None:
        """Refuse what no run could answer."""
        if isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", parse_scope(self.tokens))
        _check_scope(self.tokens)
        _check_choice("phase", self.phase, ("prompt", "generated"))
        _check_choice("kind", self.kind, KINDS)
        for segment in self.segments or ():
            _check_choice("segment", segment, SEGMENTS)
        scope_phase = PHASE_OF_SCOPE.get(self.scope)
        if self.phase and scope_phase and self.phase != scope_phase:
            raise AnalysisInputError(
                f"tokens {self.scope!r} are never of phase {self.phase!r}; leave out one of the two"
            )

    @property
    def scope(self) -> str:
        """The scope's name, without its number."""
        return self.tokens if isinstance(self.tokens, str) else "first_generated"

    @property
    def first_generated(self) -> int | None:
        """N of `{"first_generated": N}`, else None."""
        return None if isinstance(self.tokens, str) else self.tokens["first_generated"]

    @property
    def needs_positions(self) -> bool:
        """Whether the scope can only be answered from routing rows, not from usage."""
        return self.scope in POSITION_SCOPES

    def to_json(self) -> dict[str, Any]:
        """The filters as plain data."""
        return {
            "fields": {name: list(values) for name, values in self.fields.items()},
            "tokens": self.tokens if isinstance(self.tokens, str) else dict(self.tokens),
            "phase": self.phase,
            "segments": None if self.segments is None else list(self.segments),
            "layers": None if self.layers is None else list(self.layers),
            "kind": self.kind,
            "content_only": self.content_only,
        }

    def describe(self) -> str:
        """The filters in a few words, for subtitles."""
        parts = [describe_conditions(self.fields)] if self.fields else []
        scopes = {
            "all": "prompt and generated",
            "prompt": "prompt",
            "generated": "generated",
            "last_prompt": "last prompt",
            "first_generated": f"first {self.first_generated} generated",
            "span": "span",
        }
        scope = scopes[self.scope] if self.scope != "all" or not self.phase else self.phase
        content = "content " if self.content_only and self.scope != "last_prompt" else ""
        parts.append(f"{scope} {content}tokens")
        if self.segments is not None:
            parts.append("segment " + ", ".join(self.segments))
        if self.layers is not None:
            parts.append("layers " + ", ".join(str(layer) for layer in self.layers))
        if self.kind is not None:
            parts.append(f"{self.kind} routers")
        return "; ".join(parts)


def describe_conditions(conditions: Mapping[str, tuple[str, ...]]) -> str:
    """`{"lang": ("en", "de")}` as `lang=en,de`."""
    return " and ".join(f"{name}={','.join(values)}" for name, values in conditions.items())


def parse_conditions(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read FIELD=VALUE or FIELD=VALUE,VALUE; several texts must all hold.

    Raises:
        AnalysisInputError: for a text without `=`, without a value, or a field given twice.
    """
    conditions: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, separator, values = text.partition("=")
        name = name.strip()
        kept = tuple(value.strip() for value in values.split(",") if value.strip())
        if not separator or not name or not kept:
            raise AnalysisInputError(
                f"{text!r} is not a condition; write FIELD=VALUE or FIELD=VALUE,VALUE"
            )
        if name in conditions:
            raise AnalysisInputError(
                f"field {name!r} has two conditions; write them as one: {name}=VALUE,VALUE"
            )
        conditions[name] = kept
    return conditions


def parse_scope(text: str) -> TokenScope:
    """Read a token scope: a name, `first_generated:N`, or the JSON form of plans.

    Raises:
        AnalysisInputError: for anything else.
    """
    if text in USAGE_SCOPES or text in ("last_prompt", "span"):
        return text
    number: object = None
    if text.startswith("first_generated:"):
        number = text.removeprefix("first_generated:")
    elif text.startswith("{"):
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict) and list(parsed) == ["first_generated"]:
            number = parsed["first_generated"]
    if isinstance(number, int | str) and str(number).isdecimal() and int(number) > 0:
        return {"first_generated": int(number)}
    raise AnalysisInputError(_SCOPE_HELP.format(text))


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layers such as `0-3,7`.

    Raises:
        AnalysisInputError: for anything that is not a list of numbers and ranges.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise AnalysisInputError(f"layers {text!r} cannot be read; write for example 0-3,7")
        layers.update(range(int(first), int(last or first) + 1))
    if not layers:
        raise AnalysisInputError(f"layers {text!r} name no layer; write for example 0-3,7")
    return tuple(sorted(layers))


_SCOPE_HELP = (
    "tokens {!r} is not a token scope; it is all, prompt, generated, last_prompt, "
    "first_generated:N (N from 1) or span"
)


def _check_scope(scope: TokenScope) -> None:
    if isinstance(scope, str):
        return
    number = scope.get("first_generated")
    if list(scope) != ["first_generated"] or not isinstance(number, int) or number < 1:
        raise AnalysisInputError(_SCOPE_HELP.format(dict(scope)))


def _check_choice(what: str, value: str | None, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise AnalysisInputError(
            f"{what} {value!r} does not exist; it is one of {', '.join(choices)}"
        )
