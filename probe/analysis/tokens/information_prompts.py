"""The terms of information of prompt fields, from the usage of whole prompts.

Letters: P prompts, G groups of units, V values, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from moescope.probe.analysis.counts import RouterUsage
from moescope.probe.analysis.selection import IntArray, Selection
from moescope.probe.analysis.tokens.information_terms import (
    Terms,
    label_terms,
    size_terms,
    table_terms,
)


def prompt_values(selection: Selection, name: str) -> IntArray:
    """The value of a prompt field as a number, -1 where there is none, [P]."""
    codes, _ = pd.factorize(selection.prompts[name], sort=True, use_na_sentinel=True)
    return codes.astype(np.int64)


def prompt_terms(
    usage: RouterUsage,
    kept: IntArray,
    group_P: IntArray,
    values: Sequence[IntArray],
    *,
    per_expert: bool,
) -> Terms:
    """Everything that the information of a factor of prompts is made of, at one router.

    Args:
        usage: of all prompts, each a group of its own.
        kept: the prompts that count, [P].
        group_P: group of units of each of them.
        values: their observed values, from 0, and then shuffled ones, [P] each.
        per_expert: one value per expert, of whether a token selects it.
    """
    counts_PE, tokens_P = usage.counts[kept], usage.tokens[kept].astype(np.float64)
    num_groups, num_values = int(group_P.max()) + 1, int(values[0].max()) + 1

    def table(row_P: IntArray, num_rows: int) -> tuple[IntArray, IntArray]:
        cells = (np.ones(len(row_P)), (row_P, np.arange(len(row_P))))
        indicator = sparse.csr_array(cells, shape=(num_rows, len(row_P)))
        counts = np.asarray(indicator @ counts_PE)
        tokens = np.asarray(indicator @ tokens_P)
        return np.rint(counts).astype(np.int64), np.rint(tokens).astype(np.int64)

    counts, tokens = table(group_P * num_values + values[0], num_groups * num_values)
    counts_GVE = counts.reshape(num_groups, num_values, -1)
    tokens_GV = tokens.reshape(num_groups, num_values)
    counts_GE, tokens_G = counts_GVE.sum(axis=1), tokens_GV.sum(axis=1)
    marginal = table_terms(counts_GE[:, None], tokens_G[:, None], per_expert=per_expert)
    shuffled = [
        label_terms(*table(value_P, num_values), per_expert=per_expert).sum(axis=0)
        for value_P in values[1:]
    ]
    return Terms(
        label=table_terms(counts_GVE, tokens_GV, per_expert=per_expert),
        given=marginal,
        marginal=marginal,
        size=size_terms(counts_GE, tokens_G, per_expert=per_expert),
        shuffled=np.stack(shuffled),
    )
