"""`moescope sweep`: dose and response of a contrast table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.app import console
from moescope.app.commands.steer import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    load,
)

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.prompts import Prompt
    from moescope.steering import SteeringPlan
    from moescope.steering.sweep import MakeControls, SweepResult
    from moescope.steering.sweep_cells import SweepCell

_SHOWN = (
    "count", "mode", "layers", "strength", "refused", "correct", "broken", "correct_control_max",
    "refused_control_min", "neutral_correct", "kl_answer",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(sweep)


def sweep(
    model: ModelArgument,
    table: Annotated[Path, typer.Option(help="A contrast: .csv, .parquet or .json.")],
    prompts: Annotated[
        list[str], typer.Option(help="A prompt file, or a shipped set; may be repeated.")
    ],
    counts: Annotated[str, typer.Option(help="Experts to switch off: 1,2,5,10.")],
    store: Annotated[Path, typer.Option(help="The DuckDB file that keeps the cells.")],
    name: Annotated[
        str, typer.Option("--name", "--run", help="The sweep; the same name goes on with it.")
    ],
    mode: Annotated[str, typer.Option(help="How: replace, drop_renorm, drop.")] = "replace",
    strength: Annotated[
        str | None,
        typer.Option(
            help="Weaken instead of mask: standard deviations off the logit (replace), or the "
            "share of the weight taken away (drop, drop_renorm): 0.5,1."
        ),
    ] = None,
    layers_window: Annotated[
        str, typer.Option(help="Layers to take experts from: all,0-7,8-15.")
    ] = "all",
    neutral: Annotated[
        list[str] | None,
        typer.Option(help="Prompts to count as neutral, whatever their label; may be repeated."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Keep prompts with FIELD=VALUE[,VALUE]; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the prompts (neutral ones apart).")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="The label to judge by; else the one that is not neutral.")
    ] = None,
    controls: Annotated[int, typer.Option(min=0, help="Random plans per cell.")] = 3,
    bottom: Annotated[bool, typer.Option(help="Compare with the bottom of the table, too.")] = True,
    load_table: Annotated[
        Path | None,
        typer.Option("--load", help="A table of expert load: compare with experts alike in load."),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(help="A model that does not refuse, to tell word salad; or MODEL itself."),
    ] = None,
    goal: Annotated[
        str, typer.Option(help="What the best cell has most of: correct, complied, refused.")
    ] = "correct",
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Points that right neutral answers may fall by."),
    ] = None,
    plan_out: Annotated[Path | None, typer.Option(help="Write the best plan here.")] = None,
    unconfirmed: Annotated[
        bool, typer.Option("--unconfirmed", help="Use experts that were not confirmed, too.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the random plans.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table to FILE.csv.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Write figures of effect, side effects and dose to FILE.html."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Judge many plans from one table; an interrupted sweep goes on where it stopped.

    Example: moescope sweep demo --table refusal.csv --prompts refusal --where half=second
    --counts 1,2,5,10 --store runs.duckdb --name dose --budget 5 --plan-out best.json
    """
    from moescope.probe.storage.runs import check_store_target
    from moescope.steering.derive import read_contrast_table

    _check_choices(goal, budget, plan_out, out, figure)
    frame = read_contrast_table(table)
    cells = _cells(counts, mode, strength, layers_window)
    make_controls = _make_controls(
        frame if bottom else None, None if load_table is None else read_contrast_table(load_table),
        seed,
    )  # fmt: skip
    chosen = _prompts(prompts, neutral or [], where, limit)
    _check_budget(budget, chosen)
    check_store_target(store)
    bundle = load(model, device, dtype, trust_remote_code)
    judge = None
    if judge_model is not None:
        judge = (
            bundle if judge_model == model else load(judge_model, device, dtype, trust_remote_code)
        )
    from moescope.steering.sweep import run_sweep

    with console.progress("sweep", "answers") as update:
        result = run_sweep(
            bundle, frame, chosen, cells, store_path=store, name=name, group=group,
            num_controls=controls, make_controls=make_controls, judge_bundle=judge,
            confirmed_only=not unconfirmed, seed=seed, max_new_tokens=max_new_tokens,
            progress=update, say=console.say,
        )  # fmt: skip
    if out is not None:
        result.table.to_csv(out, index=False)
    if as_json:
        console.print_frame(result.table, as_json=True)
    else:
        console.print_frame(result.table[list(_SHOWN)])
    _show_best(result, goal, budget, plan_out)
    if figure is not None:
        _draw(result, store, figure, group=group, goal=goal, budget=budget)


def _draw(
    result: SweepResult, store: Path, path: Path, *, group: str | None, goal: Any,
    budget: float | None,
) -> None:  # fmt: skip
    """The figures of the sweep's cells, as a page."""
    from moescope.probe.errors import PlanError
    from moescope.steering.figure_page import write_figure_page
    from moescope.steering.stored_sweeps import stored_sweeps
    from moescope.steering.sweep_figures import sweep_page
    from moescope.steering.sweep_table import best_cell

    sweep = stored_sweeps(store, result.table["evaluation_id"].tolist())[0]
    label = group if group is not None else sweep.groups[0]
    try:
        best = str(result.table["evaluation_id"].iloc[best_cell(
            result.table, goal=goal, budget=budget
        )])  # fmt: skip
    except PlanError:  # no cell keeps to the budget; the figure shows by how much
        best = None
    figures = sweep_page(store, sweep, label, goal=goal, budget=budget, best=best)
    write_figure_page(path, f"Sweep {sweep.name}", figures)
    console.say(f"figures written to {path}")


def _show_best(result: SweepResult, goal: Any, budget: float | None, plan_out: Path | None) -> None:
    """Say which cell is best, and write its plan where one is asked for."""
    from moescope.steering.sweep_table import beats_controls, best_cell

    if budget is None and plan_out is None:
        return
    best = best_cell(result.table, goal=goal, budget=budget)
    row = result.table.iloc[best]
    cost = 100 * (row["neutral_correct_before"] - row["neutral_correct"])
    within = "without a budget" if budget is None else f"within {budget:g} points"
    costs = (
        "neutral answers not judged" if cost != cost else f"neutral answers {0 - cost:+.1f} points"
    )
    console.say(
        f"best {within} by {goal}: {result.plans[best].title} (correct {row['correct']:.2f}, "
        f"refused {row['refused']:.2f}, {costs})"
    )
    if beats_controls(result.table, best, goal) is False:
        console.say("but random experts do as well: this says nothing about the chosen ones")
    if plan_out is not None:
        result.plans[best].write(plan_out)
        console.say(f"plan written to {plan_out}")


def _cells(counts: str, modes: str, strengths: str | None, windows: str) -> list[SweepCell]:
    from moescope.steering.sweep_cells import LayerWindow, sweep_grid

    return sweep_grid(
        _numbers(counts, "counts", int),
        modes=_items(modes),
        windows=[LayerWindow.parse(text) for text in _items(windows)],
        strengths=[None] if strengths is None else _numbers(strengths, "strength", float),
    )


def _items(text: str) -> list[Any]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, option: str, kind: Callable[[str], Any]) -> list[Any]:
    from moescope.probe.errors import InputError

    try:
        return [kind(part) for part in _items(text)]
    except ValueError:
        raise InputError(f"--{option} is a list of numbers such as 1,2,5, not {text!r}") from None


def _check_choices(
    goal: str,
    budget: float | None,
    plan_out: Path | None,
    out: Path | None,
    figure: Path | None,
) -> None:
    """Refuse early what would be found wrong only after the sweep."""
    from moescope.probe.errors import InputError
    from moescope.steering.figure_page import check_figure_target
    from moescope.steering.sweep_table import GOALS

    if goal not in GOALS:
        raise InputError(f"--goal is {', '.join(GOALS)}, not {goal!r}")
    if budget is not None and budget != budget:
        raise InputError("--budget is a number of percentage points")
    if figure is not None:
        check_figure_target(figure)
    for path in (plan_out, out, figure):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path} cannot be written: there is no folder {path.parent}")


def _check_budget(budget: float | None, prompts: Sequence[Prompt]) -> None:
    from moescope.probe.errors import InputError

    if budget is not None and not any(
        prompt.label == "neutral" and prompt.expected is not None for prompt in prompts
    ):
        raise InputError(
            "--budget is about right answers to neutral prompts, and there is no neutral prompt "
            "with an answer; name some with --neutral"
        )


def _make_controls(
    ranking: pd.DataFrame | None, loads: pd.DataFrame | None, seed: int
) -> MakeControls:
    """The controls beside the random ones: bottom of the table, experts alike in load."""

    def make(plan: SteeringPlan, layers: Sequence[Any]) -> Mapping[str, SteeringPlan]:
        from moescope.steering.controls import bottom_control, load_matched_control

        made: dict[str, SteeringPlan] = {}
        if ranking is not None:
            made["bottom"] = bottom_control(plan, layers, seed, ranking)
        if loads is not None:
            made["load-matched"] = load_matched_control(plan, layers, seed, loads)
        return made

    return make


def _prompts(
    paths: Sequence[str], neutral: Sequence[str], where: Sequence[str] | None, limit: int | None
) -> list[Prompt]:
    """Prompts that meet the conditions, then those of the neutral files.

    Raises:
        InputError: no prompt meets them.
    """
    from moescope.probe.analysis.filters import parse_conditions
    from moescope.probe.errors import InputError
    from moescope.probe.prompts import prompt_field, read_prompt_files

    conditions = parse_conditions(where or [])
    files = read_prompt_files([*paths, *neutral])
    chosen = [
        prompt
        for file in files[: len(paths)]
        for prompt in file.prompts
        if all(prompt_field(prompt, field) in values for field, values in conditions.items())
    ][:limit]
    if not chosen:
        raise InputError(f"no prompt of {', '.join(paths)} has {' and '.join(where or [])}")
    return chosen + [
        replace(prompt, label="neutral") for file in files[len(paths) :] for prompt in file.prompts
    ]
