"""Which prompts are in a, in b, or in one of the other classes of a contrast.

Letters: P selected prompts, C classes, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moescope.probe.analysis.contrasts.methods import Method
from moescope.probe.analysis.filters import describe_conditions
from moescope.probe.analysis.selection import IntArray, Selection, matching_prompts
from moescope.probe.errors import AnalysisInputError

Conditions = Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The class of every prompt.

    Attributes:
        classes: 0 for a, 1 and more for what it is compared with, -1 for prompts that take no part.
        names: what messages call each class.
        title: the contrast in a few words.
        notes: what was left out.
    """

    classes: IntArray
    names: tuple[str, ...]
    title: str
    notes: tuple[str, ...] = ()


def prompt_groups(
    selection: Selection,
    method: Method,
    a: Conditions | None,
    b: Conditions | None,
    *,
    unit_P: IntArray,
    fewest: int,
) -> Groups:
    """The groups that a method compares, or the one that it describes.

    Args:
        selection: the prompts.
        method: of the contrast.
        a: the first group as it was asked for.
        b: the second group, likewise.
        unit_P: unit of each prompt.
        fewest: units that a class needs; classes that nobody named are left out below it.

    Raises:
        AnalysisInputError: for a group that is missing, empty, or shares prompts with the other.
    """
    if method.groups == "one" and b:
        raise AnalysisInputError(
            f"method {method.name} describes one group and compares it with nothing; leave out b"
        )
    if method.name == "ftri":
        return _outcome_classes(selection, a, b, unit_P, fewest)
    if method.groups == "two" and b is None:
        raise AnalysisInputError(f"method {method.name} compares two groups; give b too")
    in_a = np.ones(len(selection.prompts), dtype=bool)
    name_a = "all prompts"
    if a is not None or method.groups != "one":
        in_a, name_a = _members(selection, "a", a or {}), describe(a or {})
    class_P = np.where(in_a, 0, -1)
    if b is None:
        names: tuple[str, ...] = (f"group a ({name_a})",)
        return Groups(classes=class_P, names=names, title=f"Experts of {name_a}")
    in_b = _members(selection, "b", b)
    _refuse_overlap(in_a, in_b)
    class_P[in_b] = 1
    return Groups(
        classes=class_P,
        names=(f"group a ({name_a})", f"group b ({describe(b)})"),
        title=f"Experts: {name_a} against {describe(b)}",
    )


def describe(conditions: Conditions) -> str:
    """Conditions in a few words."""
    return describe_conditions({field: tuple(values) for field, values in conditions.items()})


def fields_of(a: Conditions | None, b: Conditions | None) -> list[str]:
    """The prompt fields that the conditions name."""
    return list(dict.fromkeys([*(a or {}), *(b or {})]))


def strata(lang: pd.Series, unit_P: IntArray, class_P: IntArray) -> IntArray:
    """Stratum of each unit [U]: a only, both, the rest only; within these classes, then languages.

    Units with both lie between the others, so that dealing out units in turn halves each group as
    a whole to within one unit.
    """
    prompts = pd.DataFrame({"unit": unit_P, "lang": lang.fillna("").to_numpy(), "class": class_P})
    units = (
        prompts[class_P >= 0]
        .groupby("unit")
        .agg(
            a=("class", lambda classes: bool((classes == 0).any())),
            rest=("class", lambda classes: bool((classes > 0).any())),
            classes=("class", lambda classes: " ".join(map(str, sorted(set(classes))))),
            langs=("lang", lambda langs: "\n".join(sorted(set(langs)))),
        )
    )
    label = np.where(units["a"], np.where(units["rest"], 1, 0), 2)
    within, _ = pd.factorize(units["classes"] + "\n" + units["langs"], sort=True)
    stratum_U = np.zeros(int(unit_P.max()) + 1, dtype=np.int64)
    stratum_U[units.index.to_numpy()] = label * (len(units) + 1) + within + 1
    return stratum_U


def _outcome_classes(
    selection: Selection,
    a: Conditions | None,
    b: Conditions | None,
    unit_P: IntArray,
    fewest: int,
) -> Groups:
    """Class 0 is a; every other value of its field, or every one that b names, is a class."""
    if not a or len(a) != 1 or (b is not None and list(b) != list(a)):
        raise AnalysisInputError(
            "method ftri compares one value of a field with its other values: give a as one "
            "FIELD=VALUE, and b, if at all, as other values of the same field"
        )
    field = next(iter(a))
    in_a = _members(selection, "a", a)
    values = selection.prompts[field]
    others, notes = (
        (list(b[field]), ()) if b is not None else _large_classes(values, in_a, unit_P, fewest)
    )
    if not others:
        raise AnalysisInputError(f"no prompt has another value of {field} than a's")
    class_P = np.where(in_a, 0, -1)
    for number, value in enumerate(others, start=1):
        members = _members(selection, "b", {field: [value]})
        _refuse_overlap(in_a, members)
        class_P[members] = number
    rest = ", ".join(map(str, others))
    return Groups(
        classes=class_P,
        names=(f"group a ({describe(a)})", *(f"class {field}={value}" for value in others)),
        title=f"Experts: {describe(a)} against the mean of {rest}",
        notes=notes,
    )


def _large_classes(
    values: pd.Series, in_a: np.ndarray, unit_P: IntArray, fewest: int
) -> tuple[list[str], tuple[str, ...]]:
    """The other values with enough units, and a note on those with fewer."""
    units = pd.Series(unit_P)[~in_a].groupby(values[~in_a]).nunique()
    small = units[units < fewest]
    notes: tuple[str, ...] = ()
    if len(small):
        listed = ", ".join(f"{value} ({number})" for value, number in small.items())
        notes = (f"Classes with fewer than {fewest} units, left out: {listed}.",)
    return sorted(units.index[units >= fewest]), notes


def _members(selection: Selection, name: str, conditions: Conditions) -> np.ndarray:
    if not conditions:
        raise AnalysisInputError(f"group {name} has no condition; write FIELD=VALUE")
    kept = matching_prompts(
        selection.prompts, {field: tuple(values) for field, values in conditions.items()}
    )
    if not kept.any():
        held = "; ".join(_held_values(selection, field) for field in conditions)
        raise AnalysisInputError(f"group {name} ({describe(conditions)}) holds no prompt; {held}")
    return kept


def _held_values(selection: Selection, field: str) -> str:
    values = sorted(selection.prompts[field].dropna().unique())
    shown = ", ".join(values[:8]) + (", …" if len(values) > 8 else "")
    return f"{field} holds {shown or 'nothing'}"


def _refuse_overlap(in_a: np.ndarray, in_b: np.ndarray) -> None:
    both = int((in_a & in_b).sum())
    if both:
        raise AnalysisInputError(
            f"{both} prompts are in both groups; a and b must exclude each other"
        )
