"""The controls that every evaluation has without being asked: three kinds, several seeds.

Random experts, random experts of similar load, and the bottom of the ranking that the plan was made
from (`moescope.steering.controls`). Loads are measured on the evaluation's own prompts and their
unsteered answers; the bottom of the ranking stands in the plan's provenance where the plan was made
from a table, so that nobody has to bring the table again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
import pandas as pd
import torch

from moescope.probe.batching import plan_batches
from moescope.probe.generation import Answer, pad_left
from moescope.probe.models import ModelBundle
from moescope.probe.recording import record
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo, RouterSite
from moescope.steering.controls import (
    known_bottom_control,
    load_matched_control,
    random_control,
)
from moescope.steering.plan import SteeringPlan

ControlKind = Literal["random", "load-matched", "bottom"]
CONTROL_KINDS: Final[tuple[ControlKind, ...]] = get_args(ControlKind)

_BOTTOM: Final = "bottom"


class StandardControls:
    """The controls of one plan; those matched on load are made when loads are known.

    Attributes:
        names: of the controls, as `random:0`, `load-matched:0`, `bottom`, in their order.
        notes: which kinds there are not, and why.
    """

    def __init__(
        self,
        plan: SteeringPlan,
        infos: Sequence[LayerInfo],
        *,
        num_seeds: int,
        seed: int = 0,
        kinds: Sequence[ControlKind] = CONTROL_KINDS,
    ) -> None:
        """Take a plan that fits the layers.

        Args:
            plan: whose controls.
            infos: the model's routed layers.
            num_seeds: draws of each kind that is drawn; at 0 there are no controls at all.
            seed: the first seed; the others follow it.
            kinds: which kinds, in this order.
        """
        self._plan = plan
        self._infos = infos
        self._made: dict[str, SteeringPlan | None] = {}
        self._seeds: dict[str, int] = {}
        notes: list[str] = []
        if not any(one.experts for one in plan.interventions):
            if num_seeds:
                notes.append("the plan names no experts, so random experts cannot be its control")
            num_seeds = 0
        for kind in kinds if num_seeds else ():
            if kind == _BOTTOM:
                bottom = known_bottom_control(plan, infos)
                if bottom is None:
                    notes.append(
                        "no control from the bottom of the ranking: the plan's provenance does not "
                        "name it (plans made from a table with --model do)"
                    )
                else:
                    self._made[_BOTTOM] = bottom
                continue
            for one in range(seed, seed + num_seeds):
                name = f"{kind}:{one}"
                self._seeds[name] = one
                self._made[name] = random_control(plan, infos, one) if kind == "random" else None
        self.names = tuple(self._made)
        self.notes = tuple(notes)

    @property
    def needs_load(self) -> bool:
        """Whether `plans` needs the experts' loads."""
        return any(plan is None for plan in self._made.values())

    def plans(self, load: pd.DataFrame | None) -> dict[str, SteeringPlan]:
        """The controls by name.

        Args:
            load: `layer`, `kind`, `expert`, `load`, from `measured_load`; needed where
                `needs_load` says so.
        """
        found: dict[str, SteeringPlan] = {}
        for name, plan in self._made.items():
            if plan is None:
                if load is None:
                    raise ValueError("controls matched on load need the experts' loads")
                plan = load_matched_control(self._plan, self._infos, self._seeds[name], load)
            found[name] = plan
        return found


def measured_load(
    bundle: ModelBundle,
    rendered: Sequence[RenderedPrompt],
    answers: Sequence[Answer],
    sites: Sequence[RouterSite],
    *,
    tokens_per_batch: int = 4096,
) -> pd.DataFrame:
    """Each expert's share of its layer's slots, over prompts and the answers given to them.

    Args:
        bundle: model and tokenizer, unsteered at the moment.
        rendered: the prompts.
        answers: what the model wrote, one for each.
        sites: the model's routers.
        tokens_per_batch: padded tokens a forward may hold.

    Returns:
        `layer`, `kind`, `expert`, `load`, one row per expert.
    """
    rows = [
        (*prompt.token_ids, *answer.token_ids[:-1])
        for prompt, answer in zip(rendered, answers, strict=True)
    ]
    with torch.inference_mode(), record(bundle.model, level="usage", sites=sites) as trace:
        for planned in plan_batches([len(row) for row in rows], tokens_per_batch=tokens_per_batch):
            batch = pad_left(
                [rows[member] for member in planned.members],
                bundle.tokenizer.pad_token_id, bundle.device,
            )  # fmt: skip
            bundle.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                position_ids=(batch.attention_mask.cumsum(-1) - 1).clamp(min=0),
            )  # fmt: skip
    parts = []
    for info in trace.layers:
        counts_E = trace.usage((info.layer, info.kind)).num_tokens.numpy().astype(np.float64)
        parts.append(pd.DataFrame({
            "layer": info.layer, "kind": info.kind, "expert": np.arange(len(counts_E)),
            "load": counts_E / max(counts_E.sum(), 1.0),
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)
