"""What recording costs: a forward with `record` beside the same forward without, interleaved.

    python benchmarks/bench_record.py [--pairs 30]

Prints the median ratio with a bootstrap interval, and refuses to when recording is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moescope.probe import record


def model_and_inputs() -> tuple[torch.nn.Module, torch.Tensor]:
    """A random OLMoE: 16 layers, 64 experts, top-8, width 512; 8 prompts of 256 tokens."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=256, num_hidden_layers=16,
        num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=8,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).eval()
    return model, torch.randint(2, 1000, (8, 256))


def timed(run: object) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    """Measure, then say the ratio and the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    pairs = parser.parse_args().pairs
    model, inputs = model_and_inputs()

    def plain() -> None:
        model(input_ids=inputs, use_cache=False, logits_to_keep=1)

    def recorded() -> None:
        with record(model) as trace:
            plain()
        if trace[15].expert_ids.shape != (8 * 256, 8):
            raise SystemExit("recording is wrong; no ratio is reported")

    with torch.inference_mode():
        plain()
        recorded()
        ratios = []
        for pair in range(pairs):
            order = (plain, recorded) if pair % 2 else (recorded, plain)
            seconds = {run: timed(run) for run in order}
            ratios.append(seconds[recorded] / seconds[plain])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, pairs)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    print(
        f"record / plain forward: {np.median(ratios):.3f} [{low:.3f}, {high:.3f}], median of "
        f"{pairs} interleaved pairs; {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
