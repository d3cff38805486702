"""Which tokens the rows of a router are: padding, and text or image, as far as a model was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Names under which a stack or the model around it is told each token's modality; Ernie's own
#: counts the marks around an image to the image, as its routers do.
_MODALITY = ("moe_mm_token_type_ids", "mm_token_type_ids")


class RowTokens(NamedTuple):
    """What is known of T rows; each None where it is not.

    Attributes:
        is_token: bool[T], false on padding.
        modality: int8[T], as processors count: 0 text, 1 image, 2 video, 3 audio.
        token_index: int64[T], which tokens of the [batch, length] input they are, row-major; None
            where they are all of them in order.
    """

    is_token: Tensor | None = None
    modality: Tensor | None = None
    token_index: Tensor | None = None


@dataclass(frozen=True)
class StackInput:
    """What a list of layers was called with.

    Attributes:
        shape: batch and length.
        is_token: bool[batch * length], false on padding; None where that cannot be told.
        modality: int8[batch * length], or None.
    """

    shape: tuple[int, int]
    is_token: Tensor | None
    modality: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Batch times length."""
        return self.shape[0] * self.shape[1]

    def of_rows(self, num_rows: int) -> RowTokens:
        """Which tokens so many rows are: all of them, or those of text."""
        if num_rows == self.num_tokens:
            return RowTokens(self.is_token, self.modality)
        if self.modality is None:
            return RowTokens()
        text = (self.modality == 0).nonzero()[:, 0]
        if len(text) != num_rows:
            return RowTokens()
        is_token = None if self.is_token is None else self.is_token[text]
        return RowTokens(is_token, self.modality[text], text)


def stack_input(named: Mapping[str, Any], outer: Mapping[str, Any]) -> StackInput | None:
    """Read a stack's input by the names that transformers uses.

    Args:
        named: the arguments of the stack.
        outer: those of the model around it, for what it is told alone.
    """
    for name, num_dims in (("input_ids", 2), ("inputs_embeds", 3)):
        given = named.get(name)
        if isinstance(given, Tensor) and given.dim() == num_dims:
            is_token = _last_columns(named.get("attention_mask"), given)
            if named.get("attention_mask") is None:
                is_token = torch.ones(given.shape[:2], device=given.device).reshape(-1)
            modality = next(
                (
                    found
                    for arguments in (named, outer)
                    for label in _MODALITY
                    if (found := _last_columns(arguments.get(label), given)) is not None
                ),
                None,
            )
            return StackInput(
                (given.shape[0], given.shape[1]),
                None if is_token is None else is_token != 0,
                None if modality is None else modality.to(torch.int8),
            )
    return None


def _last_columns(mask: Any, given: Tensor) -> Tensor | None:
    """[batch * length]: the last columns of a mask [batch, past + length], those of this input.

    Masks of another form (4-D, by blocks) are not read.
    """
    batch, length = given.shape[0], given.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.shape[0] != batch or mask.shape[1] < length:
        return None
    return mask[:, mask.shape[1] - length :].reshape(-1)
