"""Recording a run: planned batches through the model, as shards, through the ingester, stored.

    bundle = load_model("demo")
    summary = trace_prompts(bundle, read_prompts(["refusal"]), "demo.duckdb", "base")

The plan of batches is fixed before the first one runs, so a run that was interrupted goes on with
exactly the batches that are missing when it is started again with the same arguments.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from moescope.probe.batching import PlannedBatch, plan_batches
from moescope.probe.errors import InputError, ModelInputError, RunError
from moescope.probe.generation import (
    GREEDY,
    Sampling,
    batch_sampling,
    generate_batch,
    pad_left,
)
from moescope.probe.models import ModelBundle
from moescope.probe.norms import require_norms
from moescope.probe.outcomes import DETECTOR
from moescope.probe.prompts import Prompt
from moescope.probe.recording import RecordLevel, record
from moescope.probe.rendering import ChatTemplate, RenderedPrompt, render_prompt
from moescope.probe.routers import LayerInfo, RouterSite, find_routers, verify_routers
from moescope.probe.rows import RecordedBatch, batch_tables
from moescope.probe.storage.ingester import start_ingester
from moescope.probe.storage.runs import RunDescription, begin_run
from moescope.probe.storage.shards import shard_name, write_shard
from moescope.probe.storage.store import Store

_PACKAGES = ("moescope", "torch", "transformers", "duckdb", "pyarrow")

#: Called with prompts done, prompts in all, and a few words (speed, bytes).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How prompts are run and what is kept.

    Attributes:
        level: `usage` keeps counts per prompt, `topk` every token's experts and weights too,
            `probs` the router's probability of every expert as well.
        norms: measure what each selected expert put out (see `moescope.probe.norms`).
        max_new_tokens: tokens to generate after each prompt; 0 runs the prompts alone.
        sampling: how answers are generated.
        chat_template: whether prompts go through the tokenizer's chat template.
        system: a system message for all prompts.
        layers: decoder layers to keep; None keeps all routed ones.
        tokens_per_batch: padded tokens of a batch, answers included.
    """

    level: RecordLevel = "topk"
    norms: bool = False
    max_new_tokens: int = 0
    sampling: Sampling = GREEDY
    chat_template: ChatTemplate = "auto"
    system: str | None = None
    layers: tuple[int, ...] | None = None
    tokens_per_batch: int = 4096


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
    description = _describe(bundle, rendered, layers, batches, options, facts)
    with begin_run(store, run, description) as point:
        if point.is_complete:
            raise RunError(f"run {run!r} is complete already; choose another name with --run")
        tally = _Tally()
        left = [batch for batch in batches if shard_name(batch.index) not in point.finished]
        resumed = len(prompts) - sum(len(batch.members) for batch in left)
        with start_ingester(store, point.folder, keep_shards=keep_shards) as ingester:
            for batch in left:
                ingester.check()
                tables = _run_batch(bundle, batch, rendered, sites, layers, options)
                _write_batch(batch, rendered, tables, point.folder.path, tally)
                if progress is not None:
                    progress(resumed + tally.prompts, len(prompts), tally.note)
            point.folder.finish()
            ingester.wait_until_done(announce=announce)
    return _summary(store, run, len(prompts), resumed, tally)


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


def _run_batch(
    bundle: ModelBundle,
    batch: PlannedBatch,
    rendered: Sequence[RenderedPrompt],
    sites: Sequence[RouterSite],
    layers: Sequence[LayerInfo],
    options: TraceOptions,
) -> Mapping[str, pa.Table]:
    """Run one planned batch; the store's rows, table by table."""
    members = [rendered[index] for index in batch.members]
    padded = pad_left(
        [prompt.token_ids for prompt in members], bundle.tokenizer.pad_token_id, bundle.device
    )
    with record(bundle.model, norms=options.norms, sites=sites) as trace:
        if options.max_new_tokens > 0:
            answers = generate_batch(
                bundle,
                padded,
                max_new_tokens=options.max_new_tokens,
                sampling=batch_sampling(options.sampling, batch.index),
            )
        else:
            answers = None
            positions = padded.attention_mask.cumsum(dim=-1).sub(1).clamp(min=0)
            with torch.inference_mode():
                bundle.model(
                    input_ids=padded.input_ids,
                    attention_mask=padded.attention_mask,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=1,
                )
    return batch_tables(
        RecordedBatch(members, answers, trace),
        layers=layers,
        level=options.level,
        tokenizer=bundle.tokenizer,
    )


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


def _describe(
    bundle: ModelBundle,
    rendered: Sequence[RenderedPrompt],
    layers: Sequence[LayerInfo],
    batches: Sequence[PlannedBatch],
    options: TraceOptions,
    manifest: Mapping[str, Any],
) -> RunDescription:
    """Everything about the run that is known before its first batch."""
    arguments = {**asdict(options), "sampling": options.sampling.to_json()}
    numbers = {
        "dtype": str(bundle.model.dtype).removeprefix("torch."),
        "device": bundle.device.type,
        "threads": torch.get_num_threads(),
    }
    versions = {name: version(name) for name in _PACKAGES}
    identity = {
        "model": bundle.name,
        "revision": bundle.revision,
        "prompts_sha256": _prompts_hash(rendered),
        "arguments": arguments,
        "versions": {name: versions[name] for name in ("torch", "transformers")},
        **numbers,
    }
    facts = {
        "versions": {**versions, "python": platform.python_version()},
        "arguments": arguments,
        "detector": DETECTOR,
        "chat_template": bundle.tokenizer.chat_template,
        **numbers,
        **manifest,
    }
    return RunDescription(
        model=bundle.name,
        revision=bundle.revision,
        family=bundle.family,
        record_level=options.level,
        layers=[_layer_row(info) for info in layers],
        manifest=facts,
        identity=identity,
        planned_shards={
            shard_name(batch.index): [rendered[i].prompt.prompt_id for i in batch.members]
            for batch in batches
        },
    )


def _layer_row(info: LayerInfo) -> dict[str, Any]:
    return {
        "layer": info.layer,
        "kind": info.kind,
        "moe_layer": info.moe_layer,
        "module": info.module,
        "num_experts": info.num_experts,
        "top_k": info.top_k,
        "num_shared_experts": info.num_shared_experts,
        "rule": {**info.rule.to_json(), "verified": info.verified, "reason": info.reason},
    }


def _prompts_hash(rendered: Sequence[RenderedPrompt]) -> str:
    """One hash over all prompts as they are run, with their labels."""
    digest = hashlib.sha256()
    for prompt in rendered:
        fields = {**asdict(prompt.prompt), "rendered": prompt.text, "tokens": prompt.token_ids}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()
