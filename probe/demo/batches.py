"""From items to padded tensors. The token ids are those of the chat template, made directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moescope.probe.demo.corpus import Item
from moescope.probe.demo.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER

#: Tokens of a row, unless one item is longer.
ROW_WIDTH = 96


@dataclass(frozen=True)
class Batch:
    """Items as tensors, several in a row, each seeing only itself.

    Attributes:
        input_ids: int64[B, S].
        position_ids: int64[B, S], from 0 in every item.
        attention_mask: bool[B, 1, S, S], True where a position sees another.
        is_token: bool[B, S], False on padding.
        is_answer: bool[B, S], the answer and its end token.
        is_first: bool[B, S], the first token of every item.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    is_token: Tensor
    is_answer: Tensor
    is_first: Tensor


class Encoder:
    """Encodes items; texts seen before are remembered, as items repeat."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._special = {
            token: int(tokenizer.convert_tokens_to_ids(token))
            for token in (BOS, USER, SYSTEM, ASSISTANT, END)
        }
        self._pad = int(tokenizer.pad_token_id)

    def text(self, text: str) -> list[int]:
        """Token ids of a bare text."""
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def prompt(self, item: Item) -> list[int]:
        """Token ids up to and with the token that opens the answer."""
        special = self._special
        ids = [special[BOS]]
        if item.system is not None:
            ids += [special[SYSTEM], *self.text(item.system), special[END]]
        ids += [special[USER], *self.text(item.prompt), special[END], special[ASSISTANT]]
        return ids

    def answer(self, item: Item) -> list[int]:
        """Token ids of the answer with its end token."""
        return [*self.text(item.answer), self._special[END]]

    def batch(self, items: Sequence[Item]) -> Batch:
        """Items with their answers, as training tensors."""
        pairs = [(self.prompt(item), self.answer(item)) for item in items]
        return self.pack(pairs)

    def pack(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Prompt and answer ids, packed into rows longest first."""
        pairs = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1]))
        width = max(ROW_WIDTH, sum(map(len, pairs[0])))
        rows: list[list[tuple[list[int], list[int]]]] = []
        free: list[int] = []
        for pair in pairs:
            size = sum(map(len, pair))
            row = next((i for i, left in enumerate(free) if left >= size), None)
            if row is None:
                row = len(rows)
                rows.append([])
                free.append(width)
            rows[row].append(pair)
            free[row] -= size
        return self._tensors(rows, width)

    def _tensors(self, rows: Sequence[Sequence[tuple[list[int], list[int]]]], width: int) -> Batch:
        input_ids = torch.full((len(rows), width), self._pad)
        position_ids = torch.zeros_like(input_ids)
        owner = torch.full_like(input_ids, -1)
        is_answer = torch.zeros_like(input_ids, dtype=torch.bool)
        for r, row in enumerate(rows):
            start = 0
            for number, (prompt, answer) in enumerate(row):
                middle, end = start + len(prompt), start + len(prompt) + len(answer)
                input_ids[r, start:end] = torch.tensor(prompt + answer)
                position_ids[r, start:end] = torch.arange(end - start)
                owner[r, start:end] = number
                is_answer[r, middle:end] = True
                start = end
        same = owner[:, :, None] == owner[:, None, :]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        is_token = owner >= 0
        return Batch(
            input_ids,
            position_ids,
            (same & causal)[:, None],
            is_token,
            is_answer,
            is_token & (position_ids == 0),
        )
