"""Swaps: tuned experts named, undone to the bit, only tokens that use the expert change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe import load_model, read_prompts, record
from moescope.probe.demo.models import tuned_experts
from moescope.probe.errors import InputError
from moescope.probe.rendering import render_prompt
from moescope.probe.zoo.build import tiny_model
from moescope.steering.causes.exchange import SwapPart, swapped
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.shares import effect_columns, share_columns
from moescope.steering.causes.swaps import expert_parts, layer_parts, scan_swaps
from moescope.steering.causes.targets import OpeningDifference, target_rows
from moescope.steering.rates import mean_over_units


@pytest.fixture(scope="module")
def base() -> Any:
    return load_model("demo-base")


def asked(bundle: Any, count: int) -> tuple[Any, Any, list[str]]:
    """Rows, prompts and units: the refusal's opening against the withheld answer's."""
    prompts = [one for one in read_prompts(["refusal"]) if one.label == "sensitive"]
    prompts = prompts[:: len(prompts) // count][:count]
    rendered = [render_prompt(bundle.tokenizer, one) for one in prompts]
    refusals = {one.prompt_id: str(one.meta["refusal"]) for one in prompts}
    rows = target_rows(bundle, OpeningDifference(refusals), rendered)
    return rows, rendered, [str(one.pair_id) for one in prompts]


@pytest.mark.parametrize("name", ["demo", "demo-random"])
def test_expert_by_expert_exactly_the_tuned_ones_are_named(base: Any, name: str) -> None:
    tuned = load_model(name)
    rows, rendered, units = asked(tuned, 12)
    scan = scan_swaps(tuned, base, rows, rendered)
    frame = scan.frame(units)
    truth = {(layer, expert) for layer, own in tuned_experts(name).items() for expert in own}
    assert len(truth) == 14 and len(frame) == 240

    def named(keep: Any) -> set[tuple[int, int]]:
        return set(frame.loc[keep, ["layer", "expert"]].itertuples(index=False, name=None))

    assert named(~frame["same_weights"]) == truth
    assert named((scan.effects != 0).any(axis=1)) == truth
    assert (frame.loc[frame["same_weights"], ["effect", "low", "high"]] == 0).all(axis=None)


def test_all_of_it_brings_the_base_back_and_the_other_way_round(base: Any) -> None:
    tuned = load_model("demo")
    rows, rendered, units = asked(tuned, 6)
    everything = [SwapPart(what) for what in ("experts", "routers", "both")]
    back = scan_swaps(tuned, base, rows, rendered, parts=everything)
    shares = back.frame(units).set_index("what")["share"]
    assert shares["both"] == pytest.approx(1, abs=1e-5)
    assert 0.5 < shares["routers"] < shares["experts"] < 1
    forth = scan_swaps(base, tuned, rows, rendered, parts=everything)
    np.testing.assert_array_equal(forth.baseline, back.donor)
    # What is left of the tuned model without its experts is the base with its routers.
    np.testing.assert_allclose(
        back.baseline + back.effects[0], forth.baseline + forth.effects[1], atol=1e-4
    )


def test_one_swap_is_the_model_with_those_weights_copied_by_hand(base: Any) -> None:
    tuned, other = load_model("demo"), load_model("demo")
    rows, rendered, _ = asked(tuned, 4)
    [layer, expert] = [2, tuned_experts("demo")[2][0]]
    scan = scan_swaps(tuned, base, rows, rendered, parts=[SwapPart("both", layer, expert)])
    own, given = (one.model.model.layers[layer].mlp for one in (other, base))
    with torch.no_grad():
        own.gate.weight[expert] = given.gate.weight[expert]
        own.experts.gate_up_proj[expert] = given.experts.gate_up_proj[expert]
        own.experts.down_proj[expert] = given.experts.down_proj[expert]
    copied = measure_target(other, rows, rendered)
    np.testing.assert_array_equal(scan.effects[0], copied - measure_target(tuned, rows, rendered))


def test_weights_come_back_to_the_bit_also_through_an_error(base: Any) -> None:
    tuned = load_model("demo")
    before = {name: one.clone() for name, one in tuned.model.state_dict().items()}
    with (
        pytest.raises(KeyError, match="stop"),
        swapped(tuned.model, base.model, [SwapPart("experts"), SwapPart("both", 1, 17)]),
        swapped(tuned.model, base.model, [SwapPart("both", 1)]),
    ):
        inside = tuned.model.state_dict()
        assert any(not torch.equal(one, inside[name]) for name, one in before.items())
        raise KeyError("stop")
    after = tuned.model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())


@pytest.mark.parametrize(
    "family", ["mixtral", "dbrx", "granitemoe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "jetmoe"]
)
def test_an_expert_changes_only_the_tokens_that_use_it(family: str) -> None:
    host, donor = tiny_model(family, seed=0), tiny_model(family, seed=1)
    last = [part for part in expert_parts(host.model, "experts") if part.kind == "mlp"][-1].layer
    assert last is not None
    with torch.no_grad(), record(host.model) as trace:
        plain = host.model(**host.inputs).logits.flatten(0, 1)
    ids_TK = trace[last, "mlp"].expert_ids
    for expert in range(8):
        with torch.no_grad(), swapped(
            host.model, donor.model, [SwapPart("experts", last, expert)]
        ):  # fmt: skip
            changed = host.model(**host.inputs).logits.flatten(0, 1)
        is_other_T = (changed - plain).abs().amax(-1) > 1e-5
        assert torch.equal(is_other_T, (ids_TK == expert).any(-1))


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "qwen2_moe", "longcat_flash"])
def test_rows_one_by_one_are_the_whole_router(family: str) -> None:
    host, donor = tiny_model(family, seed=0), tiny_model(family, seed=1)
    one_by_one = expert_parts(host.model, "routers")
    with torch.no_grad():
        with swapped(host.model, donor.model, one_by_one):
            rows = host.model(**host.inputs).logits
        with swapped(host.model, donor.model, [SwapPart("routers")]):
            whole = host.model(**host.inputs).logits
        assert torch.equal(rows, whole)
        assert not torch.equal(rows, host.model(**host.inputs).logits)


def test_parts_and_models_that_do_not_fit_are_refused(base: Any) -> None:
    other = tiny_model("qwen3_moe").model
    with (
        pytest.raises(InputError, match=r"one architecture.* has shape"),
        swapped(base.model, other, [SwapPart("both")]),
    ):
        pass
    with (
        pytest.raises(InputError, match="these are Qwen3MoeForCausalLM and OlmoeForCausalLM"),
        swapped(other, tiny_model("olmoe").model, [SwapPart("both")]),
    ):
        pass
    for part, message in (
        (SwapPart("both", 9), "layer 9 has no router"),
        (SwapPart("both", kind="attention"), "no layer has a router of kind 'attention'"),
        (SwapPart("both", 2, 40), "experts 0 to 39, and no expert 40"),
    ):
        with pytest.raises(InputError, match=message), swapped(base.model, base.model, [part]):
            pass
    with pytest.raises(InputError, match="needs the layer"):
        SwapPart("both", None, 3)
    one, two = (tiny_model("doge", seed=seed).model for seed in (0, 1))
    with (
        pytest.raises(InputError, match="no row for each expert"),
        swapped(one, two, [SwapPart("routers", 1, 0)]),
    ):
        pass


def test_layer_parts_name_every_layer_and_all_of_them(base: Any) -> None:
    parts = layer_parts(base.model, ["both"])
    assert [part.layer for part in parts] == [*range(6), None]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=2, max_size=12))
def test_columns_are_the_means_and_intervals_of_single_rows(rows: list[tuple[float, int]]) -> None:
    values = np.array([one[0] for one in rows])
    units = [str(one[1]) for one in rows]
    found = effect_columns(np.array([values, 2 * values]), units, seed=3)
    for at, factor in enumerate((1, 2)):
        wanted = mean_over_units((factor * values).tolist(), units, 3)
        got = [found[name][at] for name in ("effect", "low", "high")]
        np.testing.assert_allclose(
            got, [math.nan if one is None else one for one in wanted], atol=1e-9
        )
    share = share_columns(values[None], 4 * values, units, seed=0)["share"][0]
    assert math.isnan(share) or share == pytest.approx(0.25)
