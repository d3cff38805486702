"""The field names of well-known prompt sets, so that their files are read as they are.

Each set is a `PromptSet` in a table. `recognize` finds the set of a file, and
`PromptSet.own_records` turns a line of it into lines of our own format, which `prompts.py` then
checks like any other. Columns that make no field end up in `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
Make = Callable[[Record, str], str | None]
"""Makes a field of a line and the name of its file without the ending; None: there is nothing."""
OWN_TEXT = frozenset({"prompt", "messages"})
"""What holds the text in our own format; a file with one of them is ours unless a set needs it."""
TEXT_COLUMNS = (
    "text", "instruction", "question", "turns", "goal", "forbidden_prompt", "Behavior",
    "sentence", "flores_passage",
)  # fmt: skip
"""Columns that are read as the prompt where a file has exactly one of them."""
_LANGUAGE = re.compile(r"(?<![A-Za-z])[a-z]{3}_[A-Z][a-z]{3}(?![A-Za-z])")
_WIDE = re.compile(r"sentence_([a-z]{3}_[A-Z][a-z]{3}\w*)")
_XSTEST_TYPES = frozenset(
    {
        "homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions",
        "real_group_nons_discr", "nons_group_real_discr", "historical_events", "privacy_public",
        "privacy_fictional", "contrast_homonyms", "contrast_figurative_language",
        "contrast_safe_targets", "contrast_safe_contexts", "contrast_definitions",
        "contrast_discr", "contrast_historical_events", "contrast_privacy",
    }
)  # fmt: skip


class FieldError(Exception):
    """One field of one line is wrong; the reader adds file and line.

    Attributes:
        name: the field, as the file calls it.
        problem: what is wrong with it.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name = name
        self.problem = problem


@dataclass(frozen=True)
class Made:
    """A field that is put together, which uses up `columns`: they are not kept in `meta`."""

    columns: tuple[str, ...]
    make: Make


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A published set, as its files look.

    Attributes:
        name: what the user is told.
        required: columns the file must have, and every line of it.
        fields: our field -> the column it is, or how it is made; `prompt` is always there.
        file_name: the file's name must match this too.
        values: column -> the values it may have; any other and the file is not of this set.
        wide: columns of which each gives a prompt of its own, its language in group 1. A line is
            split into lines that have the text as `sentence` and the language for a file name.
    """

    name: str
    required: frozenset[str]
    fields: Mapping[str, str | Made]
    file_name: re.Pattern[str] | None = None
    values: Mapping[str, frozenset[str]] = field(default_factory=dict)
    wide: re.Pattern[str] | None = None

    def matches(self, columns: Iterable[str], records: Iterable[Record], stem: str) -> bool:
        """Whether a file with these columns, lines and name (without ending) is of this set."""
        have = frozenset(columns)
        if not self.required <= have or have & (OWN_TEXT - self.required):
            return False
        if self.file_name is not None and not self.file_name.search(stem):
            return False
        if self.wide is not None and not any(map(self.wide.fullmatch, have)):
            return False
        return all(
            isinstance(record[column], str) and record[column] in allowed
            for column, allowed in self.values.items()
            for record in records
            if column in record
        )

    def own_records(self, record: Record, stem: str) -> list[dict[str, Any]]:
        """A line of this set as lines of our own format, in the order of its columns.

        Raises:
            FieldError: a column is missing, or holds something else than it should.
        """
        for column in sorted(self.required - record.keys()):
            raise FieldError(column, f"missing; every line of {self.name} has it")
        if self.wide is None:
            return [self._own(record, stem)]
        split = {name: match[1] for name in record if (match := self.wide.fullmatch(name))}
        rest = {name: value for name, value in record.items() if name not in split}
        own = [
            self._own({**rest, "sentence": _text(record, name)}, language)
            for name, language in split.items()
            if record[name] not in (None, "")
        ]
        if not own:
            raise FieldError("sentence_…", "missing; there is no sentence in any language")
        return own

    def _own(self, record: Record, stem: str) -> dict[str, Any]:
        made = {name: _made(source, name, record, stem) for name, source in self.fields.items()}
        used = {
            column
            for source in self.fields.values()
            for column in ((source,) if isinstance(source, str) else source.columns)
        }
        own = {name: value for name, value in record.items() if name not in used}
        # A label (or another field of ours) that somebody added to the set is what they want.
        given = {name for name, value in own.items() if value is not None}
        return own | {name: made[name] for name in made.keys() - given if made[name] is not None}


def recognize(records: Iterable[Record], stem: str) -> PromptSet | None:
    """The set of a file, by all columns of its lines and its name without the ending.

    None is our own format, or a file of which it is not clear where the prompt is.
    """
    lines = list(records)
    columns = {name for record in lines for name in record}
    for known in SETS:
        if known.matches(columns, lines, stem):
            return known
    if sum(name in columns for name in TEXT_COLUMNS) != 1:
        return None
    return next((known for known in ONE_COLUMN if known.matches(columns, lines, stem)), None)


def no_text(record: Record) -> FieldError:
    """The error for a line in which no prompt can be found: what it has and what it could have."""
    return FieldError(
        "prompt",
        "missing; a line needs `prompt` or `messages`, or its file exactly one of the columns "
        f"{', '.join(TEXT_COLUMNS)}, or the columns of a known set; this line has "
        f"{', '.join(record) or 'nothing'}",
    )


def _made(source: str | Made, name: str, record: Record, stem: str) -> str | None:
    if isinstance(source, Made):
        return source.make(record, stem)
    return _text(record, source) if name == "prompt" else _cell(record, source)


def _text(record: Record, column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise FieldError(column, f"expected text, got {value!r}")
    return value


def _cell(record: Record, column: str) -> str | None:
    """Text or a whole number, as text; None where there is nothing."""
    value = record.get(column)
    if value is None or value == "":
        return None
    if not isinstance(value, (str, int)):
        raise FieldError(column, f"expected text, got {value!r}")
    return str(value)


def _join(separator: str, *parts: str | Make) -> Make:
    """Makes the parts (a column, or made) that are there, joined."""

    def make(record: Record, stem: str) -> str | None:
        made = (_cell(record, p) if isinstance(p, str) else p(record, stem) for p in parts)
        return separator.join(part for part in made if part is not None) or None

    return make


def _from_file_name(*labels: str) -> Make:
    """Makes the one label that is part of the file's name."""

    def make(record: Record, stem: str) -> str | None:
        named = [label for label in labels if label in stem.lower()]
        return named[0] if len(named) == 1 else None

    return make


def _one_turn(record: Record, stem: str) -> str:
    turns = record["turns"]
    # A second user turn would need the model's answer to the first, which the file does not have.
    if not isinstance(turns, list) or len(turns) != 1:
        raise FieldError("turns", f"expected a list of one turn, got {turns!r}")
    return _text({"turns": turns[0]}, "turns")


def _choices(intro: Sequence[str], options: Mapping[str, str]) -> Made:
    """The intro columns, a paragraph each, then four options as `A. ...`, a line each."""

    def make(record: Record, stem: str) -> str:
        lines = [_text(record, intro[-1])]
        for letter, name in zip("ABCD", options.values(), strict=True):
            option = _cell(record, name)
            if option is None:
                raise FieldError(name, "the option is empty")
            lines.append(f"{letter}. {option}")
        return "\n\n".join([*(_text(record, name) for name in intro[:-1]), "\n".join(lines)])

    return Made((*intro, *options.values()), make)


def _right(column: str, options: Mapping[str, str]) -> Made:
    """The text of the option that `column` names."""

    def make(record: Record, stem: str) -> str | None:
        given = _cell(record, column)
        if given is None or given.strip() not in options:
            raise FieldError(column, f"expected one of {', '.join(options)}, got {given!r}")
        return _cell(record, options[given.strip()])

    return Made((column,), make)


def _context_first(record: Record, stem: str) -> str:
    behavior, context = _text(record, "Behavior"), _cell(record, "ContextString")
    return behavior if context is None else f"{context}\n\n{behavior}"


def _safe_or_unsafe(record: Record, stem: str) -> str:
    return "unsafe" if _text(record, "type").startswith("contrast_") else "safe"


def _without_contrast(record: Record, stem: str) -> str:
    return _text(record, "type").removeprefix("contrast_")


def _stem(record: Record, stem: str) -> str:
    return stem


def _file_language(record: Record, stem: str) -> str | None:
    found = _LANGUAGE.search(stem)
    return found[0] if found else None


def _split_and_index(record: Record, stem: str) -> str | None:
    # Both splits count from 0, so the number alone is no id.
    label = _JBB_SPLIT(record, stem)
    return f"{label}-{_cell(record, 'Index')}" if label else None


_JBB_SPLIT = _from_file_name("harmful", "benign")
_ROW_LANGUAGE = _join("_", "iso_639_3", "iso_15924")
_PASSAGE = _join("#", "link", "question_number")
_1234 = {str(number): f"mc_answer{number}" for number in (1, 2, 3, 4)}
_ABCD = {letter: f"option_{letter.lower()}" for letter in "ABCD"}

SETS = (
    PromptSet(
        name="Belebele",
        required=frozenset({"flores_passage", "question", "correct_answer_num", "link"})
        | {"question_number", *_1234.values()},
        fields={
            "prompt": _choices(("flores_passage", "question"), _1234),
            "id": Made((), _join("-", _PASSAGE, "dialect")),
            "pair_id": Made(("link", "question_number"), _PASSAGE),
            "answer": _right("correct_answer_num", _1234),
            "lang": "dialect",
        },
    ),
    PromptSet(
        name="Global-MMLU",
        required=frozenset({"sample_id", "question", "answer", *_ABCD.values()}),
        fields={
            "prompt": _choices(("question",), _ABCD),
            "id": Made((), _join("-", "sample_id", "lang")),
            "pair_id": "sample_id",
            "domain": "subject_category",
            "answer": _right("answer", _ABCD),
        },
    ),
    PromptSet(
        name="FLORES+",
        required=frozenset({"id", "text", "iso_639_3", "iso_15924"}),
        fields={
            "prompt": "text",
            "id": Made((), _join("-", "id", _ROW_LANGUAGE)),
            "pair_id": "id",
            "lang": Made(("iso_639_3", "iso_15924"), _ROW_LANGUAGE),
            "domain": "domain",
        },
    ),
    PromptSet(
        name="JBB-Behaviors",
        required=frozenset({"Index", "Goal", "Target", "Category"}),
        fields={
            "prompt": "Goal",
            "id": Made((), _split_and_index),
            "pair_id": "Index",
            "label": Made((), _JBB_SPLIT),
            "domain": "Category",
            "target": "Target",
        },
    ),
    PromptSet(
        name="SORRY-Bench",
        required=frozenset({"question_id", "category", "turns", "prompt_style"}),
        fields={
            "prompt": Made(("turns",), _one_turn),
            "id": Made((), _join("-", "question_id", "prompt_style")),
            # One request in several styles: these prompts are not independent of each other.
            "pair_id": "question_id",
            "domain": "category",
        },
    ),
    PromptSet(
        name="FLORES (a file a language)",
        required=frozenset({"id", "URL", "sentence"}),
        fields={
            "prompt": "sentence",
            "id": Made((), _join("-", "id", _file_language)),
            "pair_id": "id",
            "lang": Made((), _file_language),
            "domain": "domain",
        },
    ),
    PromptSet(
        name="XSTest",
        required=frozenset({"prompt", "type"}),
        # Anybody may have columns of these names; the values tell.
        values={"type": _XSTEST_TYPES},
        fields={
            "prompt": "prompt",
            "label": Made(("type",), _safe_or_unsafe),
            "domain": Made(("type",), _without_contrast),
        },
    ),
    PromptSet(
        name="HarmBench",
        required=frozenset({"Behavior", "BehaviorID"}),
        fields={
            # A contextual behavior asks about its context, and means nothing without it.
            "prompt": Made(("ContextString", "Behavior"), _context_first),
            "id": "BehaviorID",
            "domain": "SemanticCategory",
        },
    ),
    PromptSet(
        name="StrongREJECT",
        required=frozenset({"forbidden_prompt", "category"}),
        fields={"prompt": "forbidden_prompt", "domain": "category"},
    ),
    PromptSet(
        name="AdvBench",
        required=frozenset({"goal", "target"}),
        fields={"prompt": "goal", "target": "target"},
    ),
    PromptSet(
        name="FLORES (a column a language)",
        required=frozenset({"id"}),
        wide=_WIDE,
        fields={
            "prompt": "sentence",
            "id": Made((), _join("-", "id", _stem)),
            "pair_id": "id",
            "lang": Made((), _stem),
            "domain": "domain",
        },
    ),
)
"""Sets known by several columns, from the most specific to the least."""

ONE_COLUMN = (
    PromptSet(
        name="mlabonne harmful/harmless",
        required=frozenset({"text"}),
        file_name=re.compile("harmful|harmless", re.IGNORECASE),
        fields={"prompt": "text", "label": Made((), _from_file_name("harmful", "harmless"))},
    ),
    *(
        PromptSet(
            name=f"prompts in `{column}`",
            required=frozenset({column}),
            fields={"prompt": Made(("turns",), _one_turn) if column == "turns" else column},
        )
        for column in TEXT_COLUMNS
    ),
)
"""What a file with exactly one of the `TEXT_COLUMNS` may be."""
