"""Forms: what is written is what is read again and what reaches the experts, family by family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moescope.probe.errors import MoescopeError
from moescope.probe.routers import RouterOutput, RouterSite, find_routers
from moescope.probe.zoo import TinyModel, families, tiny_model
from moescope.probe.zoo.capture import without_weights

pytestmark = pytest.mark.families

RECORD_ONLY = ("doge", "nllb_moe")
ROWS = [
    row
    for family in families()
    for row in family.rows
    if family.name not in RECORD_ONLY and "whole" not in row
]

#: Rows whose families select one expert a token.
TOP_1 = ("llama4", "switch_transformers", "switch_transformers+capacity3", "zaya")


@cache
def built(row: str) -> TinyModel:
    return tiny_model(row)


@dataclass
class Passage:
    """What passed one layer in one forward."""

    read: RouterOutput | None = None
    arrived: tuple[Tensor, Tensor] | None = None
    counted: Tensor | None = None


def output_of(tiny: TinyModel) -> Tensor:
    with torch.no_grad():
        found = tiny.model(**tiny.inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@contextmanager
def watching(sites: list[RouterSite]) -> Iterator[dict[str, Passage]]:
    passages = {site.info.module: Passage() for site in sites}
    with ExitStack() as stack:
        for site in sites:

            def on_router(_m: Any, args: Any, output: Any, site: RouterSite = site) -> None:
                passages[site.info.module].read = site.form.read(site, args, output)

            def on_experts(_m: Any, args: Any, kwargs: Any, site: RouterSite = site) -> None:
                passage = passages[site.info.module]
                passage.arrived = site.form.arrived(site, args, kwargs)
                passage.counted = site.form.counted(site, args, kwargs)

            stack.callback(site.router.register_forward_hook(on_router).remove)
            stack.callback(
                site.experts.register_forward_pre_hook(on_experts, with_kwargs=True).remove
            )
        yield passages


@contextmanager
def writing(
    sites: list[RouterSite], choose: Callable[[RouterOutput], tuple[Tensor, Tensor]]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Write another selection, made of what the router decided, on these layers."""
    written: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for site in sites:

            def hook(_m: Any, args: Any, output: Any, site: RouterSite = site) -> Any:
                weights, ids = choose(site.form.read(site, args, output))
                written[site.info.module] = (weights, ids)
                return site.form.write(site, args, output, weights, ids)

            stack.callback(site.router.register_forward_hook(hook, prepend=True).remove)
        yield written


def next_experts(found: RouterOutput) -> tuple[Tensor, Tensor]:
    """Every slot's neighbour, with weights that no router gives."""
    _, weights, ids = found
    slots = torch.linspace(0.2, 0.9, weights.numel(), device=weights.device).view(weights.shape)
    return slots.to(weights.dtype), (ids + 1) % 8


@pytest.mark.parametrize("row", ROWS)
def test_what_is_written_is_read_again_and_reaches_the_experts(row: str) -> None:
    tiny = built(row)
    sites = find_routers(tiny.model)
    before = output_of(tiny)
    with writing(sites, next_experts) as written, watching(sites) as seen:
        after = output_of(tiny)
    assert not torch.equal(before, after)
    assert torch.equal(output_of(tiny), before)
    for site in sites:
        weights, ids = written[site.info.module]
        passage = seen[site.info.module]
        assert passage.read is not None and passage.counted is not None
        used = passage.read.weights != 0
        if site.info.rule.capacity is None:
            assert used.all()
        assert torch.equal(passage.read.weights[used], weights[used])
        assert torch.equal(passage.read.expert_ids[used], ids[used])
        counts = torch.bincount(ids[used], minlength=site.info.num_experts)
        assert torch.equal(passage.counted, counts)
        if passage.arrived is not None:
            assert torch.equal(passage.arrived[0][used], ids[used])
            assert torch.equal(passage.arrived[1], passage.read.weights)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in TOP_1])
def test_fewer_experts_can_be_written_where_the_family_takes_them(row: str) -> None:
    tiny = built(row)
    sites = find_routers(tiny.model)
    fewer = sites[0].info.top_k - 1
    before = output_of(tiny)

    def choose(found: RouterOutput) -> tuple[Tensor, Tensor]:
        return found.weights[:, :fewer], found.expert_ids[:, :fewer]

    with writing(sites, choose), watching(sites) as seen:
        after = output_of(tiny)
    assert not torch.equal(before, after)
    for site in sites:
        passage = seen[site.info.module]
        assert passage.read is not None and passage.read.expert_ids.shape[1] == fewer
        if site.info.kind != "attention":
            assert passage.counted is not None
            assert int(passage.counted.sum()) == passage.read.expert_ids.numel()


def test_forms_that_take_only_some_numbers_say_so() -> None:
    def more(found: RouterOutput) -> tuple[Tensor, Tensor]:
        another = (found.expert_ids[:, :1] + 3) % 8
        return (
            torch.cat([found.weights, found.weights[:, :1]], 1),
            torch.cat([found.expert_ids, another], 1),
        )

    for row, words in (("switch_transformers", "one expert"), ("jetmoe", "at most 2 experts")):
        tiny = built(row)
        before = output_of(tiny)
        with writing(find_routers(tiny.model), more), pytest.raises(MoescopeError, match=words):
            output_of(tiny)
        assert torch.equal(output_of(tiny), before)


def test_longcat_gets_a_second_slot_without_weight_beside_one_expert() -> None:
    tiny = built("longcat_flash")
    sites = find_routers(tiny.model)
    with (
        writing(sites, lambda found: (found.weights[:, :1], found.expert_ids[:, :1])) as written,
        watching(sites) as seen,
    ):
        output_of(tiny)
    for site in sites:
        (weights, ids), passage = written[site.info.module], seen[site.info.module]
        assert passage.arrived is not None and passage.counted is not None
        assert torch.equal(passage.arrived[0], ids.expand(-1, 2))
        assert torch.equal(passage.arrived[1], torch.cat([weights, torch.zeros_like(weights)], 1))
        assert int(passage.counted.sum()) == len(ids)


def test_jetmoe_rows_of_each_expert_are_the_tokens_that_chose_it() -> None:
    """Independent of the form: rows at the experts' input are matched with the block's input."""
    tiny = built("jetmoe")
    sites = [site for site in find_routers(tiny.model) if site.info.kind == "mlp"]
    for site in sites:
        caught: dict[str, Any] = {}
        with ExitStack() as stack:
            stack.callback(
                site.block.register_forward_pre_hook(
                    lambda _m, args, c=caught: c.update(hidden=args[0].flatten(0, 1))
                ).remove
            )
            stack.callback(
                site.experts.register_forward_pre_hook(
                    lambda _m, args, c=caught: c.update(rows=args[0], sizes=args[1])
                ).remove
            )
            seen = stack.enter_context(watching([site]))
            output_of(tiny)
        read = seen[site.info.module].read
        assert read is not None
        parts = caught["rows"].split(caught["sizes"])
        for expert, part in enumerate(parts):
            matches = (part[:, None] == caught["hidden"][None]).all(-1)
            tokens = matches.any(0).nonzero()[:, 0]
            chose = (read.expert_ids == expert).any(1).nonzero()[:, 0]
            assert torch.equal(tokens, chose)


def test_dbrx_is_itself_again_after_an_exception_between_router_and_selection() -> None:
    tiny = built("dbrx")
    (site, *_) = find_routers(tiny.model)
    before = output_of(tiny)

    def fail(_m: Any, _args: Any, _output: Any) -> None:
        raise RuntimeError("somebody else's hook")

    handle = site.router.register_forward_hook(fail)
    with writing([site], next_experts), pytest.raises(RuntimeError, match="somebody else"):
        output_of(tiny)
    handle.remove()
    assert torch.equal(output_of(tiny), before)
    assert "route_tokens_to_experts" not in site.block.__dict__


def test_switch_tokens_beyond_capacity_have_weight_0_and_reach_no_expert() -> None:
    tiny = built("switch_transformers+capacity3")
    sites = find_routers(tiny.model)
    outputs: dict[str, Any] = {}
    with ExitStack() as stack:
        for site in sites:
            stack.callback(
                site.router.register_forward_hook(
                    lambda _m, _a, output, name=site.info.module: outputs.update({name: output})
                ).remove
            )
        seen = stack.enter_context(watching(sites))
        output_of(tiny)
    for site in sites:
        one_hot, _, logits = outputs[site.info.module]
        dropped = one_hot.sum(-1).flatten() == 0
        assert dropped.any() and not dropped.all()
        passage = seen[site.info.module]
        assert passage.read is not None and passage.counted is not None
        assert torch.equal(passage.read.weights[:, 0] == 0, dropped)
        assert torch.equal(passage.read.expert_ids[:, 0], logits.flatten(0, 1).argmax(-1))
        assert int(passage.counted.max()) <= 3 * len(one_hot)
        assert int(passage.counted.sum()) == int((~dropped).sum())


def test_zaya_tokens_that_skip_are_not_credited_to_expert_0() -> None:
    tiny = built("zaya")
    sites = find_routers(tiny.model)
    skipped = 0
    with watching(sites) as seen:
        output_of(tiny)
    for site in sites:
        read = seen[site.info.module].read
        assert read is not None
        probabilities = read.logits.softmax(-1) + site.bias
        assert torch.equal(read.expert_ids[:, 0], probabilities.argmax(-1))
        assert torch.equal(read.expert_ids == 8, read.weights == 0)
        skipped += int((read.weights == 0).sum())
    assert skipped > 0


def test_llama4_weights_scale_what_the_experts_get() -> None:
    tiny = built("llama4+top2")
    for site in find_routers(tiny.model):
        caught: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, module in (("block", site.block), ("experts", site.experts)):
                stack.callback(
                    module.register_forward_pre_hook(
                        lambda _m, args, name=name, c=caught: c.update({name: args[0]})
                    ).remove
                )
            seen = stack.enter_context(watching([site]))
            output_of(tiny)
        read = seen[site.info.module].read
        assert read is not None
        hidden = caught["block"].flatten(0, 1)
        dense = torch.zeros(len(hidden), 8).scatter(1, read.expert_ids, read.weights)
        rows = caught["experts"].view(8, len(hidden), -1)
        assert torch.equal(rows, hidden[None] * dense.T[..., None])


def test_inkling_normalizes_written_experts_together_with_the_shared_one() -> None:
    tiny = built("inkling")
    for site in find_routers(tiny.model):
        router: Any = site.router
        caught: dict[str, Any] = {}

        def keep(_m: Any, args: Any, output: Any, caught: dict[str, Any] = caught) -> None:
            caught.update(hidden=args[0].flatten(0, 1), output=output)

        handle = site.router.register_forward_hook(keep)
        with writing([site], lambda found: (found.weights, (found.expert_ids + 1) % 8)):
            output_of(tiny)
        handle.remove()
        logits, _, ids, gammas = caught["output"]
        with torch.no_grad():
            shared = torch.sigmoid(caught["hidden"].double() @ router.weight[8:].double().T)
            chosen = logits.double().gather(1, ids).sigmoid().sum(1, keepdim=True)
            total = router.route_scale * float(router.global_scale)
            expected = total * shared / (chosen + shared.sum(1, keepdim=True))
        torch.testing.assert_close(gammas.double(), expected, rtol=1e-5, atol=1e-6)


def test_hash_layers_follow_their_table() -> None:
    tiny = built("deepseek_v4+hash")
    sites = [site for site in find_routers(tiny.model) if site.info.rule.from_table]
    assert len(sites) == 2
    with watching(sites) as seen:
        output_of(tiny)
    tokens = tiny.inputs["input_ids"].flatten()
    for site in sites:
        read = seen[site.info.module].read
        assert read is not None
        assert torch.equal(read.expert_ids, site.router.tid2eid[tokens])


def test_doge_is_recorded_as_its_block_computes() -> None:
    """Ids and weights as recorded, put into the block's arithmetic, give its output to the bit."""
    tiny = built("doge")
    for site in find_routers(tiny.model):
        block: Any = site.block
        caught: dict[str, Tensor] = {}
        handles = [
            block.register_forward_pre_hook(lambda _m, args, c=caught: c.update(hidden=args[0])),
            block.register_forward_hook(lambda _m, _a, output, c=caught: c.update(out=output[0])),
        ]
        with watching([site]) as seen:
            output_of(tiny)
        for handle in handles:
            handle.remove()
        read, hidden = seen[site.info.module].read, caught["hidden"]
        assert read is not None
        flat = hidden.flatten(0, 1)
        with torch.no_grad():
            inner = torch.matmul(block.down_embed(read.expert_ids), flat.unsqueeze(-1)).squeeze(-1)
            inner = block.act_fn(inner) * read.weights
            routed = torch.matmul(inner.unsqueeze(1), block.up_embed(read.expert_ids))
            dense = block.down_proj(block.act_fn(block.gate_proj(hidden)) * block.up_proj(hidden))
            assert torch.equal(dense + routed.view(hidden.shape), caught["out"])
        order = read.logits.gather(1, read.expert_ids)
        assert torch.equal(order, read.logits.topk(4, dim=1).values)


@pytest.mark.parametrize("family", RECORD_ONLY)
def test_what_cannot_be_steered_refuses_to_be_written(family: str) -> None:
    tiny = built(family)
    sites = find_routers(tiny.model)
    with writing(sites, next_experts), pytest.raises(MoescopeError, match="cannot be steered"):
        output_of(tiny)


def test_nllb_experts_run_whatever_the_router_says() -> None:
    """The reason for which NLLB is recorded only: of 8 experts, the first two do all the work."""
    tiny = built("nllb_moe")
    sites = find_routers(tiny.model)
    before = output_of(tiny)
    with watching(sites) as seen:
        output_of(tiny)
    chosen = {int(one) for site in sites for one in seen[site.info.module].read.expert_ids.unique()}
    assert len(chosen) > 2
    with without_weights([(site, expert) for site in sites for expert in range(2, 8)]):
        assert torch.equal(output_of(tiny), before)
    with without_weights([(site, 1) for site in sites]):
        assert not torch.equal(output_of(tiny), before)
