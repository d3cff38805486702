"""One batch's routing, recorded in one forward and replayed in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.probe.models import ModelBundle
from moescope.probe.recording import Trace, record
from moescope.probe.routers import LayerInfo, RouterSite
from moescope.steering.causes.measuring import TargetBatch, batch_logits, batch_running
from moescope.steering.plan import SteeringPlan

#: The name that replays give the recorded routing.
RECORDED = "recorded"


def batch_values(
    bundle: ModelBundle, batch: TargetBatch, prompt_ids: Sequence[int]
) -> NDArray[np.float64]:
    """The rows' shares of their prompts' targets under the model as it is now, float64[B]."""
    with torch.inference_mode(), batch_running(batch, prompt_ids):
        return batch.values(batch_logits(bundle, batch)).double().cpu().numpy()


def recorded_batch(
    bundle: ModelBundle,
    batch: TargetBatch,
    prompt_ids: Sequence[int],
    sites: Sequence[RouterSite],
) -> tuple[NDArray[np.float64], Trace]:
    """The same, with the routing that gave it: one forward, all layers."""
    with record(bundle.model, level="topk", sites=sites) as trace:
        values = batch_values(bundle, batch, prompt_ids)
    return values, trace


def replays(infos: Sequence[LayerInfo]) -> list[dict[str, Any]]:
    """Interventions that replay `RECORDED` in these layers, all tokens."""
    layers: dict[str, list[int]] = {}
    for info in infos:
        layers.setdefault(info.kind, []).append(info.layer)
    return [
        {"action": "replay", "run": RECORDED, "layers": found, "kind": kind}
        for kind, found in layers.items()
    ]


def replay_plan(infos: Sequence[LayerInfo]) -> SteeringPlan:
    """A plan that replays `RECORDED` in these layers."""
    return SteeringPlan(name="recorded routing", interventions=replays(infos))
