"""Stage two: which experts are tuned, and training that changes nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moescope.probe.demo.batches import Encoder
from moescope.probe.demo.corpus import Corpus, Item, batch_items
from moescope.probe.demo.routing import counted_usage, routers

#: Tuned experts by layer.
ExpertPlan = dict[int, list[int]]


def usage_rates(
    model: PreTrainedModel, encoder: Encoder, corpus: Corpus, *, num_batches: int
) -> tuple[Tensor, Tensor]:
    """Share of tokens that use each expert, on refused and on other training items of stage two.

    Tokens of prompt and answer alike (the token score of ESFT, arXiv 2407.01906, section 3.2, but
    not divided by K).

    Returns:
        `(refused_LE, other_LE)`, float64, each row summing to K.
    """
    items = [
        item for step in range(num_batches) for item in batch_items(corpus, 2, 1_000_000 + step, 64)
    ]
    return (
        _rates(model, encoder, [item for item in items if item.refused]),
        _rates(model, encoder, [item for item in items if not item.refused]),
    )


def _rates(model: PreTrainedModel, encoder: Encoder, items: Sequence[Item]) -> Tensor:
    counts_LE = torch.zeros(len(routers(model)), model.config.num_experts, dtype=torch.float64)
    num_tokens = 0
    is_token: list[Tensor] = []
    with torch.inference_mode(), counted_usage(model, counts_LE, is_token):
        for start in range(0, len(items), 64):
            batch = encoder.batch(items[start : start + 64])
            is_token[:] = [batch.is_token.flatten()]
            num_tokens += int(batch.is_token.sum())
            model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
    return counts_LE / num_tokens


def most_different(difference_LE: Tensor, *, count: int, per_layer: int) -> ExpertPlan:
    """The experts with the largest difference, at most `per_layer` in a layer."""
    num_experts = difference_LE.shape[1]
    plan: ExpertPlan = {}
    for index in torch.argsort(difference_LE.flatten(), descending=True, stable=True).tolist():
        layer, expert = divmod(index, num_experts)
        if len(plan.get(layer, [])) < per_layer:
            plan.setdefault(layer, []).append(expert)
        if sum(map(len, plan.values())) == count:
            break
    return {layer: sorted(plan[layer]) for layer in sorted(plan)}


def drawn_at_random(usage_LE: Tensor, counts: Mapping[int, int], *, seed: int) -> ExpertPlan:
    """As many experts per layer as `counts` says, drawn among those above the median load."""
    rng = random.Random(seed)
    plan: ExpertPlan = {}
    for layer, count in sorted(counts.items()):
        median = usage_LE[layer].median()
        pool = [e for e in range(usage_LE.shape[1]) if usage_LE[layer, e] > median]
        plan[layer] = sorted(rng.sample(pool, count))
    return plan


@contextmanager
def only_tuned(model: PreTrainedModel, plan: ExpertPlan) -> Iterator[None]:
    """Let gradients reach the plan's experts and their router rows alone while the block runs.

    Everything else is frozen; in the tensors that hold many experts the gradient of the others is
    set to zero, so that an optimizer without weight decay leaves them as they are to the bit.
    """
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    handles = []
    model.requires_grad_(False)
    try:
        for layer, experts in plan.items():
            block = model.model.layers[layer].mlp
            for parameter in (
                block.gate.weight,
                block.experts.gate_up_proj,
                block.experts.down_proj,
            ):
                shape = [parameter.shape[0], *[1] * (parameter.dim() - 1)]
                keep = torch.zeros(parameter.shape[0])
                keep[experts] = 1.0
                parameter.requires_grad_(True)
                handles.append(parameter.register_hook(_times(keep.reshape(shape))))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])


def _times(keep: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * keep
