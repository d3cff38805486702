"""Runs on Ray: the same rows as in one process, also when a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.probe import Store, read_prompts, trace_prompts
from moescope.probe.batching import PlannedBatch
from moescope.probe.engine import BatchDone, LocalEngine
from moescope.probe.errors import InputError, ModelInputError, MoescopeError
from moescope.probe.models import load_model, load_tokenizer
from moescope.probe.storage.remote_shards import fetch_shard, open_place, put_shard
from moescope.probe.storage.verify import verify_run
from moescope.probe.trace import TraceOptions, collect, render_prompts

ray = pytest.importorskip("ray", reason="NO RAY TEST RAN: pip install 'moescope[ray]'")

from moescope.probe.ray_engine import ModelSource, RayEngine, RayOptions  # noqa: E402

OPTIONS = TraceOptions(max_new_tokens=8, tokens_per_batch=128)
TIE = 1e-5
IN_FULL = pytest.mark.skipif(
    float(os.environ.get("MOESCOPE_SOAK", "1")) < 1,
    reason="starts more Ray workers; runs in the whole of make soak",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this test's own with room for two workers."""
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    return read_prompts(["neutral"])[:24]


@pytest.fixture(scope="module")
def local(prompts: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("local") / "runs.duckdb"
    trace_prompts(load_model("demo-base"), prompts, store, "run", OPTIONS)
    return store


def on_ray(
    prompts: list[Any], store: Path, spread: RayOptions, kill_after: int | None = None
) -> tuple[Any, set[int]]:
    """Record on Ray; `kill_after` batches the worker that ran the last one is killed."""
    rendered = render_prompts(load_tokenizer("demo-base"), prompts, OPTIONS)
    engine = RayEngine(ModelSource(name="demo-base"), rendered, OPTIONS, spread)
    pids: list[int] = []

    class Watched:
        facts = engine.facts

        def run(self, batches: Any, folder: Path) -> Iterator[BatchDone]:
            for done in engine.run(batches, folder):
                pids.append(done.pid)
                if len(pids) == kill_after:
                    os.kill(done.pid, signal.SIGKILL)
                yield done

    summary = collect(Watched(), rendered, store, "run", OPTIONS, manifest={})
    return summary, set(pids)


def slots(store: Path) -> Any:
    return Store(store).query(
        "SELECT prompt_id, position, layer, rank, expert, weight FROM routing "
        "ORDER BY prompt_id, position, layer, rank"
    )


def agree(local: Path, other: Path) -> None:
    """Same prompts, answers and rows; ids equal but for ties, weights within the tolerance."""
    text = "SELECT prompt_id, text, response, num_tokens, num_generated FROM prompts ORDER BY 1"
    assert Store(other).query(text).equals(Store(local).query(text))
    first, second = slots(local), slots(other)
    keys = ["prompt_id", "position", "layer", "rank"]
    assert first[keys].equals(second[keys])
    differ = (first["expert"] != second["expert"]).to_numpy()
    # Two experts that changed places have weights that are as good as equal.
    gap = np.abs(first["weight"] - second["weight"]).to_numpy()
    assert gap.max() <= TIE
    assert differ.sum() <= 1e-3 * len(first), f"{differ.sum()} ids of {len(first)} differ"


def test_two_workers_one_killed_record_what_one_process_records(
    cluster: None, local: Path, prompts: list[Any], tmp_path: Path
) -> None:
    store = tmp_path / "runs.duckdb"
    summary, pids = on_ray(prompts, store, RayOptions(workers=2), kill_after=1)
    assert summary.prompts == len(prompts)
    assert len(pids) >= 2, "a new worker, or the other one, must have gone on"
    assert verify_run(Store(store), "run") == []
    agree(local, store)


@pytest.mark.soak
@IN_FULL
def test_shards_travel_through_a_url(
    cluster: None, local: Path, prompts: list[Any], tmp_path: Path
) -> None:
    place = tmp_path / "bucket"
    spread = RayOptions(workers=1, shards_at=f"file://{place}")
    on_ray(prompts, tmp_path / "runs.duckdb", spread)
    agree(local, tmp_path / "runs.duckdb")
    assert [path for path in place.rglob("*") if path.is_file()] == []


def test_what_a_worker_says_of_the_model_is_said_here(
    cluster: None, prompts: list[Any], tmp_path: Path
) -> None:
    rendered = render_prompts(load_tokenizer("demo-base"), prompts[:1], OPTIONS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelInputError, match="gpt2"):
        RayEngine(ModelSource(name=str(tmp_path)), rendered, OPTIONS, RayOptions())
    with pytest.raises(InputError, match="8 workers with 1 CPUs each need 8, and the Ray cluster"):
        RayEngine(ModelSource(name="demo-base"), rendered, OPTIONS, RayOptions(workers=8))
    with pytest.raises(InputError, match="shards cannot go to 'nothing://there'"):
        spread = RayOptions(shards_at="nothing://there")
        RayEngine(ModelSource(name="demo-base"), rendered, OPTIONS, spread)


@pytest.mark.soak
@IN_FULL
def test_a_folder_that_workers_do_not_see_is_said(
    cluster: None, prompts: list[Any], tmp_path: Path
) -> None:
    rendered = render_prompts(load_tokenizer("demo-base"), prompts[:1], OPTIONS)
    engine = RayEngine(ModelSource(name="demo-base"), rendered, OPTIONS, RayOptions())
    with pytest.raises(MoescopeError, match="this worker does not see the folder"):
        list(engine.run([PlannedBatch(0, (0,))], tmp_path / "not-there"))


def test_a_shard_comes_back_from_any_file_system_whole(tmp_path: Path) -> None:
    bundle = load_model("demo-base")
    rendered = render_prompts(bundle.tokenizer, read_prompts(["neutral"])[:2], OPTIONS)
    here, back = tmp_path / "here", tmp_path / "back"
    here.mkdir()
    back.mkdir()
    engine = LocalEngine(bundle, rendered, OPTIONS)
    name = engine.run_one(PlannedBatch(3, (0, 1)), rendered, here).shard_id
    put_shard(here / name, "memory://bucket/runs", "run-1")
    system, path = open_place("memory://bucket/runs")
    assert system.exists(f"{path}/run-1/{name}/manifest.json")
    fetch_shard("memory://bucket/runs", "run-1", name, back)
    for file in (here / name).iterdir():
        assert (back / name / file.name).read_bytes() == file.read_bytes()
    assert not system.exists(f"{path}/run-1/{name}")
