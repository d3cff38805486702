"""Decoding methods against direct transcriptions, token by token.

A transcription is a copy of the model whose routers were rewritten by hand, one prompt at a time,
without padding, without cache, a full forward for every token. The product must write the same
tokens batched or not, with cache or without, and its scores must agree.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moescope.probe.generation import pad_left
from moescope.steering import SteeringPlan, steer
from moescope.steering.contrast_decoding import SelfContrast, contrasting
from moescope.steering.remix import Remix, remix
from moescope.steering.remix_store import References

FAMILIES = ("mixtral", "olmoe")  # renormalized, and not
PROMPTS = ([7, 91, 33, 120, 5], [201, 14], [66, 8, 140, 9, 77, 31, 210, 54])
NUM_NEW = 4
PAD = 257

#: Probabilities [T, E] of one layer -> weights and ids [T, K'] before renormalization.
Choose = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    return tiny_model(request.param, eos_token_id=None)


def normalizes(model: Any) -> bool:
    return bool(getattr(model.config, "norm_topk_prob", True))


def rerouted(model: Any, choose: Choose) -> Any:
    """A copy whose routers choose as told."""
    other = copy.deepcopy(model)
    for layer, block in enumerate(other.model.layers):

        def forward(self: Any, hidden: Tensor, layer: int = layer) -> tuple[Tensor, ...]:
            logits = functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
            weights, ids = choose(layer, torch.softmax(logits.float(), -1))
            if normalizes(model):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, ids

        block.mlp.gate.forward = types.MethodType(forward, block.mlp.gate)
    return other


def next_scores(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    return found


def written(prompt: Sequence[int], scores: Callable[[list[int]], Tensor]) -> tuple[list[int], Any]:
    """Greedy tokens and the scores of each."""
    ids, kept = list(prompt), []
    for _ in range(NUM_NEW):
        kept.append(scores(ids))
        ids.append(int(kept[-1].argmax()))
    return ids[len(prompt) :], torch.stack(kept)


def generate(model: Any, prompts: Sequence[Sequence[int]], use_cache: bool) -> list[Any]:
    """Greedy tokens and processed scores of each prompt, from one padded batch."""
    batch = pad_left(prompts, PAD)
    found = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
        max_new_tokens=NUM_NEW, use_cache=use_cache, pad_token_id=PAD,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = found.sequences[:, batch.input_ids.shape[1] :].tolist()
    return list(zip(new, torch.stack(found.scores, dim=1), strict=True))


def batches(batched: bool) -> list[list[int]]:
    return [[0, 1, 2]] if batched else [[0], [1], [2]]


def require_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert torch.equal(found[1].isinf(), expected[1].isinf())
    assert torch.allclose(found[1], expected[1], atol=2e-4, rtol=1e-4)


WAYS = pytest.mark.parametrize("batched", [True, False], ids=["batched", "alone"])
CACHE = pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])


# Self-contrast: strong, the model; weak, its rank-r expert alone.


def of_rank(rank: int, own_weight: bool) -> Choose:
    def choose(_layer: int, probs: Tensor) -> tuple[Tensor, Tensor]:
        best = probs.argsort(dim=-1, descending=True)[:, rank : rank + 1]
        return (probs.gather(1, best) if own_weight else torch.ones_like(best).float()), best

    return choose


@pytest.fixture(scope="module")
def contrasted(model: Any) -> Any:
    weak = rerouted(model, of_rank(2, own_weight=False))

    def scores(ids: list[int]) -> Tensor:
        z_strong, z_weak = next_scores(model, ids), next_scores(weak, ids)
        found = 1.5 * z_strong - 0.5 * z_weak
        found[z_strong < z_strong.max() + math.log(0.1)] = -math.inf
        return found

    return [written(prompt, scores) for prompt in PROMPTS]


@WAYS
@CACHE
def test_self_contrast_writes_what_two_full_forwards_write(
    model: Any, contrasted: Any, batched: bool, use_cache: bool
) -> None:
    for members in batches(batched):
        with contrasting(model, use_cache=use_cache):
            found = generate(model, [PROMPTS[at] for at in members], use_cache)
        for one, at in zip(found, members, strict=True):
            require_same(one, contrasted[at])


def test_self_contrast_is_not_the_models_own_decoding(model: Any, contrasted: Any) -> None:
    own = generate(model, PROMPTS, use_cache=True)
    assert [tokens for tokens, _ in own] != [tokens for tokens, _ in contrasted]


@pytest.mark.parametrize("rank", [0, 5])
def test_other_ranks_with_the_familys_own_weight(model: Any, rank: int) -> None:
    weak = rerouted(model, of_rank(rank, own_weight=True))

    def scores(ids: list[int]) -> Tensor:
        z_strong, z_weak = next_scores(model, ids), next_scores(weak, ids)
        found = 2.0 * z_strong - z_weak
        found[z_strong < z_strong.max() + math.log(0.5)] = -math.inf
        return found

    settings = SelfContrast(rank=rank, alpha=0.5, beta=1.0, weight="own")
    with contrasting(model, settings):
        found = generate(model, PROMPTS, use_cache=True)
    for one, prompt in zip(found, PROMPTS, strict=True):
        require_same(one, written(prompt, scores))


# Re-mixing: fixed scores before top-k, from the last prompt token on.

TEXTS = ("north", "east", "south")
VECTORS = {"north": [0.0, 1.0], "east": [1.0, 0.1], "south": [0.6, 0.8]}
STORED = {"one": [1.0, 0.0], "two": [0.9, 0.2], "three": [0.1, 1.0], "four": [0.7, 0.7]}


def references() -> References:
    made = torch.Generator().manual_seed(5)
    vectors = VECTORS | STORED
    return References(
        keys=tuple(STORED),
        embeddings=functional.normalize(torch.tensor(list(STORED.values())), dim=1),
        scores={at: (2 * torch.randn(4, 8, generator=made)).softmax(-1) for at in range(3)},
        embed=lambda text: torch.tensor(vectors[text]),
    )


def neighbours_mean(text: str, layer: int) -> Tensor:
    """The similarity-weighted mean of the three nearest, by a loop."""
    stored = references().scores[layer]
    near = []
    for at, name in enumerate(STORED):
        a, b = VECTORS[text], STORED[name]
        near.append((sum(x * y for x, y in zip(a, b, strict=True))
                     / math.hypot(*a) / math.hypot(*b), at))  # fmt: skip
    near = sorted(near, reverse=True)[:3]
    total = sum(similarity for similarity, _ in near)
    found = torch.zeros(8)
    for similarity, at in near:
        found += similarity / total * stored[at]
    return found


def remixed_model(model: Any, text: str, first_row: int, mix: float, core: int | None) -> Any:
    def choose(layer: int, probs: Tensor) -> tuple[Tensor, Tensor]:
        probs = probs.clone()
        if layer >= 1:  # the last two of three layers
            for row in range(first_row, len(probs)):
                new = mix * neighbours_mean(text, layer) + (1 - mix) * probs[row]
                for expert in probs[row].argsort(descending=True)[:core].tolist():
                    probs[row, expert] = new[expert]
        best = probs.topk(2, dim=-1)
        return best.values, best.indices

    return rerouted(model, choose)


@pytest.fixture(scope="module", params=[(1.0, None), (0.6, 4)], ids=["released", "mixed-core"])
def remixed(model: Any, request: pytest.FixtureRequest) -> Any:
    mix, core = request.param
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        other = remixed_model(model, text, len(prompt) - 1, mix, core)
        expected.append(written(prompt, lambda ids, other=other: next_scores(other, ids)))
    return Remix(mix=mix, core_experts=core, num_layers=2), expected


@WAYS
@CACHE
def test_remixing_writes_what_rewritten_routers_write(
    model: Any, remixed: Any, batched: bool, use_cache: bool
) -> None:
    settings, expected = remixed
    for members in batches(batched):
        with remix(model, references(), [TEXTS[at] for at in members], settings) as report:
            found = generate(model, [PROMPTS[at] for at in members], use_cache)
        for one, at in zip(found, members, strict=True):
            require_same(one, expected[at])
        assert report.share == 1.0
    own = generate(model, PROMPTS, use_cache=True)
    assert [tokens for tokens, _ in own] != [tokens for tokens, _ in expected]


# Dynamic top-p (arXiv 2403.07652): the smallest prefix whose sum exceeds p; the plan's action.


def smallest_prefix(p: float) -> Choose:
    def choose(_layer: int, probs: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = probs.sort(dim=-1, descending=True)
        weights = weights.clone()
        for row in weights:
            total = 0.0
            for rank, one in enumerate(row.tolist()):
                total += one
                if total > p:
                    row[rank + 1 :] = 0.0  # not renormalized, unless the family does
                    break
        return weights, ids

    return choose


@pytest.fixture(scope="module", params=[0.4, 0.9])
def prefixed(model: Any, request: pytest.FixtureRequest) -> Any:
    other = rerouted(model, smallest_prefix(request.param))
    return request.param, [written(one, lambda ids: next_scores(other, ids)) for one in PROMPTS]


@WAYS
@CACHE
def test_top_p_writes_what_the_smallest_prefix_writes(
    model: Any, prefixed: Any, batched: bool, use_cache: bool
) -> None:
    p, expected = prefixed
    plan = SteeringPlan(interventions=[{"action": "top_p", "layers": [0, 1, 2], "value": p}])
    for members in batches(batched):
        with steer(model, plan) as report:
            found = generate(model, [PROMPTS[at] for at in members], use_cache)
        assert report.share == 1.0
        for one, at in zip(found, members, strict=True):
            require_same(one, expected[at])
