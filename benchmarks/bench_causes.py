"""What it costs to know what every expert causes, beside the loop that anybody would write.

    python benchmarks/bench_causes.py [--prompts 24] [--sample 48] [--only demo] [--threads 1]

Two models: `demo` (6 layers of 40 experts, trained) and a random Qwen3-MoE of 16 layers of 64. The
loop masks one expert after the other with `steer` and measures the target with `measure_target`, on
the same batches. The scan is timed before and after it, all experts each time. On the large model
the loop is timed on a random sample of experts and scaled to all, as the report says. Numbers of
both ways are compared; the benchmark stops where they differ by more than 1e-5.

How much is saved depends on how many experts a prompt uses, so that is printed. The random model's
weights are larger than transformers makes them, because its effects would else be too small to
compare; `--spread 10` makes its embeddings larger still, so that tokens are routed less alike.

Attribution of all experts in one backward pass stands beside both. So does the loop as it is
written most often, one prompt a forward, timed on eight experts and scaled: batches alone make up
much of what a scan gains over that one.

The breakdown adds one saving after the other, on all experts of four layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pairs import machine
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moescope.probe.models import ModelBundle, load_model
from moescope.probe.prompts import Prompt, read_prompts
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.steering import Intervention, SteeringPlan, steer
from moescope.steering.causes.ablation import AblationScan, scan
from moescope.steering.causes.attribution import attribute
from moescope.steering.causes.keys import ExpertKey
from moescope.steering.causes.measuring import measure_target
from moescope.steering.causes.restart import Savings
from moescope.steering.causes.targets import AnswerLogProb, Read, TargetRow, target_rows

LAYERS, EXPERTS, TOP_K, VOCABULARY = 16, 64, 8, 4096
GOAL = 8.0
TOLERANCE = 1e-5
Result = TypeVar("Result")

#: One saving after the other, as `moescope.steering.causes.restart` names them.
STEPS = (
    ("only rows that change, many experts a forward", Savings()),
    ("+ restart at the layer", Savings(restart=True)),
    ("+ attention of the layer reused", Savings(restart=True, children=True)),
    ("+ only tokens that change in its block", Savings(restart=True, children=True, tokens=True)),
    ("+ columns from the first change on", Savings(True, True, True, True)),
    ("+ unembedding of read columns only", Savings(True, True, True, True, True)),
)


@dataclass(frozen=True)
class Case:
    """A model and a target on prompts."""

    name: str
    bundle: ModelBundle
    rows: list[TargetRow]
    rendered: list[RenderedPrompt]


class Padding:
    """As much of a tokenizer as rows of ready token ids need."""

    pad_token_id = 0


def demo_case(num_prompts: int) -> Case:
    """The log-probability of the right answers to neutral questions."""
    bundle = load_model("demo", device="cpu")
    prompts = [one for one in read_prompts(["refusal"]) if one.label == "neutral"]
    chosen = np.random.default_rng(0).choice(len(prompts), num_prompts, replace=False)
    rendered = [render_prompt(bundle.tokenizer, prompts[at]) for at in sorted(chosen)]
    rows = target_rows(bundle, AnswerLogProb(mean=True), rendered)
    return Case("demo (6 layers x 40 experts)", bundle, rows, rendered)


def large_case(num_prompts: int, spread: float) -> Case:
    """The mean log-probability of 8 random tokens after random prompts of 12 to 24."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=64, moe_intermediate_size=64,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=True, mlp_only_layers=[],
        initializer_range=0.2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(spread)
    bundle = ModelBundle(model, Padding(), "large", None, "qwen3_moe")
    random = np.random.default_rng(0)
    rows, rendered = [], []
    for at in range(num_prompts):
        ids = random.integers(2, VOCABULARY, int(random.integers(12, 25)) + 8).tolist()
        prompt, answer = tuple(ids[:-8]), ids[-8:]
        whole = RenderedPrompt(
            Prompt(prompt_id=at, text="-", set_name="s"), "-", prompt, (), (), ()
        )
        reads = tuple(Read(8 - place, token, 1 / 8) for place, token in enumerate(answer))
        rows.append(TargetRow(at, (*prompt, *answer[:-1]), len(prompt), reads, 8))
        rendered.append(whole)
    return Case(f"random qwen3_moe ({LAYERS} layers x {EXPERTS} experts)", bundle, rows, rendered)


def loop(
    case: Case, experts: Sequence[ExpertKey], tokens_per_batch: int = 1024
) -> NDArray[np.float64]:
    """One whole measurement for each expert, float64[X, P]."""

    def measured() -> NDArray[np.float64]:
        return measure_target(
            case.bundle, case.rows, case.rendered, tokens_per_batch=tokens_per_batch
        )

    baseline = measured()
    effects = []
    for layer, kind, expert in experts:
        mask = Intervention(
            action="mask", mode="drop", layer=layer, kind=kind, experts=[expert]
        )  # fmt: skip
        with steer(case.bundle.model, SteeringPlan(interventions=[mask])):
            effects.append(measured() - baseline)
    return np.array(effects)


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What it gave, and seconds."""
    start = time.perf_counter()
    found = run()
    return found, time.perf_counter() - start


def difference(found: AblationScan, experts: Sequence[ExpertKey], wanted: Sequence[float]) -> float:
    """The largest difference of any prompt's effect."""
    at = [found.experts.index(key) for key in experts]
    return float(np.abs(found.effects[at] - wanted).max())


def compare(case: Case, sample: int) -> float:
    """Print both times and the breakdown; how many times faster the scan is."""

    def whole() -> AblationScan:
        return scan(case.bundle, case.rows, case.rendered)

    found, before = timed(whole)
    every = list(found.experts)
    chosen = every
    if sample < len(every):
        drawn = np.random.default_rng(1).choice(len(every), sample, replace=False)
        chosen = [every[at] for at in sorted(drawn)]
    print(f"\n{case.name}: {len(case.rendered)} prompts, {len(every)} experts", flush=True)
    effects, seconds = timed(lambda: loop(case, chosen))
    _, after = timed(whole)
    naive, fast = seconds * len(every) / len(chosen), (before + after) / 2
    how = "all" if len(chosen) == len(every) else f"scaled from {len(chosen)} random ones to all"
    worst = difference(found, chosen, effects)
    used = float((found.tokens_used > 0).mean())
    print(f"  loop of whole forwards ({how}): {naive:.1f} s")
    print(
        f"  scan: {before:.1f} s before it, {after:.1f} s after it; {naive / fast:.1f} times faster"
    )
    largest = float(np.abs(effects).max())
    print(f"  largest effect {largest:.1e}, largest difference of the two ways {worst:.1e}")
    print(f"  a prompt uses {used:.0%} of the experts")
    for note in found.notes:
        print(f"  {note}")
    if worst > TOLERANCE:
        raise SystemExit("the numbers differ; no ratio holds")
    by_gradient(case, naive, fast)
    few = every[:: max(1, len(every) // 8)][:8]
    _, seconds = timed(lambda: loop(case, few, tokens_per_batch=1))
    single = seconds * len(every) / len(few)
    print(
        f"  loop of one prompt a forward (scaled from {len(few)}): {single:.1f} s; the scan is "
        f"{single / fast:.1f} times faster"
    )
    breakdown(case, every, naive / len(every))
    return naive / fast


def by_gradient(case: Case, naive: float, fast: float) -> None:
    """Time the first-order estimate of all experts beside the loop and the scan."""
    pairs = [
        timed(lambda: attribute(case.bundle, case.rows, case.rendered, num_checked=0))[1]
        for _ in range(5)
    ]
    seconds = float(np.median(pairs))
    print(
        f"  attribution of all experts, median of {len(pairs)}: {seconds:.2f} s; "
        f"{fast / seconds:.0f} times faster than the scan, {naive / seconds:.0f} times faster than "
        "the loop"
    )


def breakdown(case: Case, experts: Sequence[ExpertKey], seconds_each: float) -> None:
    """What each saving brings, on all experts of layers evenly spread.

    Args:
        case: the case.
        experts: all of its experts.
        seconds_each: what the loop takes for one.
    """
    layers = sorted({layer for layer, _, _ in experts})
    some = {layers[round(at)] for at in np.linspace(0, len(layers) - 1, 4)}
    chosen = [key for key in experts if key[0] in some]
    seconds = seconds_each * len(chosen)
    print(f"  breakdown on layers {sorted(some)}; the loop, scaled: {seconds:.1f} s", flush=True)
    for words, savings in STEPS:
        _, part = timed(
            lambda savings=savings: scan(
                case.bundle, case.rows, case.rendered, experts=chosen, savings=[savings]
            )
        )
        print(f"    {words}: {part:.1f} s ({seconds / part:.1f} x)", flush=True)


def main() -> None:
    """Measure, then say the ratios and the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--sample", type=int, default=48)
    parser.add_argument("--only", choices=("demo", "large"))
    parser.add_argument("--spread", type=float, default=1.0, help="factor on large embeddings")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    for name, sample in (("demo", 10_000), ("large", arguments.sample)):
        if arguments.only not in (None, name):
            continue
        if name == "demo":
            case = demo_case(arguments.prompts)
        else:
            case = large_case(arguments.prompts, arguments.spread)
        ratio = compare(case, sample)
        print(f"  goal of {GOAL:g} times: {'met' if ratio >= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
