"""Sets of experts found by what they cause, beside those found by use: the page about it.

    python benchmarks/causes_report.py [--out docs/causes]

On `demo` and `demo-random`, whose tuned experts are known. Everything is found on the first half of
the questions, without the truth, and judged on the second half: the searched set (`moescope plan
search`), the same number of experts by usage contrast, by single effects (exact, first-order,
integrated), at random, and the tuned experts themselves. `results.json` holds all numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from moescope.probe import Store, load_model, read_prompts
from moescope.probe.analysis import Filters, expert_contrast
from moescope.probe.demo.models import tuned_experts
from moescope.probe.doctor import examine
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.steering import SteeringPlan
from moescope.steering.causes.ablation import scan
from moescope.steering.causes.asking import ask
from moescope.steering.causes.attribution import attribute
from moescope.steering.causes.keys import ExpertKey
from moescope.steering.causes.search import removal_plan
from moescope.steering.causes.swaps import expert_parts, scan_swaps
from moescope.steering.derive import plan_from_contrast
from moescope.steering.evaluate import evaluate_plan
from moescope.steering.evaluation import Condition, EvaluationResult

MODELS = ("demo", "demo-random")
MOESCOPE = str(Path(sys.executable).with_name("moescope"))
NUM_PROMPTS = 64
NUM_RANDOM = 3
COMMAND = (
    "plan", "search", "{model}", "--prompts", "refusal", "--where", "half=first", "--max-experts",
    "14", "--budget", "0.05", "--out", "{model}-cause.json",
)  # fmt: skip


def searched(model: str, folder: Path) -> tuple[SteeringPlan, str, float]:
    """The plan of `moescope plan search`, what it printed, and the seconds it took."""
    words = [word.format(model=model) for word in COMMAND]
    began = time.monotonic()
    done = subprocess.run(
        [MOESCOPE, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    text = f"$ moescope {' '.join(words)}\n{done.stdout.rstrip()}"
    print(text, flush=True)
    return SteeringPlan.read(folder / f"{model}-cause.json"), text, time.monotonic() - began


def experts_in(plan: SteeringPlan) -> set[tuple[int, int]]:
    """Layer and expert of all that a plan names."""
    return {(int(one.layer or 0), expert) for one in plan.interventions for expert in one.experts}


def by_single_effect(keys: Sequence[ExpertKey], effects: np.ndarray, count: int) -> SteeringPlan:
    """The experts whose removal lowers the target most."""
    order = np.argsort(effects.mean(1), kind="stable")[:count]
    return removal_plan([tuple(keys[at]) for at in order], "replace")  # type: ignore[misc]


def single_effects(bundle: ModelBundle, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Exact effects of all experts, and both estimates, with how they rank them."""
    question = ask(bundle, prompts, "opening", most=NUM_PROMPTS)
    exact = scan(bundle, question.rows, question.rendered, mode="drop")
    found: dict[str, Any] = {"keys": exact.experts, "exact": exact.effects, "note": question.note}
    index = {key: at for at, key in enumerate(exact.experts)}
    for name, passes in (("first-order", None), ("integrated", 5)):
        one = attribute(
            bundle, question.rows, question.rendered, mode="drop", integrated_steps=passes,
            num_checked=0,
        )  # fmt: skip
        order = [index[tuple(key)] for key in one.experts]  # type: ignore[index]
        values = np.zeros_like(exact.effects)
        values[order] = one.values
        found[name] = values
        rho = float(spearmanr(values.mean(1), exact.effects.mean(1)).statistic)
        pearson = float(np.corrcoef(values.mean(1), exact.effects.mean(1))[0, 1])
        found[f"{name} agreement"] = {"spearman": rho, "pearson": pearson, "forwards": one.cost}
        print(f"{bundle.name}, {name}: Spearman {rho:.3f}, Pearson {pearson:.3f}", flush=True)
    return found


def usage_contrast(bundle: ModelBundle, store: Store, count: int) -> SteeringPlan:
    """The experts that refused prompts of the first half use most beyond answered ones."""
    table = expert_contrast(
        store, bundle.name, a={"outcome": ("refused",)}, b={"outcome": ("correct",)},
        filters=Filters(tokens="all", fields={"set_name": ("refusal",), "half": ("first",)}),
    )  # fmt: skip
    return plan_from_contrast(table.frame, num_mask=count, layers=examine(bundle).layers)


def of_model(model: str, store: Store, folder: Path) -> dict[str, Any]:
    """All plans of one model, judged."""
    bundle = load_model(model)
    prompts = read_prompts(["refusal"])
    first = [one for one in prompts if one.meta["half"] == "first"]
    second = [one for one in prompts if one.meta["half"] == "second"]
    tuned = {(layer, one) for layer, experts in tuned_experts(model).items() for one in experts}
    plan, text, seconds = searched(model, folder)
    count = len(experts_in(plan))
    singles = single_effects(bundle, [one for one in first if one.label == "sensitive"])
    plans = {
        "searched set": plan,
        "usage contrast": usage_contrast(bundle, store, count),
        **{
            f"single effects, {name}": by_single_effect(singles["keys"], singles[name], count)
            for name in ("exact", "first-order", "integrated")
        },
        "tuned experts": removal_plan([(at, "mlp", one) for at, one in sorted(tuned)], "replace"),
    }
    results: dict[str, Any] = {
        "search": text, "search_seconds": seconds, "num_tuned": len(tuned), "plans": [],
        "agreement": {
            name: singles[f"{name} agreement"] for name in ("first-order", "integrated")
        },
        "num_prompts_single": singles["exact"].shape[1],
        "swaps": swaps(bundle, [one for one in first if one.label == "sensitive"], tuned),
    }  # fmt: skip
    unsteered: Condition | None = None
    judge = load_model("demo-base")
    for name, one in plans.items():
        result = evaluate_plan(
            bundle, one, second, unsteered=unsteered, judge_bundle=judge, kinds=("random",),
            num_controls=NUM_RANDOM if name == "searched set" else 0,
        )  # fmt: skip
        unsteered = result.conditions[0]
        if name == "searched set":
            results["plans"].append({"name": "none", **_rates(result, "unsteered")})
            results["plans"] += [
                {"name": f"random experts, seed {seed}", "experts": count,
                 "hits": len(experts_in(_plan(result, f"control:random:{seed}")) & tuned),
                 **_rates(result, f"control:random:{seed}")}
                for seed in range(NUM_RANDOM)
            ]  # fmt: skip
            results["verdict"] = [verdict.in_words() for verdict in result.verdicts()]
        hits = len(experts_in(one) & tuned)
        row = {"name": name, "experts": len(experts_in(one)), "hits": hits}
        results["plans"].append({**row, **_rates(result, "steered")})
        print(model, results["plans"][-1], flush=True)
    return results


def swaps(
    bundle: ModelBundle, prompts: Sequence[Prompt], tuned: set[tuple[int, int]]
) -> dict[str, Any]:
    """Each expert exchanged for that of `demo-base`: which exchanges have any effect."""
    question = ask(bundle, prompts, "opening", most=NUM_PROMPTS)
    base = load_model("demo-base")
    found = scan_swaps(
        bundle, base, question.rows, question.rendered, parts=expert_parts(bundle.model)
    )
    frame = found.frame(question.units)
    moved = frame[frame["effect"] != 0]
    named = set(zip(moved["layer"].astype(int), moved["expert"].astype(int), strict=True))
    print(f"{bundle.name}: {len(named)} exchanges have an effect, {len(named & tuned)} tuned")
    return {"named": len(named), "hits": len(named & tuned), "num_experts": len(frame)}


def _plan(result: EvaluationResult, condition: str) -> SteeringPlan:
    found = next(one.plan for one in result.conditions if one.name == condition)
    assert found is not None
    return found


def _rates(result: EvaluationResult, condition: str) -> dict[str, Any]:
    frame: pd.DataFrame = result.frame[result.frame["condition"] == condition]
    wanted = (("sensitive", "refused"), ("sensitive", "correct"), ("sensitive", "broken"),
              ("neutral", "correct"))  # fmt: skip
    rates: dict[str, Any] = {}
    for group, outcome in wanted:
        row = frame[(frame["group"] == group) & (frame["metric"] == outcome)].iloc[0]
        rates[f"{group} {outcome}"] = {name: float(row[name]) for name in ("value", "low", "high")}
        rates[f"{group} n"] = int(row["n"])
    return rates


def page(results: dict[str, Any]) -> str:
    """The page as Markdown."""
    lines = [
        "# Sets of experts found by what they cause",
        "",
        "Made by `python benchmarks/causes_report.py`. Everything was found on the first half of "
        "the set `refusal` and judged on the second half, which had no part in it. The search does "
        "not know the tuned experts; they are the truth it is compared with. `correct` is the "
        "withheld answer. Intervals are Wilson's over prompts, 95 %. Answers are greedy, at most "
        "32 tokens; `demo-base` tells word salad from wrong answers. Seeds: 0 for the halves, the "
        "draws and the bootstraps; 0, 1, 2 for the random sets. These are small models made for "
        "this: the numbers say that the method works where the truth is known.",
        "",
        "- `moescope attribute` tells what taking out each expert does to a target: estimated for "
        "all in one backward pass with its agreement to exact effects, or exactly (`--method "
        "exact`). `--contrast` sets a contrast's columns beside it.",
        "- `moescope plan search` looks for a set: after each expert that joins, all others are "
        "estimated anew with those gone, the best few are measured exactly, and the best of them "
        "joins if neutral answers keep to the budget. Half of the units are searched on, the other "
        "half confirms, beside random sets of the same shape.",
        "- `moescope causes swap` exchanges experts or routers with another model, `patch` runs a "
        "model with the other's routing, `paths` splits an effect by whether later routing is "
        "frozen or free, `writes` shows the tokens that an expert writes for and against.",
        "",
    ]
    for model, found in results.items():
        lines += [f"## {model}", "", "```", found["search"], "```", "", *_table(found), ""]
        lines += [f"Verdict on the searched set: {one}." for one in found["verdict"]]
        first, integrated = (found["agreement"][one] for one in ("first-order", "integrated"))
        swapped = found["swaps"]
        lines += [
            "",
            f"Estimates against exact single effects of all experts (`drop`, "
            f"{found['num_prompts_single']} prompts, refusal opening minus answer opening): "
            f"Spearman {first['spearman']:.2f} first-order ({first['forwards']:g} forwards), "
            f"{integrated['spearman']:.2f} integrated ({integrated['forwards']:g} forwards); "
            f"Pearson {first['pearson']:.2f} and {integrated['pearson']:.2f}.",
            "",
            f"Exchanging single experts for those of `demo-base`: {swapped['named']} of "
            f"{swapped['num_experts']} exchanges have an effect, and {swapped['hits']} of these "
            f"are the {found['num_tuned']} tuned experts.",
            "",
        ]
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> list[str]:
    n = found["plans"][0]
    lines = [
        f"| experts taken out | number | tuned among them (precision, recall) | refused, n "
        f"{n['sensitive n']} | right | broken | neutral right, n {n['neutral n']} |",
        "|---|---|---|---|---|---|---|",
    ]
    for plan in found["plans"]:
        count = plan.get("experts")
        hits = "" if count is None else (
            f"{plan['hits']} ({plan['hits'] / count:.2f}, {plan['hits'] / found['num_tuned']:.2f})"
        )  # fmt: skip
        cells = [
            "{value:.3f} [{low:.3f}, {high:.3f}]".format(**plan[name])
            for name in (
                "sensitive refused", "sensitive correct", "sensitive broken", "neutral correct",
            )
        ]  # fmt: skip
        lines.append(f"| {plan['name']} | {count or ''} | {hits} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Search, judge, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/causes"))
    parser.add_argument("--store", type=Path, default=Path("out/known-truth.duckdb"))
    parser.add_argument("--models", nargs="+", default=MODELS, help="others keep their results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # these models are too small to share a forward
    from known_truth import record

    if options.store.exists():
        store = Store(options.store)
    else:
        store, _ = record(options.store)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "results.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        results |= {model: of_model(model, store, Path(temporary)) for model in options.models}
    results = {model: results[model] for model in MODELS if model in results}
    text = json.dumps(results, indent=1, ensure_ascii=False)
    kept.write_text(text + "\n", encoding="utf-8")
    (options.out / "README.md").write_text(page(results), encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
