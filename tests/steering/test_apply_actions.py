"""Every steering action on live models: hand-written formulas, scopes, replay, and what is left."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moescope.probe import zoo
from moescope.probe.batching import running_prompts
from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.recording import Trace, record
from moescope.probe.routers import find_routers, verify_routers
from moescope.steering import SteeringPlan, steer

IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
#: One family for each form in which routers hand over their decision.
FORMS = (
    "olmoe", "gpt_oss", "deepseek_v3", "deepseek_v4", "dbrx", "gemma4", "inkling", "jetmoe",
    "llama4", "switch_transformers", "zaya",
)  # fmt: skip
ACTIONS: list[dict[str, Any]] = [
    {"action": "mask", "experts": [1]},
    {"action": "mask", "experts": [1], "mode": "drop"},
    {"action": "mask", "experts": [1], "mode": "drop_renorm"},
    {"action": "force", "experts": [2], "strength": "natural"},
    {"action": "bias", "experts": [2, 3], "value": 2.0, "unit": "std"},
    {"action": "bias", "experts": [2, 3], "value": 1.0, "on": "selection"},
    {"action": "scale", "experts": [1, 2], "value": 3.0},
    {"action": "scale", "experts": [1, 2], "value": 3.0, "renormalize": True},
]


def plan(*interventions: dict[str, Any]) -> SteeringPlan:
    return SteeringPlan(name="p", interventions=interventions)


@cache
def proved(family: str) -> tuple[Any, Any]:
    """A tiny model and its proved routers."""
    tiny = zoo.tiny_model(family)
    return tiny, verify_routers(tiny.model, tiny.inputs["input_ids"])


def output(tiny: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = tiny.model(**tiny.inputs)[0]
    return found


@pytest.fixture(scope="module")
def qwen(tiny_model: Any) -> Any:
    return tiny_model("qwen3_moe", norm_topk_prob=True, eos_token_id=None)


def run(model: Any, *interventions: dict[str, Any], **more: Any) -> tuple[Trace, Any]:
    chosen = plan(*interventions)
    with steer(model, chosen, **more) as report, record(model) as trace, torch.no_grad():
        model(input_ids=IDS)
    return trace, report


def dense(trace: Trace, layer: int = 0) -> Tensor:
    """Weights by expert, float[T, E]."""
    found = trace[layer]
    empty = torch.zeros(len(found.weights), found.info.num_experts)
    return empty.scatter_add(1, found.expert_ids, found.weights)


def test_weights_under_every_action_follow_their_formulas(qwen: Any) -> None:
    plain, _ = run(qwen)
    z = plain[0].logits
    own = dense(plain)

    def best(probabilities: Tensor, number: int = 2) -> Tensor:
        values, ids = probabilities.topk(number)
        values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(1, ids, values)

    four = own.clone()
    four[:, [1, 6]] *= 4
    dropped = own.clone()
    dropped[:, [1, 6]] = 0
    total = dropped.sum(-1, keepdim=True)
    spread = z.std(-1, keepdim=True, correction=0)
    pushed = z.clone()
    pushed[:, [1, 6]] += 0.5 * spread
    lifted = z.softmax(-1)
    lifted[:, [1, 6]] += 0.2
    only = torch.zeros_like(z).scatter(1, lifted.topk(2).indices, 1.0) * z.softmax(-1)
    ranked, order = z.softmax(-1).sort(descending=True)
    enough = ranked.cumsum(-1) - ranked < 0.4
    reaching = torch.zeros_like(z).scatter(1, order, ranked * enough)
    expected: list[tuple[dict[str, Any], Tensor]] = [
        ({"action": "mask", "mode": "drop"}, dropped),
        ({"action": "mask", "mode": "drop_renorm"}, (dropped / total).nan_to_num(0)),
        ({"action": "scale", "value": 4}, four),
        ({"action": "scale", "value": 4, "renormalize": True}, four / four.sum(-1, keepdim=True)),
        ({"action": "bias", "value": 0.5, "unit": "std"}, best(pushed.softmax(-1))),
        (
            {"action": "bias", "value": 0.2, "on": "selection"},
            only / only.sum(-1, keepdim=True),
        ),
        ({"action": "top_k", "value": 4}, best(z.softmax(-1), 4)),
        ({"action": "top_k", "value": 1}, best(z.softmax(-1), 1)),
        ({"action": "top_p", "value": 0.4}, reaching / reaching.sum(-1, keepdim=True)),
    ]
    for fields, wanted in expected:
        experts = {} if fields["action"].startswith("top") else {"experts": [1, 6]}
        trace, report = run(qwen, {"layer": 0, **experts, **fields})
        torch.testing.assert_close(dense(trace), wanted, rtol=1e-5, atol=1e-6)
        (row,) = report.rows
        assert row.requested == 18 * max(1, len(row.experts))
        if row.is_promise:
            assert row.share == 1.0
            assert report.share == 1.0
        else:
            assert row.achieved == int((wanted[:, [1, 6]] > 0).sum())
            assert report.share is None
        assert row.emptied == (int((total == 0).sum()) if fields["action"] == "mask" else 0)


def test_a_token_whose_experts_are_all_dropped_gets_no_routed_output_and_is_counted(
    qwen: Any,
) -> None:
    everything = {"action": "mask", "mode": "drop_renorm", "layers": [0, 2], "experts": [*range(8)]}
    trace, report = run(qwen, everything)
    assert not trace[0].weights.any() and not trace[2].weights.any()
    assert [row.emptied for row in report.rows] == [18, 18]
    assert [row.layer for row in report.rows] == [0, 2]
    assert report.emptied == 36


@pytest.mark.parametrize("family", FORMS)
def test_a_scope_leaves_other_rows_as_they_are_to_the_bit(family: str) -> None:
    tiny, sites = proved(family)
    info = sites[-1].info
    before = output(tiny)
    with record(tiny.model, sites=sites) as plain:
        output(tiny)
    for fields in ACTIONS:
        chosen = plan({**fields, "layer": info.layer, "kind": info.kind, "tokens": "last_prompt"})
        with (
            record(tiny.model, sites=sites) as outer,
            steer(tiny.model, chosen, sites=sites),
            record(tiny.model, sites=sites) as inner,
        ):
            output(tiny)
        key = info.layer, info.kind
        last = torch.zeros(len(plain[key].weights), dtype=torch.bool)
        last[torch.tensor([12, 25])] = True
        assert torch.equal(outer[key].weights, inner[key].weights)
        assert torch.equal(outer[key].expert_ids, inner[key].expert_ids)
        assert torch.equal(inner[key].weights[~last], plain[key].weights[~last])
        assert torch.equal(inner[key].expert_ids[~last], plain[key].expert_ids[~last])
        assert torch.equal(output(tiny), before)


@pytest.mark.parametrize("family", FORMS)
def test_replaying_a_trace_repeats_it_to_the_bit(family: str) -> None:
    tiny, sites = proved(family)
    number, kinds = {}, {site.info.kind for site in sites}
    for site in sites:
        number.setdefault(site.info.kind, []).append(site.info.layer)
    changed = plan(
        *({"action": "force", "experts": [2], "layers": number[kind], "kind": kind}
          for kind in kinds)
    )  # fmt: skip
    with steer(tiny.model, changed, sites=sites), record(tiny.model, level="topk") as trace:
        steered = output(tiny)
    assert not torch.equal(steered, output(tiny))
    again = plan(
        *({"action": "replay", "run": "x", "layers": number[kind], "kind": kind} for kind in kinds)
    )
    with steer(tiny.model, again, sites=sites, runs={"x": trace}) as report:
        replayed = output(tiny)
    if family == "inkling":  # its shared experts weigh by the unedited logits
        torch.testing.assert_close(replayed, steered, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(replayed, steered)
    assert report.share == 1.0


def test_scoped_numbers_of_experts_and_replays_leave_other_rows(qwen: Any) -> None:
    plain, _ = run(qwen)
    wide, _ = run(qwen, {"action": "top_k", "layer": 2, "value": 4})
    last = torch.zeros(18, dtype=torch.bool)
    last[[8, 17]] = True
    settings: list[tuple[dict[str, Any], int]] = [
        ({"action": "top_k", "value": 4}, 4), ({"action": "top_k", "value": 1}, 1),
        ({"action": "top_p", "value": 1.0}, 8), ({"action": "replay", "run": "wide"}, 4),
    ]  # fmt: skip
    for fields, number in settings:
        given = {"layer": 2, "tokens": "last_prompt", **fields}
        trace, report = run(qwen, given, runs={"wide": wide})
        assert torch.equal(dense(trace, 2)[~last], dense(plain, 2)[~last])
        assert ((trace[2].weights[last] != 0).sum(-1) == number).all()
        assert (report.rows[0].requested, report.rows[0].achieved) == (2, 2)
        assert torch.equal(trace[2].expert_ids[~last][:, :2], plain[2].expert_ids[~last])


def test_what_cannot_be_replayed_is_refused(qwen: Any) -> None:
    plain, _ = run(qwen)
    given = {"action": "replay", "run": "base", "layer": 1}
    with pytest.raises(PlanError, match="replays run 'base', whose routing was not handed over"):
        run(qwen, given)
    with record(qwen, level="usage") as counted:
        qwen(input_ids=IDS)
    with pytest.raises(PlanError, match="level usage"):
        run(qwen, given, runs={"base": counted})
    with steer(qwen, plan(given), runs={"base": plain}), torch.no_grad():
        with pytest.raises(MoescopeError, match="routed 18 tokens, and this one routes 9"):
            qwen(input_ids=IDS[:1])
        with pytest.raises(MoescopeError, match="has 1 forwards, and this is one more"):
            qwen(input_ids=IDS)


def test_a_plan_acts_on_the_prompts_that_it_names(qwen: Any) -> None:
    only = {"action": "mask", "layer": 0, "experts": [0, 1, 2], "prompt_ids": [7]}
    plain, _ = run(qwen)
    with running_prompts([3, 7]):
        trace, report = run(qwen, only)
    assert torch.equal(trace[0].expert_ids[:9], plain[0].expert_ids[:9])
    assert (trace[0].expert_ids[9:] > 2).all()
    assert report.rows[0].requested == 27
    assert report.rows[0].tokens == "all of prompts 7"
    with running_prompts([3, 4]):
        _, report = run(qwen, only)
    assert report.rows[0].requested == 0
    with pytest.raises(MoescopeError, match="which prompts these 2 sequences are is not known"):
        run(qwen, only)


def test_inputs_may_be_given_by_position(qwen: Any) -> None:
    given = plan({"action": "mask", "layer": 0, "experts": [0], "tokens": "last_prompt"})
    with steer(qwen, given) as report, torch.no_grad():
        qwen(IDS)
    assert report.rows[0].requested == 2


def test_a_family_that_cannot_be_steered_is_refused_with_its_reason() -> None:
    tiny = zoo.tiny_model("doge")
    layer = find_routers(tiny.model)[0].info.layer
    chosen = plan({"action": "mask", "layer": layer, "experts": [0]})
    with pytest.raises(PlanError, match="recorded but not steered"), steer(tiny.model, chosen):
        pass


def test_a_family_with_one_expert_per_token_keeps_that_number() -> None:
    tiny, sites = proved("switch_transformers")
    info = sites[0].info
    chosen = plan({"action": "top_k", "layer": info.layer, "kind": info.kind, "value": 2})
    with pytest.raises(PlanError, match="exactly one expert"), steer(tiny.model, chosen):
        pass


def test_counts_stay_on_the_device_until_they_are_read(qwen: Any) -> None:
    with steer(qwen, plan({"action": "mask", "layer": 0, "experts": [1]})) as report:
        for _ in range(3):
            qwen(input_ids=IDS)
    assert report.rows[0].requested == 54
    assert report.to_json()["interventions"][0]["achieved"] == 54
    assert report.frame()["requested"].tolist() == [54]
