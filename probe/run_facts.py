"""What a run is: its identity, its manifest, its layers, known before the first batch."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from moescope.probe.batching import PlannedBatch
from moescope.probe.engine import ModelFacts
from moescope.probe.outcomes import DETECTOR
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo
from moescope.probe.storage.runs import RunDescription
from moescope.probe.storage.shards import shard_name
from moescope.probe.trace_options import TraceOptions

_PACKAGES = ("moescope", "torch", "transformers", "duckdb", "pyarrow")


def describe_run(
    model: ModelFacts,
    rendered: Sequence[RenderedPrompt],
    batches: Sequence[PlannedBatch],
    options: TraceOptions,
    manifest: Mapping[str, Any],
) -> RunDescription:
    """Everything about the run that is known before its first batch."""
    arguments = {**asdict(options), "sampling": options.sampling.to_json()}
    numbers = {"dtype": model.dtype, "device": model.device, "threads": model.threads}
    versions = {name: version(name) for name in _PACKAGES}
    identity = {
        "model": model.name,
        "revision": model.revision,
        "prompts_sha256": _prompts_hash(rendered),
        "arguments": arguments,
        "versions": {name: versions[name] for name in ("torch", "transformers")},
        **numbers,
    }
    facts = {
        "versions": {**versions, "python": platform.python_version()},
        "arguments": arguments,
        "detector": DETECTOR,
        **numbers,
        **({"easyep_missing": list(model.easyep_missing)} if options.norms else {}),
        **manifest,
    }
    return RunDescription(
        model=model.name,
        revision=model.revision,
        family=model.family,
        record_level=options.level,
        layers=[_layer_row(info) for info in model.layers],
        manifest=facts,
        identity=identity,
        routing_in=options.routing_in,
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
