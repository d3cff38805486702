"""Which prompts run together: a pure function of their lengths, fixed before a run starts.

Because the plan depends on nothing else, a run that was interrupted continues with the very same
batches, and routing (which depends a little on the batch at float precision) comes out the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_RUNNING: ContextVar[tuple[int, ...] | None] = ContextVar("running_prompts", default=None)


@contextmanager
def running_prompts(prompt_ids: Sequence[int]) -> Iterator[None]:
    """Say which prompts the forwards inside the block run, one a sequence, in order."""
    token = _RUNNING.set(tuple(prompt_ids))
    try:
        yield
    finally:
        _RUNNING.reset(token)


def prompts_running() -> tuple[int, ...] | None:
    """The prompts of the forwards that run now, or None where nobody said."""
    return _RUNNING.get()


@dataclass(frozen=True)
class PlannedBatch:
    """Prompts that run in one forward, by their index into the list that was planned."""

    index: int
    members: tuple[int, ...]


def plan_batches(
    lengths: Sequence[int], *, tokens_per_batch: int, extra_tokens: int = 0
) -> list[PlannedBatch]:
    """Group prompts of similar length under a budget of padded tokens.

    Args:
        lengths: prompt tokens of each prompt.
        tokens_per_batch: the padded tokens (rows times the longest row) a batch may hold; a
            prompt longer than that gets a batch of its own.
        extra_tokens: tokens each row may grow by (answers).

    Returns:
        Batches that cover every prompt once, longest prompts first, so that memory runs out at
        the start of a run rather than at its end.
    """
    if tokens_per_batch < 1:
        raise ValueError("tokens_per_batch must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    width = 0
    for index in order:
        if not groups or (len(groups[-1]) + 1) * width > tokens_per_batch:
            groups.append([])
            width = lengths[index] + extra_tokens
        groups[-1].append(index)
    return [PlannedBatch(index, tuple(group)) for index, group in enumerate(groups)]
