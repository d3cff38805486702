"""What steering costs: a forward, and a generation, under a plan of 20 edits beside one without.

    python benchmarks/bench_steer.py [--pairs 30]

The edits are masks, forces, biases and scales, five of each, spread over the layers. A masked
model does another computation than a plain one, but of the same size: as many experts run for each
token. Generation has a cache and a decode step per token, where hooks weigh most. Prints the median
ratios with bootstrap intervals, and refuses to when steering is wrong.
"""

from __future__ import annotations

import argparse

import torch
from pairs import compare, machine, model_and_inputs

from moescope.probe import record
from moescope.steering import Intervention, SteeringPlan, steer

PROMPT_TOKENS, NEW_TOKENS = 64, 24


def plan_of_twenty() -> SteeringPlan:
    """Five masks, forces, biases and scales, over 16 layers of 64 experts."""
    kinds = (
        {"action": "mask", "mode": "replace", "via": "min"},
        {"action": "force", "strength": "max"},
        {"action": "bias", "value": 0.5, "unit": "std"},
        {"action": "scale", "value": 2.0, "renormalize": False},
    )
    return SteeringPlan(
        interventions=[
            Intervention(**kinds[number % 4], layer=number % 16, experts=[(7 * number) % 64])
            for number in range(20)
        ]
    )


def main() -> None:
    """Measure, then say the ratio and the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    pairs = parser.parse_args().pairs
    model, inputs = model_and_inputs()
    plan = plan_of_twenty()

    def plain() -> None:
        model(input_ids=inputs, use_cache=False, logits_to_keep=1)

    def steered() -> None:
        with steer(model, plan):
            plain()

    def answer() -> None:
        model.generate(inputs[:, :PROMPT_TOKENS], do_sample=False, max_new_tokens=NEW_TOKENS,
                       min_new_tokens=NEW_TOKENS)  # fmt: skip

    def steered_answer() -> None:
        with steer(model, plan):
            answer()

    with torch.inference_mode():
        with steer(model, plan), record(model) as trace:
            plain()
        masked, forced = plan.interventions[0], plan.interventions[1]
        if (trace[masked.layer].expert_ids == masked.experts[0]).any() or not (
            trace[forced.layer].expert_ids == forced.experts[0]
        ).any(dim=1).all():
            raise SystemExit("steering is wrong; no ratio is reported")
        ratio = compare(plain, steered, pairs=pairs)
        print(f"steer with {len(plan.interventions)} edits / plain forward: {ratio}; {machine()}")
        ratio = compare(answer, steered_answer, pairs=pairs)
    print(
        f"the same in generation of {NEW_TOKENS} tokens: {ratio}; "
        f"tokens/s {1 / ratio.median:.3f} of unsteered"
    )


if __name__ == "__main__":
    main()
