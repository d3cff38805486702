"""Exact ablation: what a number of each prompt becomes when one expert is taken out of one layer.

    Δ[l, e] = m(model without expert e in layer l) - m(model)

for every expert of every layer (our methods, 10.5), without running the whole model for each:
layers before the router are not run again, rows that never use an expert are not run without it,
and many experts of one layer run side by side in one forward (`moescope.steering.causes.restart`).
The numbers are those of `measure_target` inside `steer` with a `mask` plan.

Letters: X experts scanned, P prompts, U units, D draws, B rows of a batch, S columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.steering.apply import steer
from moescope.steering.causes.keys import ExpertKey, Mode
from moescope.steering.causes.measuring import TargetBatch, target_batches
from moescope.steering.causes.proof import Bench, proved_savings
from moescope.steering.causes.reach import Pairs, changed_tokens, pairs_of, used_tokens
from moescope.steering.causes.restart import (
    LADDER,
    REFUSALS,
    Savings,
    head_of,
    without_experts,
)
from moescope.steering.causes.scan_plan import ScanPlan, Via, planned_scan
from moescope.steering.causes.scan_store import ScanChunk, ScanStore
from moescope.steering.causes.shares import effect_columns
from moescope.steering.causes.stored_batch import StoredBatch, store_batch
from moescope.steering.causes.targets import TargetRow
from moescope.steering.plan import SteeringPlan

Progress = Callable[[int, int], None]
FloatArray = NDArray[np.float64]

#: Logits made at once; they take most of the memory of a forward.
_LOGITS = 2**26


@dataclass(frozen=True, kw_only=True, eq=False)
class AblationScan:
    """The effect of every expert on every prompt.

    Attributes:
        mode: how experts were taken out.
        via: of mode `replace`.
        experts: layer, kind and expert, X of them.
        baseline: m(model) of each prompt, under the base plan where there is one, float64[P].
        effects: m without the expert minus the baseline, float64[X, P]; exactly 0 where the
            removal changes the routing of no token that the target can see.
        tokens_used: tokens of the prompt's rows that use the expert, int64[X, P].
        base_plan: what was active all the time.
        notes: layers in which not all savings could be relied upon, in sentences.
        num_found: chunks that were in the store already.
    """

    mode: Mode
    via: Via
    experts: tuple[ExpertKey, ...]
    baseline: FloatArray
    effects: FloatArray
    tokens_used: NDArray[np.int64]
    base_plan: SteeringPlan | None
    notes: tuple[str, ...] = ()
    num_found: int = 0

    def frame(self, units: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
        """One row per expert.

        Args:
            units: of each prompt, what was sampled independently (`pair_id`, else the prompt).
            seed: of the bootstrap.

        Returns:
            `layer, kind, expert, effect` (mean over prompts), `low, high` (95 %, whole units drawn
            with replacement; NaN with fewer than two units), `n` (prompts), `num_prompts_used`
            (prompts with a token that uses the expert), `num_units`.
        """
        if len(units) != self.effects.shape[1]:
            raise ValueError(f"{len(units)} units were given for {self.effects.shape[1]} prompts")
        columns = effect_columns(self.effects, units, seed)
        layers, kinds, experts = zip(*self.experts, strict=True) if self.experts else ((), (), ())
        return pd.DataFrame({
            "layer": np.array(layers, dtype=np.int64),
            "kind": list(kinds),
            "expert": np.array(experts, dtype=np.int64),
            **columns,
            "num_prompts_used": (self.tokens_used > 0).sum(1),
            "num_units": len(set(units)),
        })  # fmt: skip


def scan(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    *,
    mode: Mode = "drop",
    via: Via = "min",
    experts: Collection[ExpertKey] | None = None,
    base_plan: SteeringPlan | None = None,
    tokens_per_batch: int = 1024,
    tokens_per_forward: int | None = None,
    progress: Progress | None = None,
    store: str | Path | None = None,
    savings: Sequence[Savings] = LADDER,
) -> AblationScan:
    """Take out every expert of every layer, one at a time.

    Args:
        bundle: model and tokenizer.
        rows: from `target_rows`.
        rendered: the prompts.
        mode: how an expert is taken out, as for the action `mask`.
        via: of mode `replace`.
        experts: layer, kind and expert of those to take out; all without it, but for those that
            the base plan acts on already.
        base_plan: active all the time; effects are those of one more expert.
        tokens_per_batch: padded tokens of the batches that are stored.
        tokens_per_forward: tokens computed in a forward without experts; without it 1,024 on a
            CPU, where larger forwards are slower, and 16,384 elsewhere.
        progress: called with (pairs of row and expert done, in all).
        store: a store in which finished parts are kept, so that the same call goes on where it was
            killed; made when missing.
        savings: what to try, from the fastest on; see `moescope.steering.causes.restart`.

    Raises:
        PlanError: an expert that is not there or cannot be taken out, or a base plan that replays.
        ModelInputError: a dense model, or one with an encoder.
    """
    plan = planned_scan(bundle, experts, base_plan, mode, via)
    batches = target_batches(bundle, rows, tokens_per_batch=tokens_per_batch)
    kept = ScanStore.open(
        store, bundle, rows, rendered, plan, {"tokens_per_batch": tokens_per_batch}
    )
    prompt_ids = [one.prompt.prompt_id for one in rendered]
    bench = Bench(bundle, plan.sites, base_plan, prompt_ids)
    if tokens_per_forward is None:
        tokens_per_forward = 1024 if torch.device(bundle.device).type == "cpu" else 16384
    scanner = _Scanner(bench, plan, tokens_per_forward, savings)
    num_prompts, index = len(rendered), {key: at for at, key in enumerate(plan.experts)}
    baseline = np.zeros(num_prompts)
    effects = np.zeros((len(plan.experts), num_prompts))
    tokens_used = np.zeros(effects.shape, dtype=np.int64)
    done, total = 0, len(plan.experts) * len(rows)
    for number, batch in enumerate(batches):
        prompts = np.array([row.prompt for row in batch.rows])
        for chunk in scanner.chunks(number, batch, kept):
            if chunk.module is None:
                np.add.at(baseline, prompts, chunk.values[0])
                continue
            at = [index[key] for key in plan.keys_of(chunk.module)]
            for place, effect, used in zip(at, chunk.values, chunk.used, strict=True):
                np.add.at(effects[place], prompts, effect)
                np.add.at(tokens_used[place], prompts, used)
            done += chunk.values.size
            if progress is not None:
                progress(done, total)
    kept.flush()
    return AblationScan(
        mode=mode, via=via, experts=plan.experts, baseline=baseline, effects=effects,
        tokens_used=tokens_used, base_plan=base_plan, notes=scanner.notes(),
        num_found=kept.num_found,
    )  # fmt: skip


class _Scanner:
    """Runs batches, each without every expert of every router."""

    def __init__(
        self, bench: Bench, plan: ScanPlan, tokens_per_forward: int, ladder: Sequence[Savings]
    ) -> None:
        self.bench = bench
        self.plan = plan
        self.tokens_per_forward = tokens_per_forward
        self.ladder = ladder
        self._savings: dict[str, Savings] = {}
        self._takes_cache = True
        head = head_of(bench.bundle)
        weight = None if head is None else getattr(head, "weight", None)
        self._vocabulary = 1 if weight is None else int(weight.shape[0])

    def chunks(self, number: int, batch: TargetBatch, kept: ScanStore) -> Iterator[ScanChunk]:
        """The baseline of a batch, then the effects of every router's experts on it."""
        wanted = [None, *self.plan.routers]
        stored: StoredBatch | None = None
        for module in wanted:
            chunk = kept.found(number, module)
            if chunk is None:
                with torch.inference_mode():
                    stored = stored or self._stored(batch)
                    chunk = self._chunk(number, stored, module)
                kept.keep(chunk)
            yield chunk

    def notes(self) -> tuple[str, ...]:
        """The routers that did not allow every saving."""
        best = self.ladder[0]
        return tuple(
            f"{self.plan.routers[name].site.where}: savings that could be relied upon: {one.words}"
            for name, one in self._savings.items()
            if one != best
        )

    def _stored(self, batch: TargetBatch) -> StoredBatch:
        from transformers import DynamicCache

        def run(cache: DynamicCache | None) -> StoredBatch:
            base = self.bench.base_plan or SteeringPlan(interventions=[])
            with steer(self.bench.bundle.model, base):
                return store_batch(
                    self.bench.bundle, batch, self.bench.prompt_ids, self.plan.routers,
                    self.plan.stacks, cache=cache,
                )  # fmt: skip

        if self._takes_cache and any(one.columns for one in self.ladder):
            try:
                return run(DynamicCache())
            except REFUSALS:
                self._takes_cache = False
        return run(None)

    def _chunk(self, number: int, stored: StoredBatch, module: str | None) -> ScanChunk:
        shape = stored.batch.inputs.input_ids.shape
        base_B = stored.values.double()
        if module is None:
            return ScanChunk(number, None, base_B[None].cpu().numpy(), np.zeros((1, shape[0]), int))
        router, site = self.plan.routers[module], stored.sites[module]
        if site.decision is None:
            raise RuntimeError(f"{router.site.where} was not reached by the forward")
        experts = [key[2] for key in self.plan.keys_of(module)]
        size = (int(shape[0]), int(shape[1]))
        real_BS = stored.batch.inputs.attention_mask.bool().cpu()
        used_XBS = used_tokens(site.decision, experts, size) & real_BS
        acts_XBS = changed_tokens(
            router, site.decision, site.inputs, site.places, experts, size
        )  # fmt: skip
        acts_XBS = acts_XBS & real_BS & self._reaching(stored, module)
        values_XB = base_B[None].repeat(len(experts), 1)
        pairs = pairs_of(acts_XBS, experts)
        if len(pairs):
            around = self.plan.stacks[module]
            if module not in self._savings:
                self._savings[module] = proved_savings(
                    self.bench, stored, router, around, pairs, self.ladder
                )
            savings = self._savings[module]
            with steer(self.bench.bundle.model, self.bench.rest_of_plan(router.site)):
                for at in self._forwards(pairs, stored.batch, savings):
                    some = pairs.chosen(at)
                    found = without_experts(
                        self.bench.bundle, stored, router, around, some, self.bench.prompt_ids,
                        savings,
                    )  # fmt: skip
                    device = values_XB.device
                    values_XB[some.places.to(device), some.rows.to(device)] = found.double()
        effects = (values_XB - base_B).cpu().numpy()
        return ScanChunk(number, module, effects, used_XBS.sum(-1).numpy())

    def _reaching(self, stored: StoredBatch, module: str) -> torch.Tensor:
        """Tokens that the target can see: in the last layer those it reads, bool[B, S]."""
        num_rows, num_columns = stored.batch.inputs.input_ids.shape
        around = self.plan.stacks[module]
        if around is None or not around.is_last:
            return torch.ones(num_rows, num_columns, dtype=torch.bool)
        kept = torch.tensor([row.num_columns for row in stored.batch.rows])[:, None]
        return torch.arange(num_columns) >= num_columns - kept

    def _forwards(
        self, pairs: Pairs, batch: TargetBatch, savings: Savings
    ) -> Iterator[torch.Tensor]:
        """Which pairs run together: as many as the tokens computed and the logits allow."""
        num_columns = batch.inputs.input_ids.shape[1]
        most = max(1, _LOGITS // (batch.num_columns * self._vocabulary))
        start = 0
        while start < len(pairs):
            width = num_columns - (int(pairs.first[start]) if savings.columns else 0)
            step = min(most, max(1, self.tokens_per_forward // width))
            yield torch.arange(start, min(start + step, len(pairs)))
            start += step
