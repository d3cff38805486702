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
from typing import Any

from moescope.probe.batching import plan_batches
from moescope.probe.engine import BatchDone, Engine, LocalEngine, ModelFacts
from moescope.probe.errors import RunError
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.run_facts import describe_run
from moescope.probe.storage.ingester import start_ingester
from moescope.probe.storage.run_folder import RunFolder
from moescope.probe.storage.run_log import RunLog, run_log
from moescope.probe.storage.runs import begin_run
from moescope.probe.storage.shards import shard_name
from moescope.probe.storage.store import Store
from moescope.probe.trace_options import TraceOptions

__all__ = ["Progress", "TraceOptions", "TraceSummary", "collect", "render_prompts", "trace_prompts"]

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

    def add(self, done: BatchDone) -> None:
        """Count a batch."""
        self.prompts += done.prompts
        self.tokens += done.tokens
        self.rows += done.rows
        self.size_bytes += done.size_bytes

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
    rendered = render_prompts(bundle.tokenizer, prompts, options)
    return collect(
        LocalEngine(bundle, rendered, options),
        rendered,
        store,
        run,
        options,
        manifest={"chat_template": bundle.tokenizer.chat_template, **(manifest or {})},
        keep_shards=keep_shards,
        announce=announce,
        progress=progress,
    )


def render_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], options: TraceOptions
) -> list[RenderedPrompt]:
    """Prompts as the model will see them."""
    return [
        render_prompt(tokenizer, prompt, chat_template=options.chat_template, system=options.system)
        for prompt in prompts
    ]


def collect(
    engine: Engine,
    rendered: Sequence[RenderedPrompt],
    store: str | PathLike[str],
    run: str,
    options: TraceOptions,
    *,
    manifest: Mapping[str, Any],
    keep_shards: bool = False,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> TraceSummary:
    """Plan a run, have an engine run its batches, and have them ingested.

    Args:
        engine: what runs the batches.
        rendered: all prompts of the run, in order.
        store: the DuckDB file; made when it does not exist.
        run: the run's name, unique in the store.
        options: how to run and what to keep.
        manifest: further facts for `runs.manifest`.
        keep_shards: leave the Parquet shards beside the store after they are in it.
        announce: told in a sentence what the run waits for.
        progress: called after every batch.

    Raises:
        RunError: the run exists and is complete, or was begun with other arguments.
        RecordingError: routing would have been recorded wrongly.
    """
    _announce_missing(engine.facts, announce)
    batches = plan_batches(
        [len(prompt) for prompt in rendered],
        tokens_per_batch=options.tokens_per_batch,
        extra_tokens=options.max_new_tokens,
    )
    description = describe_run(engine.facts, rendered, batches, options, manifest)
    with begin_run(store, run, description) as point:
        if point.is_complete:
            raise RunError(f"run {run!r} is complete already; choose another name with --run")
        tally, log = _Tally(), run_log(store, run)
        left = [batch for batch in batches if shard_name(batch.index) not in point.finished]
        resumed = len(rendered) - sum(len(batch.members) for batch in left)
        log.write(
            "began" if point.is_new else "resumed", model=engine.facts.name,
            prompts=len(rendered), batches=len(batches), left=len(left), pid=os.getpid(),
        )  # fmt: skip
        with (
            _stops_logged(log),
            start_ingester(store, point.folder, keep_shards=keep_shards) as ingester,
        ):
            for done in engine.run(left, point.folder.path):
                ingester.check()
                if done.parts > 1:
                    _note_halved(point.folder, log, announce, done)
                tally.add(done)
                log.write("batch", shard=done.shard_id, **tally.facts)
                if progress is not None:
                    progress(resumed + tally.prompts, len(rendered), tally.note)
            point.folder.finish()
            ingester.wait_until_done(announce=announce)
    return _summary(store, run, len(rendered), resumed, tally)


def _announce_missing(facts: ModelFacts, announce: Callable[[str], None] | None) -> None:
    if facts.easyep_missing and announce is not None:
        announce(
            f"easyep_sum stays empty in layers {list(facts.easyep_missing)} of {facts.name}: their "
            "experts work in another width than the residual stream, or what they read is not it"
        )


def _note_halved(
    folder: RunFolder, log: RunLog, announce: Callable[[str], None] | None, done: BatchDone
) -> None:
    """Say it now, and leave word of it for the manifest."""
    folder.add_fact("halved_batches", done.shard_id, done.parts)
    log.write("halved", shard=done.shard_id, parts=done.parts)
    if announce is not None:
        announce(
            f"the batch of {done.shard_id} did not fit into memory and was run in {done.parts} "
            "parts; a smaller --tokens-per-batch avoids that"
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
        "(SELECT coalesce(sum(len(experts)), 0) FROM routing_arrays WHERE run_id = $run) AS rows",
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
