"""What every analysis returns and declares: described columns, context, parameters.

An `AnalysisTable` explains itself: each column states its unit, range, definition and source, the
context says which run, how many prompts and tokens, which filters and parameters. A table whose
frame and columns disagree cannot be made. Undefined values are missing (NaN or NA), never 0.

Adding an analysis: a function `(store, run_id, *, filters=..., parameters...) -> AnalysisTable`
in the file of its kind, and an `Analysis` in `registry.py`. The command line passes strings;
`Analysis.parse` turns them into what the function takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from moescope.probe.analysis.filters import Filters, parse_conditions
from moescope.probe.errors import AnalysisInputError


@dataclass(frozen=True, kw_only=True)
class Column:
    """One described column.

    Attributes:
        name: the column's name in the frame and in every export.
        unit: what the numbers count or measure; empty for names and identifiers.
        range: the values it can take, in words or as an interval.
        definition: how it is computed, in one sentence or formula.
        source: paper and section, or `moescope` for our own definitions.
    """

    name: str
    unit: str
    range: str
    definition: str
    source: str = "moescope"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a table was computed from.

    Attributes:
        model: name of the recorded model.
        revision: its revision, if it has one.
        run_id: the run.
        num_prompts: prompts that contributed at least one token.
        num_tokens: routed tokens counted (in one layer: every router sees each of them).
        parameters: every parameter of the analysis as resolved, seeds included.
        filters: the filters as plain data.
        selection: the filters in a few words, for subtitles.
    """

    model: str
    revision: str | None
    run_id: str
    num_prompts: int
    num_tokens: int
    parameters: Mapping[str, Any]
    filters: Mapping[str, Any]
    selection: str


@dataclass(frozen=True, kw_only=True, eq=False)
class AnalysisTable:
    """The answer of an analysis.

    Attributes:
        name: the analysis, as in `ANALYSES`.
        title: what the table shows, in a few words.
        frame: the rows; its columns are exactly `columns`, in that order.
        columns: the description of each column.
        context: model, run, n, parameters, filters.
        notes: what a reader must know: what was left out, which assumption was needed.
        summary: single numbers about the whole table (stability, number of units), by name.

    Raises:
        ValueError: when the frame's columns are not the described ones.
    """

    name: str
    title: str
    frame: pd.DataFrame
    columns: tuple[Column, ...]
    context: Context
    notes: tuple[str, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every column of the frame is described."""
        described = [column.name for column in self.columns]
        present = list(self.frame.columns)
        if described != present:
            raise ValueError(f"table {self.name!r} describes {described} but holds {present}")

    def column(self, name: str) -> Column:
        """The description of one column; raises `KeyError` naming those there are."""
        for column in self.columns:
            if column.name == name:
                return column
        known = ", ".join(column.name for column in self.columns)
        raise KeyError(f"table {self.name!r} has no column {name!r}; it has {known}")


ParameterType = Literal[
    "text", "integer", "number", "flag", "choice", "conditions", "texts", "run", "file"
]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of an analysis, as the command line offers it.

    Attributes:
        name: of the keyword argument; `--` and dashes make the option of it.
        type: `text`, `integer`, `number`, `flag`, `choice`, `run` (another run of the store),
            `file` (a path), or, of what may be given several times, `conditions` (FIELD=VALUE) and
            `texts`.
        default: what holds when it is not given.
        help: one line for `--help`.
        choices: the values of a `choice`.
        required: whether it must be given.
    """

    name: str
    type: ParameterType
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    required: bool = False

    def parse(self, value: str | Sequence[str]) -> Any:
        """Turn what the user typed into what the function takes.

        Raises:
            AnalysisInputError: when the text is not of this type.
        """
        if self.type == "conditions":
            return parse_conditions([value] if isinstance(value, str) else value)
        if self.type == "texts":
            return (value,) if isinstance(value, str) else tuple(value)
        if not isinstance(value, str):
            if len(value) != 1:
                raise AnalysisInputError(f"{self.name} is given {len(value)} times; once is right")
            value = value[0]
        if self.type == "choice" and value not in self.choices:
            raise AnalysisInputError(
                f"{self.name} is {value!r}; it is one of {', '.join(self.choices)}"
            )
        if self.type in ("text", "choice", "run", "file"):
            return value
        return self._parse_scalar(value)

    def _parse_scalar(self, value: str) -> int | float | bool:
        if self.type == "flag":
            flags = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            if value.lower() in flags:
                return flags[value.lower()]
            raise AnalysisInputError(f"{self.name} is {value!r}; it is true or false")
        try:
            return int(value) if self.type == "integer" else float(value)
        except ValueError:
            kind = "a whole number" if self.type == "integer" else "a number"
            raise AnalysisInputError(f"{self.name} is {value!r}; it must be {kind}") from None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """One analysis as `moescope analyze` offers it.

    Attributes:
        name: as the user types it.
        title: what its table shows.
        question: what a researcher asks with it.
        function: `(store, run_id, *, filters, parameters...) -> AnalysisTable`.
        parameters: what it takes beside filters.
        filters: the filters that hold where the user gives none.
        stored: whether results are worth keeping: not those that are read from rows as they are.
    """

    name: str
    title: str
    question: str
    function: Callable[..., AnalysisTable]
    parameters: tuple[Parameter, ...] = ()
    filters: Filters = field(default_factory=Filters)
    stored: bool = True

    def parse(self, values: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
        """Turn typed parameters into keyword arguments, defaults filled in.

        Raises:
            AnalysisInputError: for an unknown, malformed or missing parameter.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in values:
            if name not in known:
                offered = ", ".join(known) if known else "none"
                raise AnalysisInputError(
                    f"analysis {self.name!r} has no parameter {name!r}; it has: {offered}"
                )
        arguments: dict[str, Any] = {}
        for name, parameter in known.items():
            if name in values:
                arguments[name] = parameter.parse(values[name])
            elif parameter.required:
                raise AnalysisInputError(f"analysis {self.name!r} needs {name}: {parameter.help}")
            else:
                arguments[name] = parameter.default
        return arguments
