"""Steering on tiny models of each family, checked by an independent capture at the experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.recording import record
from moescope.probe.routers import find_routers, verify_routers
from moescope.steering import SteeringPlan, steer

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[257, 257, 257, 4, 5, 6], [9, 8, 7, 6, 5, 4]])
REAL = (PADDED != 257).long()


def plan(*interventions: dict[str, Any], name: str = "p") -> SteeringPlan:
    return SteeringPlan(name=name, interventions=interventions)


def mask(layer: int, experts: list[int], **more: Any) -> dict[str, Any]:
    return {"action": "mask", "layer": layer, "experts": experts, **more}


def force(layer: int, experts: list[int], **more: Any) -> dict[str, Any]:
    return {"action": "force", "layer": layer, "experts": experts, **more}


@contextmanager
def arriving(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Expert ids as the experts modules receive them, layer by layer and call by call."""
    seen: dict[int, list[Tensor]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not name.endswith("mlp.experts"):
                continue
            calls = seen.setdefault(int(name.split(".")[2]), [])

            def hook(_module: nn.Module, args: Any, calls: list[Tensor] = calls) -> None:
                calls.append(args[1].clone())

            stack.callback(module.register_forward_pre_hook(hook).remove)
        assert seen
        yield seen


def hooks_of(model: nn.Module) -> list[tuple[str, list[int]]]:
    """All hooks on all modules, and what is set on the model itself."""
    found = [
        (name, [*module._forward_hooks, *module._forward_pre_hooks])
        for name, module in model.named_modules()
    ]
    return [*found, ("generate" if "generate" in model.__dict__ else "", [])]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def qwen(tiny_model: Any) -> Any:
    return tiny_model("qwen3_moe", norm_topk_prob=True, eos_token_id=None)


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **more).logits
    return found


SETTINGS: list[dict[str, Any]] = [
    {"action": "mask", "via": "min"},
    {"action": "mask", "via": "inf"},
    {"action": "mask", "via": "selection"},
    {"action": "force", "strength": "max"},
    {"action": "force", "strength": "natural"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))
def test_each_action_holds_at_the_experts_and_leaves_nothing_behind(
    model: Any, setting: dict[str, Any]
) -> None:
    hooks = hooks_of(model)
    with arriving(model) as seen:
        before = logits(model)
    used = torch.bincount(seen[1][0].flatten(), minlength=8).argsort(descending=True).tolist()
    experts = used[:2] if setting["action"] == "mask" else used[-2:]
    with arriving(model) as seen, steer(model, plan({**setting, "layer": 1, "experts": experts})):
        steered = logits(model)
    arrived = torch.isin(seen[1][0], torch.tensor(experts))
    assert arrived.sum().item() == (0 if setting["action"] == "mask" else 2 * IDS.numel())
    assert not torch.equal(steered, before)
    assert torch.isfinite(steered).all()
    assert torch.equal(logits(model), before)
    assert hooks_of(model) == hooks


def test_an_empty_plan_and_a_scope_without_tokens_change_no_bit(model: Any) -> None:
    before = logits(model)
    for empty in (
        plan(),
        plan(mask(0, [1], tokens="generated"), force(2, [3], tokens="generated")),
    ):
        with steer(model, empty) as report:
            assert torch.equal(logits(model), before)
        assert report.share is None
    assert torch.equal(logits(model), before)


def test_record_sees_the_steered_routing_in_either_order(model: Any) -> None:
    chosen = plan(mask(0, [0, 1, 2]), force(2, [5]))
    with arriving(model) as seen, record(model) as outer, steer(model, chosen):
        logits(model)
    with steer(model, chosen), record(model) as inner:
        logits(model)
    for trace in (outer, inner):
        assert len(trace.forwards) == 1
        for layer in (0, 1, 2):
            assert torch.equal(trace[layer].expert_ids, seen[layer][0])
        assert not torch.isin(trace[0].expert_ids, torch.tensor([0, 1, 2])).any()
        assert (trace[2].expert_ids == 5).any(-1).all()


def test_rows_out_of_scope_keep_the_routers_output_to_the_bit(model: Any) -> None:
    with record(model) as plain:
        logits(model)
    with record(model) as steered, steer(model, plan(mask(0, [0, 1, 2], tokens="last_prompt"))):
        logits(model)
    others = torch.ones(18, dtype=torch.bool)
    others[[8, 17]] = False
    assert torch.equal(steered[0].expert_ids[others], plain[0].expert_ids[others])
    assert torch.equal(steered[0].weights[others], plain[0].weights[others])
    assert not torch.isin(steered[0].expert_ids[~others], torch.tensor([0, 1, 2])).any()


def generated(model: Any, chosen: SteeringPlan) -> tuple[dict[int, list[Tensor]], Any]:
    with arriving(model) as seen, steer(model, chosen) as report:
        model.generate(
            input_ids=PADDED, attention_mask=REAL, max_new_tokens=4, do_sample=False,
            pad_token_id=257,
        )  # fmt: skip
    return seen, report


def test_scopes_hold_exactly_where_asked_in_a_left_padded_generate(qwen: Any) -> None:
    scopes = {"prompt": 0, "last_prompt": 1, "generated": 2}
    free, _ = generated(qwen, plan())
    for scope, layer in scopes.items():
        popular = torch.bincount(torch.cat(free[layer]).flatten(), minlength=8).argmax().item()
        rare = torch.bincount(torch.cat(free[layer]).flatten(), minlength=8).argmin().item()
        seen, report = generated(
            qwen, plan(mask(layer, [popular], tokens=scope), force(layer, [rare], tokens=scope))
        )
        prefill = seen[layer][0].view(2, 6, 2)
        steps = torch.stack(seen[layer][1:])
        in_prompt = REAL.bool().clone()
        if scope == "last_prompt":
            in_prompt[:, :-1] = False
        if scope == "generated":
            in_prompt[:] = False
        forced = (prefill == rare).any(-1)
        masked_out = ~(prefill == popular).any(-1)
        assert forced[in_prompt].all()
        assert masked_out[in_prompt].all()
        unscoped = free[layer][0].view(2, 6, 2)[~in_prompt]
        assert torch.equal(prefill[~in_prompt], unscoped)  # one steered layer: inputs unchanged
        if scope == "generated":
            assert (steps == rare).any(-1).all()
            assert not (steps == popular).any()
        assert [row.share for row in report.rows] == [1.0, 1.0]
        tokens = {"prompt": 9, "last_prompt": 2, "generated": 6}[scope]
        assert [row.requested for row in report.rows] == [tokens, tokens]


def test_first_generated_stops_after_its_tokens(qwen: Any) -> None:
    free, _ = generated(qwen, plan())
    rare = torch.bincount(torch.cat(free[1]).flatten(), minlength=8).argmin().item()
    seen, report = generated(qwen, plan(force(1, [rare], tokens={"first_generated": 2})))
    steps = [(one == rare).any(-1).all().item() for one in seen[1]]
    assert steps[:3] == [False, True, True]
    assert report.rows[0].requested == 4
    assert report.num_forwards == 4
    assert report.rows[0].tokens == "first 2 generated"


def test_the_report_counts_what_the_router_would_have_done_anyway(qwen: Any) -> None:
    with record(qwen) as trace:
        logits(qwen, attention_mask=torch.ones_like(IDS))
    attention_mask = torch.ones_like(IDS)
    attention_mask[0, :4] = 0
    with record(qwen) as trace:
        logits(qwen, attention_mask=attention_mask)
    real = attention_mask.bool().flatten()
    uses = (trace[0].expert_ids[real] == 3).any(-1).sum().item()
    assert 0 < uses < 14
    with steer(qwen, plan(mask(0, [3]), force(0, [4]))) as report:
        logits(qwen, attention_mask=attention_mask)
    masked, forced = report.rows
    assert (masked.requested, masked.achieved, masked.held_anyway) == (14, 14, 14 - uses)
    assert (forced.requested, forced.achieved) == (14, 14)
    assert forced.held_anyway == (trace[0].expert_ids[real] == 4).any(-1).sum().item()
    assert report.share == 1.0
    frame = report.frame()
    assert frame["share"].tolist() == [1.0, 1.0]
    assert report.to_json()["interventions"][0]["requested"] == 14


def test_steering_disjoint_layers_nests_and_one_layer_twice_is_refused(qwen: Any) -> None:
    both = plan(mask(0, [1, 2]), force(2, [3]))
    with steer(qwen, both):
        together = logits(qwen)
    with steer(qwen, plan(mask(0, [1, 2]), name="outer")), steer(qwen, plan(force(2, [3]))):
        assert torch.equal(logits(qwen), together)
        inner = plan(mask(0, [5]), name="inner")
        message = "layer 0 is steered by 'outer' already; put its interventions and those of"
        with pytest.raises(PlanError, match=message), steer(qwen, inner):
            pass
        assert torch.equal(logits(qwen), together)
    with steer(qwen, plan(mask(0, [5]))):
        logits(qwen)


def test_an_exception_inside_leaves_no_hook(qwen: Any) -> None:
    hooks, before = hooks_of(qwen), logits(qwen)
    with pytest.raises(RuntimeError, match="stop"), steer(qwen, plan(mask(0, [1]), mask(1, [2]))):
        logits(qwen)
        raise RuntimeError("stop")
    assert hooks_of(qwen) == hooks
    assert torch.equal(logits(qwen), before)


def test_nothing_is_left_when_the_third_hook_fails(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, before = hooks_of(qwen), logits(qwen)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more hooks")

    third = find_routers(qwen)[2].router
    monkeypatch.setattr(third, "register_forward_hook", fail)
    three = plan(mask(0, [1]), mask(1, [1]), mask(2, [1]))
    with pytest.raises(RuntimeError, match="no more hooks"), steer(qwen, three):
        pass
    monkeypatch.undo()
    assert hooks_of(qwen) == hooks
    assert torch.equal(logits(qwen), before)
    with steer(qwen, three) as report:
        logits(qwen)
    assert report.share == 1.0


def test_a_forward_that_fails_inside_leaves_steering_usable(qwen: Any) -> None:
    with steer(qwen, plan(mask(0, [1]))) as report:
        with pytest.raises(IndexError):
            qwen(input_ids=torch.tensor([[999]]))
        logits(qwen)
    assert report.num_forwards == 1
    assert report.share == 1.0


def test_a_plan_that_does_not_fit_is_refused_before_a_hook_is_set(qwen: Any) -> None:
    hooks = hooks_of(qwen)
    with pytest.raises(PlanError, match="layer 7 has no router"), steer(qwen, plan(mask(7, [1]))):
        pass
    with (
        pytest.raises(PlanError, match="mask at most 6"),
        steer(qwen, plan(mask(0, [0, 1, 2, 3, 4, 5, 6]))),
    ):
        pass
    assert hooks_of(qwen) == hooks


def test_sites_that_were_not_proved_are_refused_and_proved_ones_used(qwen: Any) -> None:
    unproved = find_routers(qwen)
    with (
        pytest.raises(PlanError, match="not steered: not checked yet"),
        steer(qwen, plan(mask(0, [1])), sites=unproved),
    ):
        pass
    with steer(qwen, plan(mask(0, [1])), sites=verify_routers(qwen, IDS[:1])) as report:
        logits(qwen)
    assert report.share == 1.0


def test_a_router_that_does_not_follow_its_rule_is_not_steered(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = find_routers(qwen)[1].router
    original = router.forward

    def otherwise(hidden: Tensor) -> Any:
        found, weights, ids = original(hidden)
        return found, weights * 1.01, ids

    monkeypatch.setattr(router, "forward", otherwise)
    message = "layer 1 .* cannot be steered: its selection rule .* does not repeat"
    with steer(qwen, plan(mask(1, [1]))), pytest.raises(PlanError, match=message):
        logits(qwen)
    with steer(qwen, plan(mask(0, [1]))):
        logits(qwen)


def test_experts_that_receive_something_else_are_noticed(qwen: Any) -> None:
    router = find_routers(qwen)[1].router
    handle = router.register_forward_hook(lambda _m, _a, out: (out[0], out[1] * 0.5, out[2]))
    try:
        with (
            steer(qwen, plan(mask(1, [1]))),
            pytest.raises(MoescopeError, match="experts received other ids or weights"),
        ):
            logits(qwen)
    finally:
        handle.remove()


def test_a_layer_that_is_passed_over_is_noticed(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block = qwen.model.layers[1].mlp
    with steer(qwen, plan(mask(1, [1]))):
        monkeypatch.setattr(block, "forward", lambda hidden: hidden)
        with pytest.raises(MoescopeError, match="passed its router or experts over"):
            logits(qwen)
        monkeypatch.setattr(
            block, "forward", lambda hidden: block.experts(hidden.view(-1, 32), *routed(hidden))
        )

        def routed(hidden: Tensor) -> tuple[Tensor, Tensor]:
            rows = hidden.view(-1, 32).shape[0]
            return torch.zeros(rows, 2, dtype=torch.long), torch.ones(rows, 2)

        with pytest.raises(MoescopeError, match="ran without their router"):
            logits(qwen)
    monkeypatch.undo()


def test_a_part_of_the_model_is_steered_only_where_all_tokens_are_meant(qwen: Any) -> None:
    with torch.no_grad():
        with steer(qwen, plan(mask(1, [1]))), arriving(qwen) as seen:
            qwen.model(input_ids=IDS)
        assert not (seen[1][0] == 1).any()
        with (
            steer(qwen, plan(mask(1, [1], tokens="prompt"))),
            pytest.raises(MoescopeError, match="call the steered model itself"),
        ):
            qwen.model(input_ids=IDS)


def test_gradients_flow_through_steered_routing(qwen: Any) -> None:
    with steer(qwen, plan(mask(1, [1]), force(2, [4]))):
        qwen(input_ids=IDS).logits.sum().backward()
    gradients = [site.router.weight.grad for site in find_routers(qwen)]
    assert all(found is not None and found.abs().sum() > 0 for found in gradients)
    qwen.zero_grad(set_to_none=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_bfloat16_models_are_steered(tiny_model: Any, family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    with arriving(model) as seen, steer(model, plan(mask(0, [1, 2]), force(1, [3]))) as report:
        logits(model)
    assert report.share == 1.0
    assert not torch.isin(seen[0][0], torch.tensor([1, 2])).any()
    assert (seen[1][0] == 3).any(-1).all()
