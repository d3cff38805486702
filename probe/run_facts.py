"""What a run is: its identity, its manifest, its layers, known before the first batch."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from moescope.probe.batching import PlannedBatch
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import DETECTOR
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo
from moescope.probe.storage.runs import RunDescription
from moescope.probe.storage.shards import shard_name
from moescope.probe.trace_options import TraceOptions

_PACKAGES = ("moescope", "torch", "transformers", "duckdb", "pyarrow")


def describe_run(
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
