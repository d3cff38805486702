"""Reading what a contrast compares: cells of units and classes, all routers side by side.

Letters: P selected prompts, T counted tokens, N cells, C classes, X experts of all routers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moescope.probe.analysis.cells import Cells, merged
from moescope.probe.analysis.contrasts.methods import Average, Measure
from moescope.probe.analysis.counts import (
    GroupedUsage,
    Quantity,
    RouterUsage,
    count_slots,
    read_counts,
)
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.selection import IntArray, Selection
from moescope.probe.analysis.statistics import FloatArray
from moescope.probe.analysis.token_slots import Tokens, read_slots, read_tokens
from moescope.probe.errors import AnalysisInputError

QUANTITIES: Final[Mapping[Measure, Quantity]] = {
    "selections": "num_tokens",
    "weights": "weight_sum",
    "scores": "prob_sum",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ContrastData:
    """What the units of each class used.

    Attributes:
        cells: of the measure, averaged as the method asks.
        selected: the same cells, row by row, as selections over tokens.
        class_of: prompts with a counted token, and their classes: one row a prompt and class.
    """

    cells: Cells
    selected: Cells
    class_of: NDArray[np.int64]

    @property
    def num_prompts(self) -> int:
        """Prompts with a counted token in any class."""
        return len(np.unique(self.class_of[:, 0]))

    @property
    def num_tokens(self) -> int:
        """Counted tokens of all classes."""
        return int(self.selected.tokens.sum())

    def size_of(self, in_a: IntArray, *, is_group: bool) -> tuple[int, int]:
        """Prompts and tokens of the classes that are group a, or of all others."""
        members = np.isin(self.class_of[:, 1], in_a) == is_group
        cells = np.isin(self.selected.classes, in_a) == is_group
        prompts = len(np.unique(self.class_of[members, 0]))
        return prompts, int(self.selected.tokens[cells].sum())


def read_prompt_classes(
    selection: Selection,
    unit_P: IntArray,
    class_P: IntArray,
    measure: Measure,
    average: Average,
) -> ContrastData:
    """Cells of units and classes of prompts."""
    quantities = list(dict.fromkeys(["num_tokens", QUANTITIES[measure]]))
    num_classes = int(class_P.max()) + 1
    by_prompt = average in ("prompt", "sum")
    group_P = np.full(len(unit_P), -1, dtype=np.int64)
    kept = np.flatnonzero(class_P >= 0)
    keys = unit_P[kept] * num_classes + class_P[kept]
    found, cell_K = np.unique(keys, return_inverse=True)
    group_P[kept] = np.arange(len(kept)) if by_prompt else cell_K
    usage = read_counts(selection, group_P, quantities=quantities, dtype=np.float32)
    tokens = _same_tokens(selection, usage.routers)
    measured, selected = (
        _side_by_side(usage, name) for name in (QUANTITIES[measure], "num_tokens")
    )
    counted = tokens > 0
    cells = Cells(
        counts=measured[counted],
        tokens=tokens[counted],
        units=(keys if by_prompt else found)[counted] // num_classes,
        classes=(keys if by_prompt else found)[counted] % num_classes,
        num_classes=num_classes,
    )
    own = replace(cells, counts=selected[counted])
    if by_prompt:
        rates = cells.counts if average == "sum" else cells.counts / cells.tokens[:, None]
        cells = merged(replace(cells, counts=rates, tokens=np.ones(len(cells.tokens))))
        own = merged(own)
    counted_P = np.flatnonzero((usage.prompt_tokens > 0) & (class_P >= 0))
    class_of = np.column_stack([counted_P, class_P[counted_P]])
    return ContrastData(cells=cells, selected=own, class_of=class_of)


def read_markers(
    selection: Selection, unit_P: IntArray, kept_P: NDArray[np.bool_], markers: Sequence[str]
) -> ContrastData:
    """Cells of units by marker token, the last class being all other tokens.

    A marker counts wherever it stands, also in the template; of the other tokens count those that
    the filters leave. Prompts that are not kept take no part.

    Raises:
        AnalysisInputError: for a marker that no token of the run equals.
    """
    tokens, class_T = _marked_tokens(selection, kept_P, markers)
    num_classes = len(markers) + 1
    found, cell_T = np.unique(unit_P[tokens.prompts] * num_classes + class_T, return_inverse=True)
    counts = {router: np.zeros((len(found), router.num_experts)) for router in selection.routers}
    passed = {router: np.zeros(len(found)) for router in selection.routers}
    for block in read_slots(selection, tokens):
        for router, experts_TK in block.experts.items():
            used = count_slots(router, experts_TK, None, cell_T[block.tokens], len(found))
            counts[router] += used.counts
            passed[router] += used.tokens
    routers = [
        RouterUsage(router=router, tokens=passed[router], sums={"num_tokens": counts[router]})
        for router in selection.routers
    ]
    cells = Cells(
        counts=np.concatenate([counts[router] for router in selection.routers], axis=1),
        tokens=_same_tokens(selection, routers),
        units=found // num_classes,
        classes=found % num_classes,
        num_classes=num_classes,
    )
    class_of = np.unique(np.column_stack([tokens.prompts, class_T]), axis=0)
    return ContrastData(cells=cells, selected=cells, class_of=class_of)


def _marked_tokens(
    selection: Selection, kept_P: NDArray[np.bool_], markers: Sequence[str]
) -> tuple[Tokens, IntArray]:
    """The counted tokens and markers, and the class of each."""
    whole = replace(selection, filters=replace(selection.filters, content_only=False))
    tokens = read_tokens(whole, ["token", "is_special", "segment"])
    texts, text_T = np.unique(tokens.columns["token"].astype(str), return_inverse=True)
    class_T = np.full(len(tokens), len(markers), dtype=np.int64)
    for number, marker in enumerate(markers):
        same = np.array([text.strip() == marker.strip() for text in texts])
        if not same.any():
            raise AnalysisInputError(
                f"no counted token of run {selection.run_id!r} is {marker!r}; a marker is one "
                "token as the run's table tokens spells it"
            )
        class_T[same[text_T]] = number
    kept_T = (class_T < len(markers)) | _is_content(selection.filters, tokens)
    kept_T &= kept_P[tokens.prompts]
    return (
        Tokens(prompts=tokens.prompts[kept_T], positions=tokens.positions[kept_T], columns={}),
        class_T[kept_T],
    )


def _is_content(filters: Filters, tokens: Tokens) -> NDArray[np.bool_]:
    """Which tokens the filters' content rule leaves; the other filters have been applied."""
    if not filters.content_only or filters.scope == "last_prompt":
        return np.ones(len(tokens), dtype=bool)
    content = ~tokens.columns["is_special"].astype(bool)
    if filters.segments is None:
        content &= tokens.columns["segment"] != "template"
    return np.asarray(content)


def _side_by_side(usage: GroupedUsage, name: str) -> FloatArray:
    return np.concatenate([router.sums[name] for router in usage.routers], axis=1)


def _same_tokens(selection: Selection, routers: Sequence[RouterUsage]) -> FloatArray:
    """The tokens of each group, which all routers must have seen alike."""
    tokens = np.stack([usage.tokens for usage in routers])
    if (tokens != tokens[0]).any():
        kinds = ", ".join(sorted({router.kind for router in selection.routers}))
        raise AnalysisInputError(
            f"the routers of run {selection.run_id!r} did not see the same tokens ({kinds}); "
            "contrast the routers of one kind, or fewer layers"
        )
    return np.asarray(tokens[0])
