"""Batched generation with padding against the same prompts alone, on the same tokens.

Routing at float precision depends a little on the shape of the batch: a different id is allowed
where the scores of the two experts are within 1e-5 (counted), weights within 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moescope.probe.recording import Trace, record
from moescope.probe.routers import LayerInfo
from moescope.probe.scores import ranking_scores
from moescope.probe.zoo import tiny_model
from moescope.probe.zoo.recipes import RECIPES
from moescope.probe.zoo.wholes import WHOLES

pytestmark = pytest.mark.families

TOLERANCE = 1e-5
NEW_TOKENS = 5
PROMPT_LENGTHS = (4, 9, 6)

#: Models whose own logits depend on padding, so that their routing does too: sparse attention that
#: counts padding among its best or compressed tokens, scans that run over it, and Doge, which
#: mixes the scores of different tokens.
PADDING_MATTERS = [
    "axk2", "deepseek_v32", "deepseek_v4", "doge", "dots3_note", "minimax_m3_vl", "nemotron_h",
    "qwen3_5_moe", "qwen3_omni_moe+whole",
]  # fmt: skip
GENERATING = [name for name, one in RECIPES.items() if one.model_class.endswith("ForCausalLM")]
WHOLE = [f"{name}+whole" for name in WHOLES if name not in GENERATING]
FAMILIES = [name for name in GENERATING + WHOLE if name not in PADDING_MATTERS]


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, 128, (length,), generator=generator) for length in PROMPT_LENGTHS]


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask int64[B, S], zeros on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    return ids, mask.long()


def by_sequence(trace: Trace, info: LayerInfo) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, S, K], weights [B, S, K] and logits [B, S, E] over all forwards of a trace."""
    parts: list[list[Tensor]] = [[], [], []]
    for forward in trace.forwards:
        rows, shape = forward.rows[info.module], forward.shapes[info.module]
        assert rows.logits is not None
        for found, tensor in zip(parts, (rows.expert_ids, rows.weights, rows.logits), strict=True):
            found.append(tensor.view(*shape, -1))
    ids, weights, logits = (torch.cat(found, dim=1) for found in parts)
    return ids.long(), weights, logits


def dense(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Weights [S, E] by expert, so that the order of slots does not matter."""
    return torch.zeros(*ids.shape[:-1], num_experts).scatter_add(-1, ids, weights)


def compare_layer(
    batched: tuple[Any, ...], alone: tuple[Any, ...], info: LayerInfo, bias: Any
) -> int:
    """How many tokens have other ids, each within the tolerance; raises where one is not."""
    (ids_b, weights_b, _), (ids_a, weights_a, logits_a) = batched, alone
    same = (ids_b.sort(-1).values == ids_a.sort(-1).values).all(-1)
    gap = dense(ids_b, weights_b, info.num_experts) - dense(ids_a, weights_a, info.num_experts)
    assert float(gap[same].abs().max()) <= TOLERANCE, info.module
    scores = ranking_scores(logits_a, info.rule, bias)
    for token in (~same).nonzero()[:, 0].tolist():
        assert scores is not None, "ids from a table cannot differ"
        other = set(ids_b[token].tolist()) ^ set(ids_a[token].tolist())
        swapped = scores[token, sorted(other)]
        assert float(swapped.max() - swapped.min()) <= TOLERANCE, (info.module, token)
    return int((~same).sum())


def padded_generate(model: Any, rows: list[Tensor], **options: Any) -> Any:
    """Greedy generation of a left-padded batch."""
    ids, mask = left_padded(rows)
    return model.generate(
        ids, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=None,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options,
    )  # fmt: skip


def test_many_families_are_compared() -> None:
    assert len(FAMILIES) > 50 and len(FAMILIES) == len(set(FAMILIES))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_routes_like_its_prompts_alone(family: str) -> None:
    model: Any = tiny_model(family).model
    rows = prompts()
    with record(model) as trace:
        generated = padded_generate(model, rows)
    longest = max(PROMPT_LENGTHS)
    assert generated.shape == (len(rows), longest + NEW_TOKENS)
    swapped = tokens = 0
    for number, row in enumerate(rows):
        answer = generated[number, longest:-1]
        with record(model) as alone, torch.no_grad():
            model(input_ids=torch.cat([row, answer])[None])
        assert alone.layers, family
        for info in alone.layers:
            batched = tuple(one[number, longest - len(row) :] for one in by_sequence(trace, info))
            single = tuple(one[0] for one in by_sequence(alone, info))
            found = compare_layer(batched, single, info, alone[info.layer, info.kind].bias)
            swapped, tokens = swapped + found, tokens + len(single[0])
    assert tokens == sum(PROMPT_LENGTHS) * len(trace.layers) + 3 * (NEW_TOKENS - 1) * len(
        trace.layers
    )
    assert swapped <= tokens // 100, f"{swapped} of {tokens} tokens have another expert"


@pytest.mark.parametrize("family", PADDING_MATTERS)
def test_where_padding_changes_the_model_itself(family: str) -> None:
    model: Any = tiny_model(family).model
    rows = prompts()
    found = padded_generate(model, rows, output_logits=True, return_dict_in_generate=True)
    gaps = []
    for number, row in enumerate(rows):
        answer = found.sequences[number, max(PROMPT_LENGTHS) : -1]
        with torch.no_grad():
            alone = model(input_ids=torch.cat([row, answer])[None]).logits[0, len(row) - 1 :]
        batched = torch.stack([logits[number] for logits in found.logits])
        gaps.append(float((alone - batched).abs().max()))
    assert max(gaps) > 1e-4, "padding no longer matters: compare the routing of this family too"
