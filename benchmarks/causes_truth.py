"""What swaps, routing patches, paths and direct logits say where the truth is known: the demos.

    python benchmarks/causes_truth.py [--prompts N] [--models demo demo-random]

`demo` and `demo-random` are `demo-base` with 14 experts and their router rows tuned to refuse. The
target is the log-probability of the refusal's opening minus that of the withheld answer's, on
sensitive questions that the model refuses.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pandas as pd

from moescope.probe import load_model, read_prompts
from moescope.probe.demo.models import tuned_experts
from moescope.probe.generation import generate_answers
from moescope.probe.models import ModelBundle
from moescope.probe.outcomes import judge
from moescope.probe.rendering import RenderedPrompt, render_prompt
from moescope.steering.causes.exchange import WHATS, SwapPart, swapped
from moescope.steering.causes.logit_attribution import attribute_logits
from moescope.steering.causes.patching import PatchSide, patch_routing
from moescope.steering.causes.paths import path_effects
from moescope.steering.causes.swaps import layer_parts, scan_swaps
from moescope.steering.causes.targets import OpeningDifference, TargetRow, target_rows

BASE = "demo-base"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60, help="sensitive prompts")
    parser.add_argument("--models", nargs="+", default=["demo", "demo-random"])
    options = parser.parse_args()
    base = load_model(BASE)
    for name in options.models:
        print(f"\n== {name} against {BASE}")
        of_model(name, base, options.prompts)


def of_model(name: str, base: ModelBundle, num_prompts: int) -> None:
    """All tables of one model."""
    tuned = load_model(name)
    rendered, refusals = refused(tuned, num_prompts)
    units = [str(one.prompt.pair_id) for one in rendered]
    rows = target_rows(tuned, OpeningDifference(refusals), rendered)
    truth = {(layer, expert) for layer, own in tuned_experts(name).items() for expert in own}
    print(f"{len(rendered)} prompts refused, {len(set(units))} units, {len(truth)} tuned experts")
    single_experts(tuned, base, rows, rendered, units, truth)
    whole_layers(tuned, base, rows, rendered, units)
    generated(tuned, base, rendered)
    print("\nrouting patched (a: tuned, b: base)")
    patch = patch_routing(PatchSide(tuned, rows, rendered), PatchSide(base, rows, rendered))
    show(patch.summary(units))
    show(patch.frame(units))
    print("\npaths of the tuned experts, each dropped")
    experts = [(layer, "mlp", expert) for layer, expert in sorted(truth)]
    paths = path_effects(tuned, rows, rendered, experts, split_ids=True)
    show(paths.frame(units).pivot(index=["layer", "expert"], columns="path", values="effect"))
    print("\ndirect logit attribution: the parts that write most for the refusal's opening")
    logits = attribute_logits(tuned, rows, rendered)
    frame = logits.frame(units).sort_values("effect", ascending=False)
    frame["tuned"] = [key in truth for key in zip(frame["layer"], frame["expert"], strict=True)]
    show(frame.head(16))
    best = frame[frame["part"] == "expert"].head(len(truth))
    print(
        f"of the {len(truth)} experts that write most for it, {best['tuned'].sum()} are tuned; "
        f"largest error of a logit {logits.max_error:.1g}"
    )


def refused(bundle: ModelBundle, num_prompts: int) -> tuple[list[RenderedPrompt], dict[int, str]]:
    """Sensitive prompts spread over the set that the model refuses, and what it says."""
    prompts = [one for one in read_prompts(["refusal"]) if one.label == "sensitive"]
    step = max(1, len(prompts) // num_prompts)
    rendered = [render_prompt(bundle.tokenizer, one) for one in prompts[::step][:num_prompts]]
    answers = generate_answers(bundle, rendered)
    said = {
        one.prompt.prompt_id: answer.text
        for one, answer in zip(rendered, answers, strict=True)
        if judge(answer.text, expected=one.prompt.expected, lang=one.prompt.lang).outcome
        == "refused"
    }
    return [one for one in rendered if one.prompt.prompt_id in said], said


def single_experts(
    tuned: ModelBundle,
    base: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    units: Sequence[str],
    truth: set[tuple[int, int]],
) -> None:
    """Swaps of single experts with their router rows, both ways."""
    for title, host, donor in (
        ("expert by expert: the base's in the tuned model", tuned, base),
        ("the other way round: the tuned one's in the base", base, tuned),
    ):
        scan = scan_swaps(host, donor, rows, rendered)
        frame = scan.frame(units)
        found = frame[(scan.effects != 0).any(axis=1)]
        named = set(zip(found["layer"], found["expert"], strict=True))
        print(
            f"\n{title}: {len(named)} of {len(frame)} experts named, {len(named & truth)} of "
            f"{len(truth)} tuned ones, {len(named - truth)} others"
        )
        show(found.drop(columns=["kind", "what", "same_weights"]))


def whole_layers(
    tuned: ModelBundle,
    base: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    units: Sequence[str],
) -> None:
    """Share of the way back to the base, layer by layer and in all layers."""
    scan = scan_swaps(tuned, base, rows, rendered, parts=layer_parts(tuned.model))
    frame = scan.frame(units)
    print(
        f"\nlayer by layer, of {scan.baseline.mean():.1f} to {scan.donor.mean():.1f} nats: share "
        "that goes back with experts, routers, both"
    )
    frame["layer"] = ["all" if one is pd.NA else str(one) for one in frame["layer"]]
    frame["back"] = [
        f"{one.share:.3f} [{one.share_low:.3f}, {one.share_high:.3f}]" for one in frame.itertuples()
    ]
    show(frame.pivot(index="layer", columns="what", values="back")[list(WHATS)])


def generated(tuned: ModelBundle, base: ModelBundle, rendered: Sequence[RenderedPrompt]) -> None:
    """Outcomes of greedy answers with all experts, routers or both from the base."""
    counts: dict[str, pd.Series[int]] = {}
    for what in WHATS:
        with swapped(tuned.model, base.model, [SwapPart(what)]):
            answers = generate_answers(tuned, rendered)
        outcomes = [
            judge(answer.text, expected=one.prompt.expected, lang=one.prompt.lang).outcome
            for one, answer in zip(rendered, answers, strict=True)
        ]
        counts[what] = pd.Series(outcomes).value_counts()
    print("\ngreedy answers of the tuned model with these from the base, all layers")
    show(pd.DataFrame(counts).fillna(0).astype(int))


def show(frame: pd.DataFrame) -> None:
    """A table, rounded."""
    print(frame.to_string(float_format=lambda number: f"{number:.3f}"))


if __name__ == "__main__":
    main()
