"""Cheap estimates of what each expert causes, beside exact effects: the table of what was tried.

    python benchmarks/attribution_trials.py [demo demo-random] [--prompts 16] [--mode drop]

The target is the model's own refusal opening minus that of the withheld answer, on sensitive
prompts that it refuses. Exact effects take each expert out alone (240 forwards of all
rows). A cost is in forwards of all rows, a backward counted as two. Ways tried:

- first-order: slopes of the model as it is;
- all weights x a: slopes where every expert of every layer is scaled;
- leave-outs p: slopes with random experts of each row out (expected gradients), 4 passes;
- halfway, N passes: slopes of each N-th of the experts halfway out, alone;
- integrated, N passes: what `attribute(integrated_steps=N)` gives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.probe import load_model, read_prompts
from moescope.probe.generation import generate_batch, pad_left
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.probe.routers import find_routers
from moescope.steering import SteeringPlan, steer
from moescope.steering.causes.agreement import compared, without
from moescope.steering.causes.attribution import Attribution, Mode, Removal, attribute, estimated
from moescope.steering.causes.integrated import PartwayRemoval
from moescope.steering.causes.leaves import Moved, Routed
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.targets import OpeningDifference, TargetRow, target_rows

Case = tuple[ModelBundle, list[TargetRow], list[RenderedPrompt]]


class Shrunk(Removal):
    """Slopes where every weight is a share of itself: of all experts, or of random ones."""

    def __init__(self, share: float, left_out: float | None, seed: int) -> None:
        super().__init__("drop")
        self.share, self.left_out = share, left_out
        self.generator = torch.Generator().manual_seed(seed)
        self.num_rows = 1
        self.moved: Moved | None = self._shrunk

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """A forward begins with rows of these prompts."""
        super().begin(prompt_ids)
        self.num_rows = len(prompt_ids)

    def _shrunk(self, routed: Routed, weights: Tensor, _slots: Tensor) -> Tensor:
        if self.left_out is None:
            return weights * (self.share - 1)
        num_tokens, num_experts = routed.logits.shape
        chance_BE = torch.rand(self.num_rows, num_experts, generator=self.generator)
        out_TE = (chance_BE < self.left_out).repeat_interleave(num_tokens // self.num_rows, 0)
        return weights * (self.share - 1) * out_TE.gather(1, routed.ids)


def case_of(name: str, number: int) -> Case:
    """The model, and the target on prompts that it refuses."""
    bundle = load_model(name)
    prompts = [one for one in read_prompts(["refusal"]) if one.label == "sensitive"]
    order = np.random.default_rng(0).permutation(len(prompts))[:number]
    rendered = [render_prompt(bundle.tokenizer, prompts[at]) for at in order]
    batch = pad_left([one.token_ids for one in rendered], bundle.tokenizer.pad_token_id)
    answers = generate_batch(bundle, batch, max_new_tokens=24)
    said = {
        one.prompt.prompt_id: answer.text for one, answer in zip(rendered, answers, strict=True)
    }
    rendered = [
        one for one in rendered
        if (one.prompt.expected or "").lower() not in said[one.prompt.prompt_id].lower()
    ]  # fmt: skip
    target = OpeningDifference(first=said)
    return bundle, target_rows(bundle, target, rendered), rendered


def exact_effects(case: Case, found: Attribution, mode: Mode) -> NDArray[np.float64]:
    """The mean effect of each expert, taken out alone, float64[X]."""
    model = case[0].model
    effects = []
    for key in found.experts:
        with steer(model, without(SteeringPlan(), key, mode)):
            effects.append(float((measure_target(*case) - found.baseline).mean()))
    return np.array(effects)


def means_of(run: Callable[[], Attribution]) -> NDArray[np.float64]:
    """The estimates' means over prompts."""
    return run().means


def tried(case: Case, mode: Mode) -> list[tuple[str, float, Callable[[], NDArray[np.float64]]]]:
    """Name, cost and how to get the estimates, float64[X]."""
    sites = find_routers(case[0].model)

    def one(change: Removal) -> NDArray[np.float64]:
        return estimated(
            *case, change, base_plan=None, sites=sites, tokens_per_batch=1024
        ).means  # fmt: skip

    def several(changes: Sequence[Removal]) -> NDArray[np.float64]:
        total: NDArray[np.float64] = np.sum([one(change) for change in changes], axis=0)
        return total

    ways: list[tuple[str, float, Callable[[], NDArray[np.float64]]]] = [
        ("first-order", 3, lambda: attribute(*case, mode=mode, num_checked=0).means)
    ]
    if mode == "drop":
        for share in (0.75, 0.5, 0.25):
            ways.append(
                (f"all weights x {share}", 3, lambda share=share: one(Shrunk(share, None, 0)))
            )
        for chance in (0.05, 0.2):
            left_out = [Shrunk(0.0, chance, at) for at in range(4)]
            ways.append((f"leave-outs {chance}, 4 passes", 12, partial(several, left_out)))
    for passes in (5, 10):
        halfway = [PartwayRemoval(mode, at, passes, 0, way=0.5) for at in range(passes)]
        ways.append((f"halfway, {passes} passes", 3 * passes, partial(several, halfway)))
        both = partial(attribute, *case, mode=mode, integrated_steps=passes, num_checked=0)
        ways.append((f"integrated, {passes} passes", 3 * passes + 3, partial(means_of, both)))
    return ways


def main() -> None:
    """Measure and print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo", "demo-random"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--mode", choices=["drop", "drop_renorm", "replace"], default="drop")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # more of them only wait for each other on models this small
    for name in asked.models:
        case = case_of(name, asked.prompts)
        ways = tried(case, asked.mode)
        first = attribute(*case, mode=asked.mode, num_checked=0)
        began = time.perf_counter()
        exact = exact_effects(case, first, asked.mode)
        top = np.argsort(-np.abs(exact))[:40]
        print(f"\n{name}, {asked.mode}: {len(exact)} experts, {len(case[2])} prompts; "
              f"exact effects in {time.perf_counter() - began:.0f} s")  # fmt: skip
        print(f"{'way':24} {'all experts':22} {'top 40':>7} {'linear':>7} {'cost':>5} {'s':>5}")
        for label, cost, estimates in ways:
            began = time.perf_counter()
            found = estimates()
            every = compared(first.experts, found, exact, len(case[2]))
            best = compared(first.experts[:40], found[top], exact[top], len(case[2]))
            ends = f"{every.spearman:.3f} [{every.low:.3f}, {every.high:.3f}]"
            linear = np.corrcoef(found, exact)[0, 1]
            print(f"{label:24} {ends:22} {best.spearman:7.3f} {linear:7.3f} {cost:5.0f} "
                  f"{time.perf_counter() - began:5.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
