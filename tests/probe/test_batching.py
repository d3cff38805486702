"""The batch plan: every prompt once, within the budget, the same every time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moescope.probe.batching import plan_batches


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    budget=st.integers(1, 300), extra=st.integers(0, 10),
)  # fmt: skip
def test_every_prompt_once_and_within_the_budget(
    lengths: list[int], budget: int, extra: int
) -> None:
    batches = plan_batches(lengths, tokens_per_batch=budget, extra_tokens=extra)
    members = [index for batch in batches for index in batch.members]
    assert sorted(members) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[index] for index in batch.members) + extra
        assert len(batch.members) == 1 or width * len(batch.members) <= budget
    assert batches == plan_batches(lengths, tokens_per_batch=budget, extra_tokens=extra)


def test_longest_first() -> None:
    batches = plan_batches([3, 9, 9, 1], tokens_per_batch=18)
    assert [batch.members for batch in batches] == [(1, 2), (0, 3)]
