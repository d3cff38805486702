"""What steering costs: a forward under a plan of 20 edits beside the same forward without.

    python benchmarks/bench_steer.py [--pairs 30]

The edits are masks, forces, biases and scales, five of each, spread over the layers. A masked
model does another computation than a plain one, but of the same size: as many experts run for each
token. Prints the median ratio with a bootstrap interval, and refuses to when steering is wrong.
"""

from __future__ import annotations

import argparse

import torch
from pairs import compare, machine, model_and_inputs

from moescope.probe import record
from moescope.steering import Intervention, SteeringPlan, steer


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


if __name__ == "__main__":
    main()
