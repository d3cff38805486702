"""`moescope demo`: the whole loop on the shipped demo model, then the dashboard.

Traces the shipped prompt sets with generated answers, draws the multilingual curve, finds the
experts that go with refusing on one part of the prompts, masks them, and judges the answers on the
other part against random experts. Every step is a command of its own; this one only puts them in a
row, and skips the recording when the store has it already.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.app import console

if TYPE_CHECKING:
    from moescope.probe.analysis import AnalysisTable
    from moescope.probe.models import ModelBundle
    from moescope.probe.storage.store import Store
    from moescope.steering import SteeringPlan

MODEL = "demo"
RUN = "demo"
SETS = ("refusal", "parallel")
MAX_NEW_TOKENS = 32
NUM_MASKED = 19  # 8 % of the experts, as in the page on the demo models
NUM_SHOWN = 8
NUM_CONTROLS = 3


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(demo)


def demo(
    store: Annotated[Path, typer.Option(help="The DuckDB file; made if it does not exist.")] = Path(
        "demo.duckdb"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8501,
    check: Annotated[
        bool, typer.Option("--check", help="Do all but serve, print a summary and exit.")
    ] = False,
) -> None:
    """Trace, analyse and steer the shipped demo model, then open the dashboard.

    Example: moescope demo --store demo.duckdb
    """
    from moescope.probe.models import load_model

    bundle = load_model(MODEL)
    opened = _recorded(bundle, store)
    _show_languages(opened)
    table = _show_refusal_experts(opened)
    _show_steering(bundle, table, store)
    if check:
        return
    from moescope.app.commands.inspect import dashboard

    dashboard(store, port)


def _recorded(bundle: ModelBundle, path: Path) -> Store:
    """The store with the demo run in it: recorded now, resumed, or there already."""
    from moescope.probe.prompts import read_prompts
    from moescope.probe.storage.runs import check_store_target
    from moescope.probe.storage.store import Store
    from moescope.probe.trace import TraceOptions, trace_prompts

    path.parent.mkdir(parents=True, exist_ok=True)
    check_store_target(path)
    if path.exists() and _is_complete(Store(path)):
        console.say(f"run {RUN!r} is in {path} already")
    else:
        with console.progress("recording", "prompts") as update:
            trace_prompts(
                bundle,
                read_prompts(SETS),
                path,
                RUN,
                TraceOptions(max_new_tokens=MAX_NEW_TOKENS),
                announce=console.say,
                progress=update,
            )
    store = Store(path)
    counts = store.query(
        "SELECT (SELECT count(*) FROM prompts WHERE run_id = $run) AS prompts, "
        "(SELECT count(*) FROM tokens WHERE run_id = $run) AS tokens, "
        "(SELECT count(*) FROM routing WHERE run_id = $run) AS rows",
        {"run": RUN},
    ).iloc[0]
    console.emit(
        f"Recorded: {counts['prompts']:,} prompts, {counts['tokens']:,} tokens, "
        f"{counts['rows']:,} routing rows in {path}\n"
    )
    return store


def _is_complete(store: Store) -> bool:
    runs = store.runs()
    return bool(((runs["run_id"] == RUN) & (runs["status"] == "complete")).any())


def _show_languages(store: Store) -> None:
    """How far from English each layer routes the other languages, as a curve of bars."""
    from moescope.probe.analysis import Filters, language_divergence

    filters = Filters(tokens="prompt", fields={"set_name": ("parallel",)})
    table = language_divergence(store, RUN, filters=filters)
    frame = table.frame
    console.emit("Languages: how far each layer routes them from English")
    console.emit(
        f"(JSD of routing weights in nats, mean over {frame['lang'].nunique()} languages, "
        f"{frame['num_passages'].min()} passages each; excess: above the same language against "
        "itself at equal token counts)"
    )
    curve = frame.groupby("layer")[["jsd", "jsd_excess"]].mean()
    for layer, row in curve.iterrows():
        bar = "█" * round(40 * row["jsd"] / curve["jsd"].max())
        console.emit(
            f"  layer {layer:>2}  JSD {row['jsd']:.4f}  excess {row['jsd_excess']:+.4f}  {bar}"
        )
    console.emit("")


def _show_refusal_experts(store: Store) -> AnalysisTable:
    """The experts that go with refusing, on the first half of the units."""
    from moescope.probe.analysis import Filters, expert_contrast

    filters = Filters(tokens="all", fields={"set_name": ("refusal",), "half": ("first",)})
    table = expert_contrast(
        store,
        RUN,
        a={"outcome": ("refused",)},
        b={"outcome": ("correct",)},
        filters=filters,
    )
    frame = table.frame
    console.emit(
        f"Refusal experts: {int(frame['confirmed'].sum())} of {len(frame)} confirmed "
        f"({frame['num_prompts_a'].iloc[0]} refused and {frame['num_prompts_b'].iloc[0]} answered "
        "prompts of the first half; risk difference found on one part, effect on the other)"
    )
    shown = frame[frame["confirmed"] & (frame["effect"] > 0)].head(NUM_SHOWN)
    columns = ["layer", "expert", "risk_difference", "effect", "low", "high", "q"]
    console.print_frame(shown[columns])
    console.emit("")
    return table


def _show_steering(bundle: ModelBundle, table: AnalysisTable, store: Path) -> None:
    """Mask those experts and judge the answers of the second half against random experts."""
    from moescope.app.commands.steer import select_prompts
    from moescope.probe.doctor import examine
    from moescope.steering.derive import plan_from_contrast
    from moescope.steering.evaluate import evaluate_plan
    from moescope.steering.evaluation_store import store_evaluation

    plan: SteeringPlan = plan_from_contrast(
        table.frame,
        num_mask=NUM_MASKED,
        layers=examine(bundle).layers,
        name="less-refusal",
        model=MODEL,
        provenance={"run": RUN, "method": "risk_difference", **_group_sizes(table)},
    )
    plan_file = store.with_name("less-refusal.json")
    plan.write(plan_file)
    with console.progress("steering", "answers") as update:
        result = evaluate_plan(
            bundle,
            plan,
            select_prompts(["refusal"], ["half=second"]),
            num_controls=NUM_CONTROLS,
            max_new_tokens=MAX_NEW_TOKENS,
            progress=update,
        )
    store_evaluation(store, result)
    console.emit(f"Steering: {NUM_MASKED} experts masked; prompts of the second half only")
    console.emit(_known_truth(plan))
    for line in result.lines():
        console.emit(line)
    console.emit(f"The plan is in {plan_file}; the rates are in {store}, table evaluations")


def _known_truth(plan: SteeringPlan) -> str:
    """How many of the masked experts are among those that were tuned to refuse."""
    from moescope.probe.demo.models import tuned_experts

    tuned = {(layer, expert) for layer, ids in tuned_experts(MODEL).items() for expert in ids}
    masked = {(item.layer, expert) for item in plan.interventions for expert in item.experts}
    return (
        f"Known truth: {len(masked & tuned)} of them are among the {len(tuned)} experts that were "
        "tuned to refuse"
    )


def _group_sizes(table: AnalysisTable) -> dict[str, Any]:
    first = table.frame.iloc[0]
    return {"n_a": int(first["num_prompts_a"]), "n_b": int(first["num_prompts_b"])}
