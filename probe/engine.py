"""What runs the planned batches of a run, leaving each as a whole shard; here, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from moescope.probe.batch_run import BatchRunner, is_out_of_memory, too_long
from moescope.probe.batching import PlannedBatch
from moescope.probe.errors import InputError, ModelInputError
from moescope.probe.models import ModelBundle
from moescope.probe.norms import require_norms
from moescope.probe.recording import record
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo, RouterSite, find_routers, verify_routers
from moescope.probe.storage.shards import shard_name, write_shard
from moescope.probe.storage.slots import num_slots
from moescope.probe.trace_options import TraceOptions


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a run's description says of the model and of the process that runs it.

    Attributes:
        name, revision, family: as in `ModelBundle`.
        dtype, device, threads: what decides the numbers, besides the weights.
        layers: the routers to keep, proved.
        easyep_missing: with norms, layers for which EASY-EP's score cannot be had.
    """

    name: str
    revision: str | None
    family: str
    dtype: str
    device: str
    threads: int
    layers: tuple[LayerInfo, ...]
    easyep_missing: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BatchDone:
    """A planned batch that is a whole shard now.

    Attributes:
        shard_id: the shard.
        prompts, tokens, rows, size_bytes: what it holds; `rows` are those of `routing`.
        parts: in how many parts it was run; more than one when memory was too small for it whole.
        pid: the process that ran it.
    """

    shard_id: str
    prompts: int
    tokens: int
    rows: int
    size_bytes: int
    parts: int
    pid: int


class Engine(Protocol):
    """Runs planned batches, here or elsewhere."""

    @property
    def facts(self) -> ModelFacts:
        """Model and process, with routers that were proved on the first prompt."""

    def run(self, batches: Sequence[PlannedBatch], folder: Path) -> Iterator[BatchDone]:
        """Run batches in any order; each is yielded when its shard is whole in `folder`."""


class LocalEngine:
    """Runs batches in this process.

    Args:
        bundle: model and tokenizer.
        rendered: all prompts of the run, in order.
        options: how to run and what to keep.

    Raises:
        ModelInputError: the model has no routers that moescope knows, or its norms cannot be
            measured.
        InputError: a layer to keep has no router.
    """

    def __init__(
        self, bundle: ModelBundle, rendered: Sequence[RenderedPrompt], options: TraceOptions
    ) -> None:
        self._rendered = rendered
        try:
            sites = _proved_sites(bundle, rendered[0], options)
            missing = _without_easyep(bundle, rendered[0], sites) if options.norms else ()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise too_long(rendered[0], options, bundle.device) from error
        layers = _kept_layers(sites, options)
        self.facts = ModelFacts(
            name=bundle.name,
            revision=bundle.revision,
            family=bundle.family,
            dtype=str(bundle.model.dtype).removeprefix("torch."),
            device=bundle.device.type,
            threads=torch.get_num_threads(),
            layers=tuple(layers),
            easyep_missing=missing,
        )
        self._runner = BatchRunner(bundle, sites, layers, options)

    def run(self, batches: Sequence[PlannedBatch], folder: Path) -> Iterator[BatchDone]:
        """Run batches one after the other."""
        for batch in batches:
            yield self.run_one(batch, [self._rendered[index] for index in batch.members], folder)

    def run_one(
        self, batch: PlannedBatch, members: Sequence[RenderedPrompt], folder: Path
    ) -> BatchDone:
        """Run the prompts of one planned batch and write its shard into `folder`."""
        tables, parts = self._runner.run(members, batch.index)
        return _write(folder, batch.index, members, tables, parts)


def _write(
    folder: Path,
    index: int,
    members: Sequence[RenderedPrompt],
    tables: Mapping[str, pa.Table],
    parts: int,
) -> BatchDone:
    """Write the rows of a planned batch as a shard into a folder."""
    shard_id = shard_name(index)
    ids = [prompt.prompt.prompt_id for prompt in members]
    written = write_shard(folder, shard_id, tables, prompt_ids=ids)
    return BatchDone(
        shard_id=shard_id,
        prompts=len(ids),
        tokens=written.files["tokens"].rows,
        rows=num_slots(tables["routing_arrays"]) if "routing_arrays" in tables else 0,
        size_bytes=sum(file.size_bytes for file in written.files.values()),
        parts=parts,
        pid=os.getpid(),
    )


def _proved_sites(
    bundle: ModelBundle, first: RenderedPrompt, options: TraceOptions
) -> list[RouterSite]:
    """Prove the routers on the first prompt, after what can be refused without running anything."""
    if getattr(bundle.model.config, "is_encoder_decoder", False):
        raise ModelInputError(
            f"{bundle.name} is an encoder-decoder model, whose prompt and answer pass different "
            "layers; a store holds decoder-only runs, so record it with moescope.probe.record"
        )
    if options.norms:
        require_norms(bundle.model, find_routers(bundle.model))
    example = torch.tensor([first.token_ids], device=bundle.device)
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


def _without_easyep(
    bundle: ModelBundle, first: RenderedPrompt, sites: Sequence[RouterSite]
) -> tuple[int, ...]:
    """Measure norms on the first prompt: the layers for which EASY-EP's score cannot be had."""
    example = torch.tensor([first.token_ids], device=bundle.device)
    with record(bundle.model, norms=True, sites=sites) as trace, torch.inference_mode():
        bundle.model(input_ids=example, use_cache=False, logits_to_keep=1)
    missing = []
    for info in trace.layers:
        norms: Any = trace[info.layer, info.kind].norms
        if not torch.isfinite(norms.residual_change).all():
            missing.append(info.layer)
    return tuple(missing)
