"""What recording costs: a forward with `record` beside the same forward without, interleaved.

    python benchmarks/bench_record.py [--pairs 30] [--level topk|probs|usage] [--norms]

Prints the median ratio with a bootstrap interval, and refuses to when recording is wrong.
"""

from __future__ import annotations

import argparse

import torch
from pairs import compare, machine, model_and_inputs

from moescope.probe import record


def main() -> None:
    """Measure, then say the ratio and the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--level", choices=("topk", "probs", "usage"), default="topk")
    parser.add_argument("--norms", action="store_true")
    options = parser.parse_args()
    model, inputs = model_and_inputs()

    def plain() -> None:
        model(input_ids=inputs, use_cache=False, logits_to_keep=1)

    def recorded() -> None:
        with record(model, level=options.level, norms=options.norms) as trace:
            plain()
        rows = (
            trace.usage(15).num_tokens.sum() // 8
            if options.level == "usage"
            else len(trace[15].expert_ids)
        )
        if rows != 8 * 256:
            raise SystemExit("recording is wrong; no ratio is reported")

    with torch.inference_mode():
        ratio = compare(plain, recorded, pairs=options.pairs)
    print(f"record at {options.level} / plain forward: {ratio}; {machine()}")


if __name__ == "__main__":
    main()
