"""Swaps: what a part of one model does in another of the same architecture.

A tuned model and the base it came from differ in some weights. Put the base's expert into the
tuned model and measure the behaviour again: what is lost was in that expert. The other way round,
a tuned part in the base, says whether the part is enough by itself. Both are exact.

The effect of a part on a target m is `m(host with the donor's part) - m(host)`, per prompt. Parts
whose weights are equal have the effect 0 and are not run.

Source: ours; exchanging trained parts to find those that hold a skill is what Panigrahi et al.
(arXiv 2302.06600) call grafting.

Letters: X parts, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import find_routers
from moescope.steering.causes.exchange import WHATS, Exchange, SwapPart, SwapWhat
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.shares import effect_columns, share_columns
from moescope.steering.causes.targets import TargetRow


@dataclass(frozen=True, eq=False)
class SwapScan:
    """Effects of swaps.

    Attributes:
        parts: X of them.
        max_abs_difference: float64[X], the largest difference of a weight between the models.
        baseline: float64[P], the target of the host as it is.
        donor: float64[P], the target of the donor as it is.
        effects: float64[X, P], m(host with the donor's part) - m(host).
    """

    parts: tuple[SwapPart, ...]
    max_abs_difference: NDArray[np.float64]
    baseline: NDArray[np.float64]
    donor: NDArray[np.float64]
    effects: NDArray[np.float64]

    @property
    def same_weights(self) -> NDArray[np.bool_]:
        """Which parts are the same in both models to the bit, bool[X]; their effect is exactly 0.

        Weights that are not numbers (NaN) in either model count as different.
        """
        return np.asarray(self.max_abs_difference == 0)

    def frame(self, units: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
        """One row per part.

        Columns: `layer` and `expert` (missing for all of them), `kind`, `what`, `effect` with
        `low` and `high` (95 %, over units), `n` prompts, `share` of the way from host to donor
        (1: the host now does as the donor does) with its interval, `max_abs_difference`,
        `same_weights`.

        Args:
            units: the unit of each prompt, such as its `pair_id`.
            seed: of the resampling.
        """
        return pd.DataFrame(
            {
                "layer": pd.array([part.layer for part in self.parts], dtype="Int64"),
                "kind": [part.kind for part in self.parts],
                "expert": pd.array([part.expert for part in self.parts], dtype="Int64"),
                "what": [part.what for part in self.parts],
                **effect_columns(self.effects, units, seed),
                **share_columns(self.effects, self.donor - self.baseline, units, seed),
                "max_abs_difference": self.max_abs_difference,
                "same_weights": self.same_weights,
            }
        )


def expert_parts(model: nn.Module, what: SwapWhat = "both") -> list[SwapPart]:
    """Every single expert of a model, in forward order."""
    return [
        SwapPart(what, site.info.layer, expert, site.info.kind)
        for site in find_routers(model)
        for expert in range(site.info.num_experts)
    ]


def layer_parts(model: nn.Module, whats: Sequence[SwapWhat] = WHATS) -> list[SwapPart]:
    """Every layer as a whole, and all layers of a kind together, for each of `whats`."""
    infos = [site.info for site in find_routers(model)]
    kinds = list(dict.fromkeys(info.kind for info in infos))
    single = [SwapPart(what, info.layer, None, info.kind) for what in whats for info in infos]
    return single + [SwapPart(what, None, None, kind) for what in whats for kind in kinds]


def scan_swaps(
    host: ModelBundle,
    donor: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    *,
    parts: Sequence[SwapPart] | None = None,
    tokens_per_batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> SwapScan:
    """What each part does to a target when the host gets the donor's.

    With the tuned model as the host and its base as the donor, an effect says what goes back; with
    the two exchanged it says what the part brings by itself.

    Args:
        host: the model that is measured; as it was when this returns.
        donor: the other one; only read.
        rows: from `target_rows`.
        rendered: the prompts.
        parts: what is exchanged, one after the other; every single expert, weights and router
            rows, without it.
        tokens_per_batch: padded tokens a forward may hold.
        progress: called with (parts done, parts in all).

    Raises:
        InputError: the models are not of one architecture, or a part is not there.
    """
    parts = expert_parts(host.model) if parts is None else list(parts)
    exchange = Exchange(host.model, donor.model)
    differences = np.array([exchange.max_abs_difference(part) for part in parts], dtype=float)

    def measured(bundle: ModelBundle) -> NDArray[np.float64]:
        return measure_target(bundle, rows, rendered, tokens_per_batch=tokens_per_batch)

    baseline, other = measured(host), measured(donor)
    effects = np.zeros((len(parts), len(rendered)))
    for at, part in enumerate(parts):
        if differences[at] != 0:
            with exchange.swapped([part]):
                effects[at] = measured(host) - baseline
        if progress is not None:
            progress(at + 1, len(parts))
    return SwapScan(tuple(parts), differences, baseline, other, effects)
