"""Which tokens a scope covers, in every way a model can be called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moescope.probe.errors import MoescopeError
from moescope.steering.plan import FirstGenerated, TokenScope
from moescope.steering.positions import (
    PositionTracker,
    TokenPositions,
    answers_begin_at,
    prompts_known_in_generate,
)

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
IDS = torch.tensor([[257, 257, 5, 6, 7], [1, 2, 3, 4, 5]])


def rows(positions: TokenPositions, scope: TokenScope) -> list[list[int]]:
    """The columns in scope, sequence by sequence."""
    found = positions.rows(scope)
    if isinstance(found, bool):
        found = torch.full((positions.num_rows,), found)
    return [row.nonzero().flatten().tolist() for row in found.view(positions.num_sequences, -1)]


@contextmanager
def followed(model: Any) -> Iterator[list[TokenPositions]]:
    """The positions of every forward in the block."""
    tracker = PositionTracker(model)
    seen: list[TokenPositions] = []

    def keep(*_: Any) -> None:
        assert tracker.current is not None
        seen.append(tracker.current)

    with ExitStack() as stack:
        for handle in (
            model.register_forward_pre_hook(tracker.before_forward, with_kwargs=True),
            model.register_forward_pre_hook(keep),
            model.register_forward_hook(tracker.after_forward, always_call=True),
        ):
            stack.callback(handle.remove)
        stack.enter_context(prompts_known_in_generate(model))
        yield seen
        assert tracker.current is None


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model("qwen3_moe", eos_token_id=None)


def generate(model: Any, **options: Any) -> list[TokenPositions]:
    given = {"input_ids": IDS, "attention_mask": LEFT, "do_sample": False, "max_new_tokens": 4}
    with followed(model) as seen, torch.no_grad():
        model.generate(**(given | {"pad_token_id": 257} | options))
    return seen


SCOPES: list[TokenScope] = ["prompt", "last_prompt", "generated", FirstGenerated(first_generated=2)]


def test_generate_with_a_cache_is_one_prefill_and_single_steps(model: Any) -> None:
    prefill, *steps = generate(model)
    assert [rows(prefill, scope) for scope in SCOPES] == [
        [[2, 3, 4], [0, 1, 2, 3, 4]], [[4], [4]], [[], []], [[], []],
    ]  # fmt: skip
    assert prefill.rows("all") is True
    assert prefill.rows("generated") is False
    assert [[rows(step, scope) for scope in SCOPES] for step in steps] == [
        [[[], []], [[], []], [[0], [0]], [[0], [0]]],
        [[[], []], [[], []], [[0], [0]], [[0], [0]]],
        [[[], []], [[], []], [[0], [0]], [[], []]],
    ]
    real = prefill.real_rows()
    assert real is not None
    assert real.view(2, 5).tolist() == LEFT.bool().tolist()


def test_generate_without_a_cache_runs_the_whole_sequence_each_time(model: Any) -> None:
    seen = generate(model, use_cache=False)
    assert [one.num_columns for one in seen] == [5, 6, 7, 8]
    assert [rows(seen[3], scope) for scope in SCOPES] == [
        [[2, 3, 4], [0, 1, 2, 3, 4]], [[4], [4]], [[5, 6, 7], [5, 6, 7]], [[5, 6], [5, 6]],
    ]  # fmt: skip


def test_a_prefill_in_chunks_is_all_prompt(model: Any) -> None:
    seen = generate(model, prefill_chunk_size=2)
    assert [(one.first_column, one.num_columns) for one in seen[:3]] == [(0, 2), (2, 2), (4, 1)]
    assert [rows(one, "prompt") for one in seen[:3]] == [[[], [0, 1]], [[0, 1], [0, 1]], [[0], [0]]]
    assert [rows(one, "last_prompt") for one in seen[:3]] == [[[], []], [[], []], [[0], [0]]]
    assert all(one.rows("generated") is False for one in seen[:3])
    assert [rows(one, "generated") for one in seen[3:]] == 3 * [[[0], [0]]]


def test_a_static_cache_gives_a_mask_of_four_dimensions(model: Any) -> None:
    prefill, *steps = generate(model, cache_implementation="static", disable_compile=True)
    assert rows(prefill, "prompt") == [[2, 3, 4], [0, 1, 2, 3, 4]]
    assert [rows(one, "generated") for one in steps] == 3 * [[[0], [0]]]


def test_beams_and_several_answers_repeat_each_prompt(model: Any) -> None:
    prefill, *_ = generate(model, num_beams=2)
    assert rows(prefill, "prompt") == 2 * [[2, 3, 4]] + 2 * [[0, 1, 2, 3, 4]]
    prefill, *_ = generate(model, do_sample=True, num_return_sequences=2)
    assert rows(prefill, "last_prompt") == 4 * [[4]]


def test_generate_knows_its_prompt_however_it_is_given(model: Any) -> None:
    for given in ({"inputs": IDS}, {"inputs_embeds": model.get_input_embeddings()(IDS)}):
        prefill, *steps = generate(model, input_ids=None, **given)
        assert rows(prefill, "prompt") == [[2, 3, 4], [0, 1, 2, 3, 4]]
        assert rows(steps[0], "generated") == [[0], [0]]
    with followed(model) as seen:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert rows(seen[1], "generated") == [[0], [0]]


def forward(model: Any, **given: Any) -> tuple[TokenPositions, Any]:
    with followed(model) as seen, torch.no_grad():
        output = model(**given)
    return seen[0], output


def test_a_plain_forward_is_all_prompt_with_padding_on_either_side(model: Any) -> None:
    positions, _ = forward(model, input_ids=IDS)
    assert positions.real_rows() is None
    assert rows(positions, "prompt") == 2 * [[0, 1, 2, 3, 4]]
    right = LEFT.flip(-1)
    positions, _ = forward(model, input_ids=IDS, attention_mask=right)
    assert rows(positions, "prompt") == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert rows(positions, "last_prompt") == [[2], [4]]
    assert positions.rows("generated") is False


def test_decoding_by_hand_counts_from_where_the_cache_was_first_filled(model: Any) -> None:
    with followed(model) as seen, torch.no_grad():
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        for ids in (IDS, IDS[:, :1], IDS[:, :2]):
            model(input_ids=ids, past_key_values=cache)
        model(input_ids=IDS)
    first = FirstGenerated(first_generated=2)
    assert [rows(one, "prompt") for one in seen[:3]] == [2 * [[0, 1, 2, 3, 4]], [[], []], [[], []]]
    assert [rows(one, first) for one in seen[:3]] == [[[], []], [[0], [0]], [[0], [0]]]
    assert rows(seen[3], "prompt") == 2 * [[0, 1, 2, 3, 4]]
    positions, _ = forward(model, input_ids=IDS[:, :2], past_key_values=cache)
    assert rows(positions, "generated") == [[0, 1], [0, 1]]


def test_teacher_forcing_says_where_answers_begin(model: Any) -> None:
    with answers_begin_at(torch.tensor([4, 3])):
        positions, _ = forward(model, input_ids=IDS, attention_mask=LEFT)
    assert [rows(positions, scope) for scope in SCOPES] == [
        [[2, 3], [0, 1, 2]], [[3], [2]], [[4], [3, 4]], [[4], [3, 4]],
    ]  # fmt: skip
    positions, _ = forward(model, input_ids=IDS, attention_mask=LEFT)
    assert rows(positions, "generated") == [[], []]


def test_what_cannot_be_told_is_refused(model: Any) -> None:
    tracker = PositionTracker(model)
    with pytest.raises(MoescopeError, match="a object does not tell how many tokens it holds"):
        tracker.before_forward(model, (), {"input_ids": IDS, "past_key_values": object()})
    with pytest.raises(MoescopeError, match="needs input_ids or inputs_embeds"):
        tracker.before_forward(model, (), {})


def test_generate_is_left_as_it_was(model: Any) -> None:
    assert "generate" not in model.__dict__
    with pytest.raises(RuntimeError, match="stop"), prompts_known_in_generate(model):
        assert "generate" in model.__dict__
        raise RuntimeError("stop")
    assert "generate" not in model.__dict__
    own = model.generate
    model.generate = own
    with prompts_known_in_generate(model), prompts_known_in_generate(model):
        assert model.generate is not own
    assert model.__dict__.pop("generate") is own


def test_masks_of_other_shapes_are_taken_as_unknown() -> None:
    from moescope.steering.positions import _real_tokens

    def known(mask: Any, first: int = 0, columns: int = 3) -> Tensor | None:
        return _real_tokens(mask, first, columns)

    assert known(None) is None
    assert known(torch.ones(2, 2)) is None
    assert known(torch.ones(2, 3, 3)) is None
    wide = known(torch.tensor([[1, 1, 0, 1, 1]]), first=1, columns=2)
    assert wide is not None
    assert wide.tolist() == [[True, False]]
    floats = torch.zeros(1, 1, 3, 5).masked_fill(torch.triu(torch.ones(3, 5), 3).bool(), -1e9)
    floats[0, 0, 0] = -1e9
    found = known(floats, first=2)
    assert found is not None
    assert found.tolist() == [[False, True, True]]
    found = known({"full": floats}, first=2)
    assert found is not None
