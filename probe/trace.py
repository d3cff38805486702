"""Recording a run: planned batches through the model, as shards, through the ingester, stored.

    bundle = load_model("demo")
    summary = trace_prompts(bundle, read_prompts(["refusal"]), "demo.duckdb", "base")

The plan of batches is fixed before the first one runs, so a run that was interrupted goes on with
exactly the batches that are missing when it is started again with the same arguments.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from moescope.probe.batch_run import BatchRunner
from moescope.probe.batching import PlannedBatch, plan_batches
from moescope.probe.errors import InputError, ModelInputError, RunError
from moescope.probe.models import ModelBundle
from moescope.probe.norms import require_norms
from moescope.probe.prompts import Prompt
from moescope.probe.recording import record
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.routers import LayerInfo, RouterSite, find_routers, verify_routers
from moescope.probe.run_facts import describe_run
from moescope.probe.storage.ingester import start_ingester
from moescope.probe.storage.run_folder import RunFolder
from moescope.probe.storage.run_log import RunLog, run_log
from moescope.probe.storage.runs import begin_run
from moescope.probe.storage.shards import shard_name, write_shard
from moescope.probe.storage.store import Store
from moescope.probe.trace_options import TraceOptions

__all__ = ["Progress", "TraceOptions", "TraceSummary", "trace_prompts"]

#: Called with prompts done, prompts in all, and a few words (speed, bytes).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TraceSummary:
    """What a finished run holds, and what recording it took this time.

    Attributes:
        tokens: tokens in the run, rows of the table `tokens`.
        rows: rows of `routing` in the run; 0 at level usage.
        resumed: prompts that an earlier, interrupted call had recorded.
        seconds, size_bytes: time and shards of this call alone.
    """

    run_id: str
    prompts: int
    tokens: int
    rows: int
    resumed: int
    seconds: float
    size_bytes: int


@dataclass
class _Tally:
    """What one call has recorded so far."""

    started: float = field(default_factory=time.monotonic)
    prompts: int = 0
    tokens: int = 0
    rows: int = 0
    size_bytes: int = 0

    @property
    def facts(self) -> dict[str, float]:
        """For the log: what this call has recorded, and in how many seconds."""
        seconds = round(time.monotonic() - self.started, 3)
        return {
            "prompts": self.prompts, "tokens": self.tokens, "rows": self.rows,
            "size_bytes": self.size_bytes, "seconds": seconds,
        }  # fmt: skip

    @property
    def note(self) -> str:
        """Speed and size in a few words."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return (
            f"{self.tokens / seconds:,.0f} tokens/s, {self.rows / seconds:,.0f} rows/s, "
            f"{self.size_bytes / 1e6:,.1f} MB"
        )


def trace_prompts(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    store: str | PathLike[str],
    run: str,
    options: TraceOptions | None = None,
    *,
    manifest: Mapping[str, Any] | None = None,
    keep_shards: bool = False,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> TraceSummary:
    """Record a run, or go on with one that was interrupted.

    Args:
        bundle: model and tokenizer.
        prompts: what to run; see `read_prompts`.
        store: the DuckDB file; made when it does not exist.
        run: the run's name, unique in the store.
        options: how to run and what to keep.
        manifest: further facts for `runs.manifest`, such as the command's arguments.
        keep_shards: leave the Parquet shards beside the store after they are in it.
        announce: told in a sentence what the run waits for.
        progress: called after every batch.

    Raises:
        ModelInputError: the model has no routers that moescope knows.
        RunError: the run exists and is complete, or was begun with other arguments.
        RecordingError: routing would have been recorded wrongly.
        ModelInputError: `norms` on a family whose experts cannot be run one at a time.
    """
    options = options or TraceOptions()
    rendered = [
        render_prompt(
            bundle.tokenizer, prompt, chat_template=options.chat_template, system=options.system
        )
        for prompt in prompts
    ]
    sites = _proved_sites(bundle, rendered, options)
    layers = _kept_layers(sites, options)
    facts = dict(manifest or {})
    if options.norms:
        facts["easyep_missing"] = _try_norms(bundle, rendered, sites, announce)
    batches = plan_batches(
        [len(prompt) for prompt in rendered],
        tokens_per_batch=options.tokens_per_batch,
        extra_tokens=options.max_new_tokens,
    )
    description = describe_run(bundle, rendered, layers, batches, options, facts)
    with begin_run(store, run, description) as point:
        if point.is_complete:
            raise RunError(f"run {run!r} is complete already; choose another name with --run")
        tally, log = _Tally(), run_log(store, run)
        left = [batch for batch in batches if shard_name(batch.index) not in point.finished]
        resumed = len(prompts) - sum(len(batch.members) for batch in left)
        log.write(
            "began" if point.is_new else "resumed", model=bundle.name, prompts=len(prompts),
            batches=len(batches), left=len(left), pid=os.getpid(),
        )  # fmt: skip
        with (
            _stops_logged(log),
            start_ingester(store, point.folder, keep_shards=keep_shards) as ingester,
        ):
            runner = BatchRunner(bundle, rendered, sites, layers, options)
            for batch in left:
                ingester.check()
                tables, num_parts = runner.run(batch)
                if num_parts > 1:
                    _note_halved(point.folder, log, announce, shard_name(batch.index), num_parts)
                _write_batch(batch, rendered, tables, point.folder.path, tally)
                log.write("batch", shard=shard_name(batch.index), **tally.facts)
                if progress is not None:
                    progress(resumed + tally.prompts, len(prompts), tally.note)
            point.folder.finish()
            ingester.wait_until_done(announce=announce)
    return _summary(store, run, len(prompts), resumed, tally)


def _note_halved(
    folder: RunFolder,
    log: RunLog,
    announce: Callable[[str], None] | None,
    shard_id: str,
    num_parts: int,
) -> None:
    """Say it now, and leave word of it for the manifest."""
    folder.add_fact("halved_batches", shard_id, num_parts)
    log.write("halved", shard=shard_id, parts=num_parts)
    if announce is not None:
        announce(
            f"the batch of {shard_id} did not fit into memory and was run in {num_parts} parts; "
            "a smaller --tokens-per-batch avoids that"
        )


@contextmanager
def _stops_logged(log: RunLog) -> Iterator[None]:
    """Leave word of what ends a collection before its time."""
    try:
        yield
    except BaseException as error:
        why = str(error) or type(error).__name__
        log.write("stopped", why=why, by="collector")
        raise


def _summary(
    store: str | PathLike[str], run: str, num_prompts: int, resumed: int, tally: _Tally
) -> TraceSummary:
    """What the run holds now: after a resume the tally of this call is only a part of it."""
    counted = Store(store).query(
        "SELECT (SELECT count(*) FROM tokens WHERE run_id = $run) AS tokens, "
        "(SELECT count(*) FROM routing WHERE run_id = $run) AS rows",
        {"run": run},
    )
    return TraceSummary(
        run_id=run,
        prompts=num_prompts,
        tokens=int(counted["tokens"].item()),
        rows=int(counted["rows"].item()),
        resumed=resumed,
        seconds=time.monotonic() - tally.started,
        size_bytes=tally.size_bytes,
    )


def _proved_sites(
    bundle: ModelBundle, rendered: Sequence[RenderedPrompt], options: TraceOptions
) -> list[RouterSite]:
    """Prove the routers on the first prompt, after what can be refused without running anything."""
    if getattr(bundle.model.config, "is_encoder_decoder", False):
        raise ModelInputError(
            f"{bundle.name} is an encoder-decoder model, whose prompt and answer pass different "
            "layers; a store holds decoder-only runs, so record it with moescope.probe.record"
        )
    if options.norms:
        require_norms(bundle.model, find_routers(bundle.model))
    example = torch.tensor([rendered[0].token_ids], device=bundle.device)
    return verify_routers(bundle.model, example)


def _kept_layers(sites: Sequence[RouterSite], options: TraceOptions) -> list[LayerInfo]:
    """The layers that were asked for."""
    found = [site.info for site in sites]
    if options.layers is None:
        return found
    routed = sorted({info.layer for info in found})
    missing = sorted(set(options.layers) - set(routed))
    if missing:
        raise InputError(f"layers {missing} have no router; the routed layers are {routed}")
    return [info for info in found if info.layer in options.layers]


def _try_norms(
    bundle: ModelBundle,
    rendered: Sequence[RenderedPrompt],
    sites: Sequence[RouterSite],
    announce: Callable[[str], None] | None,
) -> list[int]:
    """Measure norms on the first prompt, so that what cannot be measured is known at the start.

    Returns:
        The layers for which EASY-EP's score cannot be had.
    """
    example = torch.tensor([rendered[0].token_ids], device=bundle.device)
    with record(bundle.model, norms=True, sites=sites) as trace, torch.inference_mode():
        bundle.model(input_ids=example, use_cache=False, logits_to_keep=1)
    missing = []
    for info in trace.layers:
        norms = trace[info.layer, info.kind].norms
        assert norms is not None
        if not torch.isfinite(norms.residual_change).all():
            missing.append(info.layer)
    if missing and announce is not None:
        announce(
            f"easyep_sum stays empty in layers {missing} of {bundle.name}: their experts work in "
            "another width than the residual stream, or what they read is not it"
        )
    return missing


def _write_batch(
    batch: PlannedBatch,
    rendered: Sequence[RenderedPrompt],
    tables: Mapping[str, pa.Table],
    folder: Path,
    tally: _Tally,
) -> None:
    """Write one batch as a shard."""
    written = write_shard(
        folder,
        shard_name(batch.index),
        tables,
        prompt_ids=[rendered[index].prompt.prompt_id for index in batch.members],
    )
    tally.prompts += len(batch.members)
    tally.tokens += tables["tokens"].num_rows
    tally.rows += tables["routing"].num_rows if "routing" in tables else 0
    tally.size_bytes += sum(file.size_bytes for file in written.files.values())
