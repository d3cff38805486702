"""What methods find on models whose truth is known, and the page about it.

    python benchmarks/known_truth.py [--out docs/demo-models] [--store out/known-truth.duckdb]

Records the three shipped models on all shipped prompt sets, looks at languages, specialization and
refusal, and writes `results.json`, the figures, and `README.md` with all numbers in it. The
refusal experts are ranked on the first half of the units; plans are judged on the second half.
Figures are drawn by a headless Chromium (`--chromium`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from known_truth_page import page
from plotly.subplots import make_subplots
from scipy.stats import spearmanr

from moescope.probe import Store, load_model, read_prompts, trace_prompts
from moescope.probe.analysis import (
    Filters,
    expert_contrast,
    expert_specialization,
    language_divergence,
)
from moescope.probe.demo.models import tuned_experts
from moescope.probe.demo.recipes import DEMO
from moescope.probe.doctor import examine
from moescope.probe.figures import EXPORT_CONFIG, language_curves, specialization_leaders
from moescope.probe.models import ModelBundle
from moescope.probe.prompts import Prompt
from moescope.probe.shipped import shipped_prompt_sets
from moescope.probe.storage.runs import check_store_target
from moescope.probe.trace import TraceOptions
from moescope.steering import SteeringPlan
from moescope.steering.derive import plan_from_contrast
from moescope.steering.evaluate import evaluate_plan
from moescope.steering.evaluation import EvaluationResult

MODELS = ("demo-base", "demo", "demo-random")
STEERED_MODELS = ("demo", "demo-random")
SHARES = (0.02, 0.04, 0.08)
NUM_CONTROLS = 3
MAX_NEW_TOKENS = 48
OUTCOMES = ("correct", "other", "refused", "broken")
COLORS = {"correct": "#009E73", "other": "#8C8C8C", "refused": "#D55E00", "broken": "#CC79A7"}
WIDTH = 1100


def record(path: Path) -> tuple[Store, dict[str, float]]:
    """A store with a run of every model on all sets, and the seconds that each run took."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_store_target(path)
    prompts = read_prompts(shipped_prompt_sets())
    seconds = {}
    for name in MODELS:
        bundle = load_model(name)
        began = time.monotonic()
        options = TraceOptions(max_new_tokens=MAX_NEW_TOKENS)
        trace_prompts(bundle, prompts, path, name, options, announce=print)
        seconds[name] = time.monotonic() - began
        print(f"{name}: {len(prompts):,} prompts in {seconds[name]:.0f} s")
    return Store(path), seconds


def languages(store: Store) -> tuple[dict[str, Any], dict[str, go.Figure]]:
    """Divergence from English by layer, and its mean against the share of training data."""
    filters = Filters(tokens="prompt", fields={"set_name": ("parallel",)})
    table = language_divergence(store, "demo", filters=filters)
    shares = DEMO.corpus.languages
    means = table.frame.groupby("lang")[["jsd", "jsd_excess"]].mean()
    means["share"] = [shares[str(lang)] for lang in means.index]
    found = spearmanr(means["share"], means["jsd_excess"])
    figure = go.Figure(
        go.Scatter(
            x=means["share"], y=means["jsd_excess"], text=list(means.index), mode="markers+text",
            textposition="top center", marker={"size": 10, "color": "#0072B2"},
        )
    )  # fmt: skip
    figure.update_layout(
        title={
            "text": "Divergence from English against the share of training data",
            "subtitle": {
                "text": f"demo · 64 parallel passages a language · mean over layers · "
                f"Spearman {found.statistic:.2f}, n = {len(means)} languages"
            },
        },
        xaxis={"title": "share of stage one", "tickformat": ".0%"},
        yaxis={"title": "JSD above floor (nats)"},
        height=420,
    )
    by_layer = table.frame.groupby("layer")[["jsd", "jsd_floor", "jsd_excess"]].mean()
    results = {
        "by_layer": by_layer.reset_index().to_dict("records"),
        "by_language": means.reset_index().to_dict("records"),
        "spearman_share_excess": float(found.statistic),
        "spearman_p": float(found.pvalue),
    }
    return results, {"languages": language_curves(table), "gradient": figure}


def specialization(store: Store) -> tuple[dict[str, Any], dict[str, go.Figure]]:
    """What the experts of each layer specialize in, by domain and by language."""
    results: dict[str, Any] = {}
    figures: dict[str, go.Figure] = {}
    for by, prompt_set in (("domain", "domains"), ("lang", "parallel")):
        filters = Filters(tokens="all", fields={"set_name": (prompt_set,)})
        table = expert_specialization(store, "demo", by=by, filters=filters, bootstrap=0)
        frame = table.frame
        least = min(2 * float(frame["composition_chance"].iloc[0]), 0.99)
        led = frame[frame["composition"] >= least]
        counts = led.pivot_table(
            index="layer", columns="value", values="expert", aggfunc="count", fill_value=0
        )
        results[by] = {
            "least_composition": least,
            "experts_by_layer": {int(layer): row.to_dict() for layer, row in counts.iterrows()},
        }
        figures[f"specialization-{by}"] = specialization_leaders(table)
    return results, figures


def crosslingual(store: Store) -> list[dict[str, Any]]:
    """Right answers to facts never taught in the language asked in, beside ones that were."""
    frame = store.query(
        "SELECT lang, set_name, count(*) AS n, avg((outcome = 'correct')::int) AS correct "
        "FROM prompts WHERE run_id = 'demo-base' AND set_name IN ('crosslingual', 'neutral') "
        "GROUP BY ALL ORDER BY ALL"
    )
    return frame.to_dict("records")


def by_family(store: Store) -> list[dict[str, Any]]:
    """What becomes of the sensitive questions of each family: shares of prompts."""
    frame = store.query(
        "SELECT run_id AS model, meta->>'family' AS family, count(*) AS n, "
        "avg((outcome = 'refused')::int) AS refused, avg((outcome = 'correct')::int) AS correct "
        "FROM prompts WHERE set_name = 'refusal' AND label = 'sensitive' GROUP BY ALL ORDER BY ALL"
    )
    return frame.to_dict("records")


def ranking(store: Store, model: str) -> pd.DataFrame:
    """Experts by how much more refused prompts of the first half use them, largest first."""
    table = expert_contrast(
        store,
        model,
        a={"outcome": ("refused",)},
        b={"outcome": ("correct",)},
        filters=Filters(tokens="all", fields={"set_name": ("refusal",), "half": ("first",)}),
        split=False,
    )
    return table.frame.sort_values("risk_difference", ascending=False, ignore_index=True)


def refusal(store: Store, model: str) -> dict[str, Any]:
    """Plans found from outside, and the known truth, judged on the second half."""
    bundle = load_model(model)
    tuned = {(layer, e) for layer, ids in tuned_experts(model).items() for e in ids}
    frame = ranking(store, model)
    prompts = [p for p in read_prompts(["refusal"]) if p.meta["half"] == "second"]
    is_tuned = [(row.layer, row.expert) in tuned for row in frame.itertuples()]
    results: dict[str, Any] = {
        "num_tuned": len(tuned),
        "num_experts": len(frame),
        "ranks_of_tuned": [rank for rank, hit in enumerate(is_tuned, start=1) if hit],
        "plans": [],
    }
    infos = examine(bundle).layers
    for share in SHARES:
        count = round(share * len(frame))
        plan = plan_from_contrast(
            frame, num_mask=count, layers=infos, confirmed_only=False, model=model,
            name=f"{share:.0%} of experts",
        )  # fmt: skip
        hits = sum(is_tuned[:count])
        row = judged(bundle, plan, prompts)
        row |= {"experts": count, "precision": hits / count, "recall": hits / len(tuned)}
        results["plans"].append(row)
    truth = SteeringPlan(
        name="tuned experts",
        interventions=[
            {"action": "mask", "layer": layer, "experts": experts}
            for layer, experts in tuned_experts(model).items()
        ],
    )
    row = judged(bundle, truth, prompts)
    row |= {"experts": len(tuned), "precision": 1.0, "recall": 1.0}
    results["plans"].append(row)
    return results


def judged(bundle: ModelBundle, plan: SteeringPlan, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Rates with intervals of a plan, and the mean of its random controls."""
    began = time.monotonic()
    result = evaluate_plan(
        bundle, plan, prompts, num_controls=NUM_CONTROLS, kinds=("random",),
        max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip
    print(f"{bundle.name}, {plan.title}: {time.monotonic() - began:.0f} s")
    controls = [f"control:random:{seed}" for seed in range(NUM_CONTROLS)]
    return {
        "plan": plan.title,
        "unsteered": _rates(result, ["unsteered"]),
        "steered": _rates(result, ["steered"]),
        "random": _rates(result, controls),
    }


def _rates(result: EvaluationResult, conditions: Sequence[str]) -> dict[str, dict[str, float]]:
    """By `group outcome`: the mean over conditions; an interval where there is one condition."""
    frame = result.frame
    rates = {}
    for group in ("sensitive", "neutral"):
        for outcome in OUTCOMES:
            rows = frame[
                frame["condition"].isin(conditions)
                & (frame["group"] == group)
                & (frame["metric"] == outcome)
            ]
            cell = {"value": float(rows["value"].mean()), "n": int(rows["n"].iloc[0])}
            if len(rows) == 1:
                cell |= {"low": float(rows["low"].iloc[0]), "high": float(rows["high"].iloc[0])}
            else:
                cell |= {"min": float(rows["value"].min()), "max": float(rows["value"].max())}
            rates[f"{group} {outcome}"] = cell
    return rates


def refusal_figure(results: Mapping[str, Any]) -> go.Figure:
    """Answers to sensitive prompts, stacked, for every plan of both models."""
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=STEERED_MODELS)
    for column, model in enumerate(STEERED_MODELS, start=1):
        plans = results[model]["plans"]
        bars: list[tuple[str, Mapping[str, Any]]] = [("unsteered", plans[0]["unsteered"])]
        for plan in plans:
            name = f"{plan['plan']} ({plan['experts']})"
            bars += [(f"random, as {name}", plan["random"]), (name, plan["steered"])]
        for outcome in OUTCOMES:
            figure.add_trace(
                go.Bar(
                    y=[name for name, _ in bars],
                    x=[rates[f"sensitive {outcome}"]["value"] for _, rates in bars],
                    orientation="h", name=outcome, marker={"color": COLORS[outcome]},
                    legendgroup=outcome, showlegend=column == 1,
                ),
                row=1, col=column,
            )  # fmt: skip
    n = results["demo"]["plans"][0]["unsteered"]["sensitive refused"]["n"]
    figure.update_layout(
        barmode="stack",
        title={
            "text": "What becomes of sensitive prompts when experts are masked",
            "subtitle": {
                "text": f"{n} held-out sensitive prompts of the second half · experts ranked on "
                f"the first half · random: mean of {NUM_CONTROLS} plans of the same layers and "
                "counts · correct: the withheld answer"
            },
        },
        height=460,
        legend={"orientation": "h", "y": -0.15},
    )
    figure.update_xaxes(range=[0, 1], tickformat=".0%", title_text="share of prompts")
    figure.update_yaxes(autorange="reversed")
    return figure


def save_figures(figures: Mapping[str, go.Figure], folder: Path, chromium: str) -> None:
    """Write each figure as a PNG on white."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as temporary:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for name, figure in figures.items():
            figure.update_layout(
                template="plotly_white",
                width=WIDTH,
                paper_bgcolor="white",
                plot_bgcolor="white",
                margin={"r": 40, "l": 90},
            )
            page_file = Path(temporary) / f"{name}.html"
            figure.write_html(page_file, config={**EXPORT_CONFIG, "displayModeBar": False})
            size = {"width": WIDTH + 20, "height": int(figure.layout.height or 450) + 20}
            page = browser.new_page(viewport=size)  # type: ignore[arg-type]
            page.goto(page_file.as_uri())
            page.wait_for_selector(".main-svg")
            page.locator(".js-plotly-plot").screenshot(path=folder / f"{name}.png")
            page.close()
        browser.close()


def main() -> None:
    """Measure, and write results, figures and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/demo-models"))
    parser.add_argument("--store", type=Path, default=Path("out/known-truth.duckdb"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    store, seconds = record(options.store)
    language_results, figures = languages(store)
    special_results, more = specialization(store)
    figures |= more
    results: dict[str, Any] = {
        "trace_seconds": seconds,
        "num_prompts": len(read_prompts(shipped_prompt_sets())),
        "languages": language_results,
        "specialization": special_results,
        "crosslingual": crosslingual(store),
        "by_family": by_family(store),
        "num_controls": NUM_CONTROLS,
        "refusal": {model: refusal(store, model) for model in STEERED_MODELS},
    }
    figures["refusal"] = refusal_figure(results["refusal"])
    save_figures(figures, options.out, options.chromium)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (options.out / "results.json").write_text(text + "\n", encoding="utf-8")
    (options.out / "README.md").write_text(page(results), encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
