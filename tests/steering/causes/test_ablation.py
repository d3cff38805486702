"""Exact ablation against whole forwards under mask plans, and against planted truth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.demo.planted import PlantedModel, attention_refusal, expert_refusal
from moescope.probe.errors import InputError, ModelInputError, PlanError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.storage.store import Store
from moescope.probe.zoo import tiny_model as zoo_model
from moescope.probe.zoo.sizes import FIRST_PLAIN_TOKEN, VOCABULARY
from moescope.steering import Intervention, SteeringPlan, steer
from moescope.steering.causes.ablation import AblationScan, scan
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.restart import LADDER, Savings
from moescope.steering.causes.scan_store import WHAT
from moescope.steering.causes.targets import (
    Custom,
    OpeningDifference,
    PromptLoss,
    Read,
    TargetRow,
    target_rows,
)
from moescope.steering.rates import mean_over_units

#: Families whose routing, attention or layers differ; those of the second tuple do not allow every
#: saving (linear attention keeps no keys and values, and JetMoE has routers inside attention).
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe",
            "granitemoe", "glm4_moe", "qwen3_moe+nonorm")  # fmt: skip
SLOWER = ("minimax", "jetmoe")
MODES = ("drop", "drop_renorm", "replace")
Case = tuple[ModelBundle, list[TargetRow], list[RenderedPrompt]]


class Padding:
    """As much of a tokenizer as rows of ready token ids need."""

    pad_token_id = 0


def zoo_case(family: str, lengths: Sequence[int] = (13, 9, 12, 5)) -> Case:
    """A tiny model, and rows of unequal length: a loss, and an answer of three tokens each."""
    bundle = ModelBundle(zoo_model(family).model, Padding(), family, None, family)
    random = np.random.default_rng(0)
    rendered = [
        RenderedPrompt(
            Prompt(prompt_id=3 * at, text="-", set_name="s"), "-",
            tuple(random.integers(FIRST_PLAIN_TOKEN, VOCABULARY, length).tolist()), (), (), (),
        )
        for at, length in enumerate(lengths)
    ]  # fmt: skip
    rows = target_rows(bundle, PromptLoss(), rendered[:2])
    for at, one in enumerate(rendered):
        reads = tuple(Read(column, 10 + column, 1.0) for column in (3, 2, 1))
        rows.append(TargetRow(at, one.token_ids, len(one) - 2, reads, 3))
    return bundle, rows, rendered


def by_plans(
    case: Case, found: AblationScan, *base: Intervention, every: int = 1, **mask: Any
) -> dict[int, Any]:
    """By expert, effects of whole runs under a plan for every so-manieth one, float64[P]."""
    bundle, rows, rendered = case
    with steer(bundle.model, SteeringPlan(interventions=base)):
        baseline = measure_target(bundle, rows, rendered)
    np.testing.assert_allclose(found.baseline, baseline, rtol=1e-5)
    effects: dict[int, Any] = {}
    for at in range(0, len(found.experts), every):
        layer, kind, expert = found.experts[at]
        own = Intervention(action="mask", layer=layer, kind=kind, experts=[expert], **mask)
        with steer(bundle.model, SteeringPlan(interventions=[*base, own])):
            effects[at] = measure_target(bundle, rows, rendered) - baseline
    return effects


def require_same(found: AblationScan, wanted: dict[int, Any], least: float = 1e-3) -> None:
    """To 1e-5 of each prompt's target, or of 1 where that is smaller."""
    limit_P = 1e-5 * np.maximum(1.0, np.abs(found.baseline))
    for at, effects_P in wanted.items():
        assert (np.abs(found.effects[at] - effects_P) <= limit_P).all()
    assert np.abs(found.effects).max() >= least


@pytest.mark.parametrize(
    ("family", "mode"),
    [*product(FAMILIES, MODES), ("minimax", "replace"), ("jetmoe", "drop_renorm")],
)
def test_every_effect_is_that_of_a_mask_plan(family: str, mode: Any) -> None:
    case = zoo_case(family)
    found = scan(*case, mode=mode, tokens_per_batch=40, tokens_per_forward=64)
    require_same(found, by_plans(case, found, mode=mode, every=2))
    assert bool(found.notes) == (family in SLOWER)
    if mode != "replace":
        assert not found.effects[found.tokens_used == 0].any()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("mode", MODES)
def test_one_more_expert_on_top_of_a_plan(family: str, mode: Any) -> None:
    case = zoo_case(family)
    base = (
        Intervention(action="mask", layer=1, experts=[2], mode=mode),
        Intervention(action="bias", layers=[1, 2], experts=[0, 5], value=0.7, tokens="last_prompt"),
        Intervention(action="scale", layer=2, experts=[1], value=3.0, prompt_ids=[0, 6]),
        Intervention(action="top_k", layer=1, value=3, tokens="generated"),
    )
    plan = SteeringPlan(interventions=base)
    found = scan(*case, mode=mode, base_plan=plan, tokens_per_batch=40, tokens_per_forward=64)
    assert (1, "mlp", 2) not in found.experts and len(found.experts) >= 10
    require_same(found, by_plans(case, found, *base, mode=mode))


@pytest.mark.parametrize("via", ["inf", "selection"])
def test_replaced_by_the_next_expert_in_other_ways(via: Any) -> None:
    case = zoo_case("qwen3_moe+nonorm")
    found = scan(*case, mode="replace", via=via)
    require_same(found, by_plans(case, found, mode="replace", via=via))


@pytest.mark.parametrize("savings", LADDER, ids=lambda one: one.words)
def test_no_saving_changes_a_number(savings: Savings) -> None:
    case = zoo_case("qwen2_moe")
    best = scan(*case)
    found = scan(*case, savings=[savings])
    np.testing.assert_allclose(found.effects, best.effects, atol=2e-5)
    np.testing.assert_array_equal(found.tokens_used, best.tokens_used)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 14), min_size=2, max_size=5),
    per_batch=st.sampled_from([14, 30, 200]),
    per_forward=st.sampled_from([1, 40, 500]),
)
def test_batches_and_padding_make_no_difference(
    lengths: list[int], per_batch: int, per_forward: int
) -> None:
    case = zoo_case("deepseek_v3", lengths)
    chosen = [(1, "mlp", 0), (2, "mlp", 3), (1, "mlp", 5)]
    found = scan(*case, experts=chosen, tokens_per_batch=per_batch, tokens_per_forward=per_forward)
    assert found.experts == ((1, "mlp", 0), (1, "mlp", 5), (2, "mlp", 3))
    require_same(found, by_plans(case, found, mode="drop"), least=0.0)


def test_a_function_of_the_logits_is_a_target_too() -> None:
    bundle, _, rendered = zoo_case("mixtral")
    target = Custom(lambda logits: logits[:, 7].max() - logits[-1, 9], num_columns=2)
    case = bundle, target_rows(bundle, target, rendered), rendered
    found = scan(*case)
    require_same(found, by_plans(case, found, mode="drop"))
    with pytest.raises(InputError, match="leave the store out"):
        scan(*case, store="never-made.duckdb")
    assert not Path("never-made.duckdb").exists()


def planted_case(planted: PlantedModel) -> Case:
    """Refusal opening minus answer opening on the questions it refuses."""
    bundle = ModelBundle(planted.model, planted.tokenizer, "planted", None, "qwen3_moe")
    rendered = [
        render_prompt(
            planted.tokenizer,
            Prompt(prompt_id=at, text=text, set_name="s", expected=answer, label=label),
        )
        for at, (text, answer, label) in enumerate(
            zip(planted.prompts, planted.answers, planted.labels, strict=True)
        )
        if label == "sensitive"
    ]
    refusals = {one.prompt.prompt_id: planted.refusal for one in rendered}
    target = OpeningDifference(first=refusals, num_tokens=1)
    return bundle, target_rows(bundle, target, rendered), rendered


@pytest.mark.parametrize("mode", MODES)
def test_the_planted_expert_has_the_whole_effect(mode: Any) -> None:
    planted = expert_refusal(layer=1, expert=5)
    found = scan(*planted_case(planted), mode=mode)
    at = found.experts.index((1, "mlp", 5))
    others = np.delete(found.effects, at, axis=0)
    assert (found.baseline > 5).all()
    assert (found.effects[at] + found.baseline < -5).all()
    assert np.abs(others).max() < 1e-4
    frame = found.frame([str(number) for number in range(len(found.baseline))])
    assert frame["effect"].idxmin() == at
    assert frame["high"][at] < -10
    assert frame["num_prompts_used"][at] == frame["n"][at] == len(found.baseline)


def test_where_attention_refuses_no_expert_has_an_effect() -> None:
    found = scan(*planted_case(attention_refusal()))
    assert (found.baseline > 5).all()
    assert np.abs(found.effects).max() < 1e-4


def test_the_frame_has_means_and_intervals_over_units() -> None:
    found = scan(*zoo_case("mixtral"), experts=[(0, "mlp", 1), (2, "mlp", 4)])
    units = ["a", "a", "b", "c"]
    frame = found.frame(units, seed=3)
    for at, row in enumerate(frame.itertuples()):
        mean, low, high = mean_over_units(found.effects[at].tolist(), units, 3)
        assert (row.effect, row.low, row.high) == pytest.approx((mean, low, high))
    assert frame["num_units"].tolist() == [3, 3]
    assert found.frame(["a"] * 4)["low"].isna().all()


def test_what_cannot_be_taken_out_is_refused_in_a_sentence() -> None:
    case = zoo_case("mixtral")
    with pytest.raises(PlanError, match="no expert 8 in layer 1"):
        scan(*case, experts=[(1, "mlp", 8)])
    replay = SteeringPlan(interventions=[Intervention(action="replay", layer=0, run="r")])
    with pytest.raises(PlanError, match="replays a recorded run"):
        scan(*case, base_plan=replay)
    six = SteeringPlan(interventions=[Intervention(action="mask", layer=0, experts=range(6))])
    with pytest.raises(PlanError, match="layer 0"):
        scan(*case, mode="replace", base_plan=six)
    switch = ModelBundle(zoo_model("switch_transformers").model, Padding(), "switch", None, "s")
    with pytest.raises(ModelInputError, match="encoder"):
        scan(switch, *case[1:])


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_ablation import zoo_case
from moescope.steering.causes import ablation, scan_store

scan_store.SECONDS = 0.0

def progress(done, total):
    print(done, flush=True)
    if done >= 60:
        time.sleep(60)

ablation.scan(*zoo_case("mixtral"), tokens_per_batch=14, store={store!r}, progress=progress)
"""


def chunks(store: Path) -> Any:
    return Store(store).query(
        "SELECT * FROM measurements WHERE what = ? ORDER BY details", [WHAT]
    )  # fmt: skip


def num_forwards(model: torch.nn.Module, run: Any) -> tuple[AblationScan, int]:
    counted: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        return run(), len(counted)
    finally:
        hook.remove()


def test_after_sigkill_a_scan_goes_on_and_makes_no_finished_part_again(tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    code = CHILD.format(tests=str(Path(__file__).parent), store=str(store))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert any(int(line) >= 60 for line in iter(child.stdout.readline, ""))
    finally:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
    before = chunks(store)
    assert 5 <= len(before) < 24  # of 6 batches, each a baseline and 3 layers

    case = zoo_case("mixtral")
    model = case[0].model
    plain, all_forwards = num_forwards(model, lambda: scan(*case, tokens_per_batch=14))
    done: list[int] = []
    found, some_forwards = num_forwards(
        model,
        lambda: scan(
            *case, tokens_per_batch=14, store=store, progress=lambda at, _total: done.append(at)
        ),
    )
    assert found.num_found == len(before)
    assert some_forwards < all_forwards
    np.testing.assert_array_equal(found.effects, plain.effects)
    np.testing.assert_array_equal(found.tokens_used, plain.tokens_used)
    assert done[-1] == 24 * 6
    after = chunks(store)
    assert len(after) == 24
    assert set(before["details"]) <= set(after["details"])
    again, no_forwards = num_forwards(model, lambda: scan(*case, tokens_per_batch=14, store=store))
    assert no_forwards == 0 and again.num_found == 24
    np.testing.assert_array_equal(again.effects, plain.effects)
    other = scan(*case, tokens_per_batch=14, store=store, mode="drop_renorm")
    assert other.num_found == 0
