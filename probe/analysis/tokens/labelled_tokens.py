"""Tokens by a vocabulary id: their own, that of the token after them, or the one predicted.

The model's prediction is known only where it became the next token: for the last token of a prompt
and generated ones, and only if generation was greedy.

Letters: T counted tokens with a label, P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.selection import IntArray, Selection, select, unit_labels
from moescope.probe.analysis.token_slots import Tokens, read_tokens
from moescope.probe.analysis.tokens.label_counts import BoolArray, compact, keep_tokens
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

TokenLabel = Literal["input", "next", "predicted"]
SlotChoice = Literal["top1", "topk"]
_WORDS = {
    "input": "the token itself",
    "next": "the token after it",
    "predicted": "the token that the model predicts after it",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledTokens:
    """The counted tokens that have a label.

    Attributes:
        selection: where they come from.
        tokens: only those with a label, [T].
        codes: the label of each as a number from 0 without gaps, [T].
        ids: the vocabulary id of each label, ascending.
        units: unit of each prompt, [P].
        notes: what the reader of any table must know.
    """

    selection: Selection
    tokens: Tokens
    codes: IntArray
    ids: IntArray
    units: IntArray
    notes: tuple[str, ...]


def read_labelled(
    store: Store, run_id: str, filters: Filters | None, label: TokenLabel, unit: str
) -> LabelledTokens:
    """The counted tokens with a known label.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: which prompts, tokens and routers count.
        label: `input`, `next` or `predicted`.
        unit: the prompt field that joins prompts into units of resampling.

    Raises:
        AnalysisInputError: for another label, when the run was not generated greedily though
            predictions are asked for, or when no counted token has a known label.
    """
    if label not in _WORDS:
        raise AnalysisInputError(f"label is {label!r}; it is one of {', '.join(_WORDS)}")
    if label == "predicted":
        _check_greedy(run_id, store.run(run_id).manifest.get("arguments"))
    selection = select(store, run_id, filters or Filters(), fields=[unit, "num_tokens"])
    column = "token_id" if label == "input" else "next_token_id"
    tokens = read_tokens(selection, [column])
    known_T = np.asarray(tokens.columns[column] >= 0)
    if label == "predicted":
        known_T &= _next_is_generated(selection, tokens)
    if not known_T.any():
        raise AnalysisInputError(
            f"{_WORDS[label]} is not known for any counted token of run {run_id!r}; use a run that "
            "recorded token ids, another label, or wider filters"
        )
    notes: tuple[str, ...] = (f"Labels: {_WORDS[label]}.",)
    if not known_T.all():
        notes += (f"Tokens left out because this is not known for them: {(~known_T).sum():,}.",)
    kept = keep_tokens(tokens, known_T)
    codes, ids = compact(kept.columns[column])
    return LabelledTokens(
        selection=selection,
        tokens=kept,
        codes=codes,
        ids=ids,
        units=unit_labels(selection.prompts, unit),
        notes=(*selection.notes, *notes),
    )


def check_choices(slots: str, **numbers: int) -> None:
    """Refuse slots other than `top1` and `topk`, and numbers below 1."""
    if slots not in ("top1", "topk"):
        raise AnalysisInputError(f"slots is {slots!r}; it is top1 or topk")
    for name, number in numbers.items():
        if number < 1:
            raise AnalysisInputError(f"{name} is {number}; it is 1 or more")


def _next_is_generated(selection: Selection, tokens: Tokens) -> BoolArray:
    length_P = selection.prompts["num_tokens"].astype(int).to_numpy()
    return np.asarray(tokens.positions + 1 >= length_P[tokens.prompts])


def _check_greedy(run_id: str, arguments: Any) -> None:
    """Refuse unless the run says that its answers were chosen greedily."""
    arguments = arguments if isinstance(arguments, dict) else {}
    sampling = arguments.get("sampling")
    if not isinstance(sampling, dict) or "do_sample" not in sampling:
        reason = "does not say how answers were chosen"
    elif sampling["do_sample"]:
        reason = "drew its answers at random"
    elif not arguments.get("max_new_tokens"):
        reason = "generated no answers"
    else:
        return
    raise AnalysisInputError(
        f"label predicted needs greedily generated answers, and run {run_id!r} {reason}; use label "
        "next, or record with --generate and greedy sampling"
    )
