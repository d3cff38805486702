"""Which prompts two runs share, and how far the tokens of a shared prompt are the same.

Prompts are matched by set_name and key where these tell every prompt apart, the others by rendered
text, the first of equals with the first. Of a matched prompt the tokens before the first difference
are the same: token ids at the same positions, all of them known.

Letters: M matched prompts, T tokens that a run counts, S tokens up to the shorter of two prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.probe.analysis.selection import IntArray, Selection, read_fields
from moescope.probe.analysis.token_filters import column_array
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

UNKNOWN_TOKEN = -1
"""What imports write for a token whose id their source does not tell."""

IDENTITY = ("set_name", "key", "rendered_text")
"""Prompt fields that tell which prompt of another run is the same."""


def match_prompts(own: pd.DataFrame, other: pd.DataFrame) -> tuple[IntArray, IntArray]:
    """Ids of the prompts that two runs share, [M] each, by ascending id in the first.

    Args:
        own: `prompt_id` ascending, `set_name`, `key`, `rendered_text` of all prompts of a run.
        other: the same of the other run.
    """
    names = ["set_name", "key"]
    keyed = [
        frame[frame["key"].notna() & ~frame.duplicated(names, keep=False)] for frame in (own, other)
    ]
    by_key = keyed[0].merge(keyed[1], on=names)[["prompt_id_x", "prompt_id_y"]]
    rest = []
    for frame, side in ((own, "prompt_id_x"), (other, "prompt_id_y")):
        left = frame[~frame["prompt_id"].isin(by_key[side])]
        occurrence = left.groupby("rendered_text").cumcount()
        rest.append(left[["prompt_id", "rendered_text"]].assign(occurrence=occurrence))
    by_text = rest[0].merge(rest[1], on=["rendered_text", "occurrence"])
    pairs = pd.concat([by_key, by_text[["prompt_id_x", "prompt_id_y"]]])
    pairs = pairs.sort_values("prompt_id_x", kind="stable")
    ids, partner_ids = (pairs[name].to_numpy(dtype=np.int64) for name in pairs.columns)
    return ids, partner_ids


@dataclass(frozen=True, kw_only=True, eq=False)
class _RunTokens:
    """All tokens of a run, by prompt and position."""

    prompt_ids: IntArray
    positions: IntArray
    token_ids: IntArray
    is_routed: NDArray[np.bool_]

    @classmethod
    def read(cls, store: Store, run_id: str) -> _RunTokens:
        """Fetch them."""
        table = store.arrow(
            "SELECT prompt_id, position, token_id, is_routed FROM tokens WHERE run_id = ? "
            "ORDER BY prompt_id, position",
            [run_id],
        )
        return cls(
            prompt_ids=column_array(table, "prompt_id"),
            positions=column_array(table, "position"),
            token_ids=column_array(table, "token_id"),
            is_routed=table.column("is_routed").to_numpy(zero_copy_only=False),
        )

    def spans(self, ids_M: IntArray) -> tuple[IntArray, IntArray]:
        """First row of each prompt, and the row after its last."""
        return (
            np.searchsorted(self.prompt_ids, ids_M, side="left"),
            np.searchsorted(self.prompt_ids, ids_M, side="right"),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedPrompts:
    """The prompts that two runs share.

    Attributes:
        run_id, reference_id: the two runs.
        ids: of the prompts in the run, ascending, [M].
        partner_ids: in the reference, [M].
        lengths: tokens of each before the first difference, [M].
        num_reference_prompts: all prompts of the reference, shared or not.
        is_unknown: whether a token id is unknown where the two should be compared.
        run_spans, reference_spans: rows of each prompt among all tokens of the run, first and
            after the last, [M] each.
        is_routed: whether each token of the reference passed the routers, all prompts.
    """

    run_id: str
    reference_id: str
    ids: IntArray
    partner_ids: IntArray
    lengths: IntArray
    num_reference_prompts: int
    is_unknown: bool
    run_spans: tuple[IntArray, IntArray]
    reference_spans: tuple[IntArray, IntArray]
    is_routed: NDArray[np.bool_]

    def match_of(self, prompt_ids: IntArray) -> IntArray:
        """Which of the M matches each prompt of the run is; -1 where the reference lacks it."""
        if not len(self.ids):
            return np.full(len(prompt_ids), -1, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.ids, prompt_ids), len(self.ids) - 1)
        return np.where(self.ids[place] == prompt_ids, place, -1)

    def is_same(self, match_T: IntArray, positions_T: IntArray) -> NDArray[np.bool_]:
        """Which tokens of the run are the same in the reference, and passed its routers."""
        same_T = match_T >= 0
        same_T[same_T] = positions_T[same_T] < self.lengths[match_T[same_T]]
        rows = self.reference_spans[0][match_T[same_T]] + positions_T[same_T]
        same_T[same_T] = self.is_routed[rows]
        return same_T

    def nothing_shared(self, prompt_ids: IntArray, counted: str) -> AnalysisInputError:
        """Why no counted token of these prompts is the same in both runs."""
        runs = f"runs {self.run_id!r} and {self.reference_id!r}"
        match_P = self.match_of(prompt_ids)
        match_P = match_P[match_P >= 0]
        if not len(match_P):
            return AnalysisInputError(
                f"{runs} have none of these prompts in common, neither by set_name and key nor by "
                "rendered text; record both with the same prompts"
            )
        if self.lengths[match_P].any():
            return AnalysisInputError(
                f"the tokens that {runs} have in common are not among: {counted}"
            )
        if self.is_unknown:
            return AnalysisInputError(
                f"{runs} cannot be compared token by token: the token ids of one of them are not "
                "known; record it, or import it from a source that has them"
            )
        return AnalysisInputError(
            f"{runs} share {len(match_P)} prompts but no token: the first token ids differ; use "
            "the same tokenizer, chat template and system message for both"
        )

    def notes(self, prompt_ids: IntArray, match_T: IntArray, num_same: int) -> tuple[str, ...]:
        """What was matched and what was left out.

        Args:
            prompt_ids: of the prompts that the filters select in the run.
            match_T: match of each token that the filters count.
            num_same: those of them that are the same in the reference.
        """
        num_matched = int((self.match_of(prompt_ids) >= 0).sum())
        text = f"Prompts matched with run {self.reference_id!r}: {num_matched}."
        alone = (
            (self.run_id, len(prompt_ids) - num_matched),
            (self.reference_id, self.num_reference_prompts - len(self.ids)),
        )
        for run_id, number in alone:
            if number:
                text += f" Only in run {run_id!r}: {number}."
        num_counted = int((match_T >= 0).sum())
        if num_same == num_counted:
            return (text,)
        return (
            text,
            f"Tokens of matched prompts left out: {num_counted - num_same} of {num_counted}, those "
            f"from the first difference to run {self.reference_id!r} on.",
        )


def shared_prompts(store: Store, run_id: str, reference: Selection) -> SharedPrompts:
    """Match the prompts of two runs, and find how far their tokens are the same.

    Args:
        store: where both runs lie.
        run_id: the run; all its prompts are matched, whatever filters leave of them.
        reference: all prompts of the run it is compared with, with the fields `IDENTITY`.
    """
    ids, partner_ids = match_prompts(read_fields(store, run_id, IDENTITY), reference.prompts)
    own, other = (_RunTokens.read(store, name) for name in (run_id, reference.run_id))
    spans = own.spans(ids), other.spans(partner_ids)
    lengths, is_unknown = _same_lengths((own, other), spans)
    return SharedPrompts(
        run_id=run_id,
        reference_id=reference.run_id,
        ids=ids,
        partner_ids=partner_ids,
        lengths=lengths,
        num_reference_prompts=len(reference.prompts),
        is_unknown=is_unknown,
        run_spans=spans[0],
        reference_spans=spans[1],
        is_routed=other.is_routed,
    )


def _same_lengths(
    runs: tuple[_RunTokens, _RunTokens],
    spans: tuple[tuple[IntArray, IntArray], tuple[IntArray, IntArray]],
) -> tuple[IntArray, bool]:
    """Tokens of each matched prompt before the first difference, and whether an id is unknown."""
    lengths_M = np.minimum(*(ends - starts for starts, ends in spans))
    prompt_S = np.repeat(np.arange(len(lengths_M)), lengths_M)
    offset_S = np.arange(len(prompt_S)) - np.repeat(np.cumsum(lengths_M) - lengths_M, lengths_M)
    ids = []
    same_S = np.ones(len(prompt_S), dtype=bool)
    for tokens, (starts, _) in zip(runs, spans, strict=True):
        rows = starts[prompt_S] + offset_S
        ids.append(tokens.token_ids[rows])
        same_S &= tokens.positions[rows] == offset_S
    is_unknown_S = (ids[0] == UNKNOWN_TOKEN) | (ids[1] == UNKNOWN_TOKEN)
    different_S = ~same_S | is_unknown_S | (ids[0] != ids[1])
    np.minimum.at(lengths_M, prompt_S[different_S], offset_S[different_S])
    return lengths_M, bool(is_unknown_S.any())
