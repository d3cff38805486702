"""Replaying a run of a store: by prompt and position, in batches of another composition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moescope.probe import Store, record, trace_prompts
from moescope.probe.batching import running_prompts
from moescope.probe.errors import MoescopeError, PlanError
from moescope.probe.generation import pad_left
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt
from moescope.probe.trace import TraceOptions
from moescope.steering import SteeringPlan, steer
from moescope.steering.replay import StoredRun

PROMPTS = [
    Prompt(prompt_id=at, text=text, set_name="typed")
    for at, text in enumerate(("Where is the ring?", "Hello", "What happened here in 1868?"))
]
LAYERS = [0, 1, 2]
PLAN = SteeringPlan(interventions=[{"action": "replay", "run": "base", "layers": LAYERS}])


@pytest.fixture(scope="module")
def stored(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path: Path = tmp_path_factory.mktemp("replay") / "store.duckdb"
    trace_prompts(tiny_bundle, PROMPTS, path, "base", TraceOptions(tokens_per_batch=4096))
    return Store(path)


def batch_of(bundle: Any, members: list[int]) -> dict[str, Any]:
    rows = [render_prompt(bundle.tokenizer, PROMPTS[at]).token_ids for at in members]
    padded = pad_left(rows, bundle.tokenizer.pad_token_id)
    positions = (padded.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": padded.input_ids, "attention_mask": padded.attention_mask,
        "position_ids": positions, "use_cache": False,
    }  # fmt: skip


def test_a_stored_run_is_replayed_whatever_runs_beside_it(tiny_bundle: Any, stored: Store) -> None:
    members = [2, 0]
    inputs = batch_of(tiny_bundle, members)
    real = inputs["attention_mask"].bool()
    masks = [{"action": "mask", "layer": layer, "experts": [0, 1, 2]} for layer in LAYERS]
    with torch.no_grad(), steer(tiny_bundle.model, SteeringPlan(interventions=masks)):
        masked = tiny_bundle.model(**inputs).logits
    with (
        torch.no_grad(), running_prompts(members), record(tiny_bundle.model) as trace,
        steer(tiny_bundle.model, PLAN, runs={"base": StoredRun(stored, "base")}) as report,
    ):  # fmt: skip
        replayed = tiny_bundle.model(**inputs).logits
    plain = tiny_bundle.model(**inputs).logits
    assert [row.requested for row in report.rows] == [int(real.sum())] * 3
    assert report.share == 1.0
    torch.testing.assert_close(replayed[real], plain[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked[real], plain[real], rtol=1e-2, atol=1e-2)
    lengths = real.sum(1).tolist()
    for layer in LAYERS:
        ids = trace[layer].expert_ids.view(2, -1, 2)
        for row, prompt in enumerate(members):
            rows = stored.query(
                "SELECT position, list(expert ORDER BY rank) AS experts FROM routing "
                "WHERE run_id = 'base' AND layer = ? AND prompt_id = ? "
                "GROUP BY position ORDER BY position",
                [layer, prompt],
            )
            found = ids[row, real.shape[1] - lengths[row] :].tolist()
            assert [list(one) for one in rows["experts"]] == found


def test_tokens_that_were_not_recorded_keep_their_routing_and_are_counted(
    tiny_bundle: Any, stored: Store
) -> None:
    inputs = batch_of(tiny_bundle, [1])
    num_tokens = inputs["input_ids"].shape[1]
    longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :2]], 1)
    with (
        torch.no_grad(), running_prompts([1]),
        steer(tiny_bundle.model, PLAN, runs={"base": StoredRun(stored, "base")}) as report,
    ):  # fmt: skip
        tiny_bundle.model(input_ids=longer)
    assert {(row.requested, row.achieved) for row in report.rows} == {(num_tokens + 2, num_tokens)}


def test_what_a_stored_run_cannot_tell_is_refused(tiny_bundle: Any, stored: Store) -> None:
    inputs = batch_of(tiny_bundle, [1])
    runs = {"base": StoredRun(stored, "base")}
    with (
        torch.no_grad(), steer(tiny_bundle.model, PLAN, runs=runs),
        pytest.raises(MoescopeError, match="which prompts these 1 sequences are is not known"),
    ):  # fmt: skip
        tiny_bundle.model(**inputs)
    with pytest.raises(PlanError, match="'base'"), steer(tiny_bundle.model, PLAN):
        pass
