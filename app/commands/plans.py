"""`moescope plan`: making, checking and changing steering plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moescope.app import console
from moescope.app.commands.causes import plan_search
from moescope.app.commands.convert import plan_convert
from moescope.probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from moescope.steering import SteeringPlan

PlanArgument = Annotated[Path, typer.Argument(help="The plan file.")]
OutOption = Annotated[Path, typer.Option(help="The plan file to write.")]
CheckOption = Annotated[
    str | None, typer.Option(help="Check the plan against this model's routers.")
]
NameOption = Annotated[str | None, typer.Option(help="The plan's name.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE of the strategy; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    plan = typer.Typer(help="Make and check steering plans.", no_args_is_help=True)
    plan.command("from-table")(plan_from_table)
    plan.command("strategies")(plan_strategies)
    plan.command("search")(plan_search)
    plan.command("control")(plan_control)
    plan.command("compose")(plan_compose)
    plan.command("invert")(plan_invert)
    plan.command("show")(plan_show)
    plan.command("check")(plan_check)
    plan.command("convert")(plan_convert)
    app.add_typer(plan, name="plan")


def plan_from_table(
    table: Annotated[Path, typer.Argument(help="A table of experts: .csv, .parquet or .json.")],
    out: OutOption,
    mask: Annotated[int, typer.Option(min=0, help="Experts of group a to mask.")] = 0,
    force: Annotated[int, typer.Option(min=0, help="Experts of group b to force.")] = 0,
    strategy: Annotated[
        str | None,
        typer.Option(help="A published way to make the plan; plan strategies lists them."),
    ] = None,
    settings: SetOption = None,
    layers: Annotated[
        str | None, typer.Option(help="With a strategy: first and last layer, as 2-4.")
    ] = None,
    rank_by: Annotated[
        str | None, typer.Option(help="With a strategy: the column to rank by.")
    ] = None,
    value: Annotated[
        str | None,
        typer.Option(help="With a strategy: of a table split by a field, the rows of this value."),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="all, prompt, generated, last_prompt or first_generated:N.")
    ] = "all",
    model: CheckOption = None,
    unconfirmed: Annotated[
        bool, typer.Option("--unconfirmed", help="Use experts that were not confirmed, too.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The plan's name; else the table's.")] = None,
) -> None:
    """Make a plan from a contrast: mask what fires more in group a, force what fires more in b.

    A published strategy decides by itself what is masked, forced, biased or scaled.

    Example: moescope plan from-table refusal.csv --mask 8 --model demo --out plan.json
    """
    from moescope.steering.derive import plan_from_contrast, read_contrast_table

    frame = read_contrast_table(table)
    routed = None if model is None else _layers(model)
    common: dict[str, Any] = {
        "layers": routed, "name": name or table.stem, "model": model,
        "provenance": {"table": table.name}, "tokens": _scope(tokens),
    }  # fmt: skip
    if strategy is None:
        if settings or layers or rank_by or value:
            raise InputError("--set, --layers, --rank-by and --value go with --strategy")
        plan = plan_from_contrast(
            frame, num_mask=mask, num_force=force, confirmed_only=not unconfirmed, **common
        )
    else:
        plan = _by_strategy(
            strategy, frame, settings, layers, mask=mask, force=force, rank_by=rank_by, value=value,
            confirmed_only=False if unconfirmed else None, **common,
        )  # fmt: skip
    if routed is not None and any(one.experts for one in plan.interventions):
        from moescope.steering.controls import with_bottom

        plan = with_bottom(plan, routed, frame, rank_by=rank_by, value=value)
    _finish(plan, out)


def plan_strategies(as_json: JsonOption = False) -> None:
    """List the published ways to make a plan, and the controls of one, with their settings.

    Example: moescope plan strategies
    """
    from moescope.steering.strategies import STRATEGIES

    if as_json:
        console.print_json(
            {
                one.name: {
                    "description": one.description,
                    "source": one.source,
                    "makes": "a plan from a table" if one.takes == "table" else "a plan's control",
                    "settings": {p.name: p.help for p in one.parameters},
                }
                for one in STRATEGIES.values()
            }
        )
        return
    for one in STRATEGIES.values():
        made = "" if one.takes == "table" else " (plan control)"
        console.emit(f"{one.name}{made}: {one.description} {one.source}")
        for parameter in one.parameters:
            default = "required" if parameter.required else f"default {parameter.default}"
            name = parameter.name.replace("_", "-")
            console.emit(f"    --set {name}=…  {parameter.help} ({default})")


def plan_control(
    plan: PlanArgument,
    kind: Annotated[str, typer.Option(help="random, load-matched or bottom.")],
    model: Annotated[str, typer.Option(help="The model it is meant for.")],
    out: OutOption,
    table: Annotated[
        Path | None,
        typer.Option(help="load-matched: a table of loads; bottom: the plan's ranking."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    settings: SetOption = None,
) -> None:
    """Make a plan's control: the same plan on other experts of the same layers.

    Example: moescope plan control plan.json --kind random --model demo --seed 1 --out random.json
    """
    from moescope.steering import SteeringPlan
    from moescope.steering.derive import read_contrast_table
    from moescope.steering.strategies import find_strategy, make_plan, parse_settings

    if find_strategy(kind).takes != "plan":
        raise InputError(f"{kind} makes a plan from a table; controls are random, load-matched, "
                         "bottom")  # fmt: skip
    frame = None if table is None else read_contrast_table(table)
    made = make_plan(
        kind, frame, of=SteeringPlan.read(plan), layers=_layers(model),
        **{"seed": seed} | parse_settings(kind, settings or []),
    )  # fmt: skip
    _finish(made, out)


def plan_compose(
    plans: Annotated[list[Path], typer.Argument(help="Plan files, at least two.")],
    out: OutOption,
    model: CheckOption = None,
    name: NameOption = None,
) -> None:
    """Put plans together: one that asks for all that they ask for.

    Example: moescope plan compose a.json b.json --model demo --out both.json
    """
    from moescope.steering import SteeringPlan
    from moescope.steering.compose import compose

    if len(plans) < 2:
        raise InputError("name at least two plans to put together")
    routed = None if model is None else _layers(model)
    _finish(compose([SteeringPlan.read(path) for path in plans], layers=routed, name=name), out)


def plan_invert(
    plan: PlanArgument,
    out: OutOption,
    strength: Annotated[
        str, typer.Option(help="Of the forces that masks become: max or natural.")
    ] = "max",
    model: CheckOption = None,
    name: NameOption = None,
) -> None:
    """Make the opposite plan: what was masked is forced, biases and scales are turned around.

    Example: moescope plan invert plan.json --model demo --out opposite.json
    """
    from moescope.steering import SteeringPlan
    from moescope.steering.compose import invert

    strengths: dict[str, Literal["max", "natural"]] = {"max": "max", "natural": "natural"}
    if strength not in strengths:
        raise InputError(f"--strength is {strength!r}; it is max or natural")
    routed = None if model is None else _layers(model)
    made = invert(SteeringPlan.read(plan), strength=strengths[strength], layers=routed, name=name)
    _finish(made, out)


def plan_show(
    plan: PlanArgument,
    model: Annotated[
        str | None, typer.Option(help="Check it against this model, and draw all its experts.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Write a map of layers and experts to FILE.html.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a plan as a table, and as a map of layers and experts.

    Example: moescope plan show plan.json --model demo --figure plan.html
    """
    from moescope.steering import SteeringPlan
    from moescope.steering.check import check
    from moescope.steering.figure_page import check_figure_target

    if figure is not None:
        check_figure_target(figure)
    read = SteeringPlan.read(plan)
    layers = None if model is None else _layers(model)
    if layers is not None:
        check(read, layers)
    if as_json:
        console.emit(read.to_json())
    else:
        show_plan(read)
    if figure is not None:
        _draw(read, layers, figure)


def plan_check(
    plan: PlanArgument,
    model: Annotated[str, typer.Option(help="The model it is meant for.")],
) -> None:
    """Check that a plan can be carried out on a model.

    Example: moescope plan check plan.json --model demo
    """
    from moescope.steering import SteeringPlan
    from moescope.steering.check import check

    read = SteeringPlan.read(plan)
    check(read, _layers(model))
    console.emit(f"{plan} fits {model}: {len(read.interventions)} interventions")


def show_plan(plan: SteeringPlan) -> None:
    """Print a plan as a table, with what was left out of it and why."""
    from moescope.steering.report import scope_in_words

    console.emit(f"plan {plan.title}: {len(plan.interventions)} interventions")
    console.print_rows(
        ("action", "layer", "experts", "setting", "tokens"),
        [
            (
                item.action,
                ", ".join(map(str, item.on_layers)),
                ", ".join(str(e) for e in item.experts),
                item.setting,
                scope_in_words(item.tokens),
            )
            for item in plan.interventions
        ],
    )
    notes = plan.provenance.get("notes")
    for note in notes if isinstance(notes, list) else ():
        console.emit(f"note: {note}")


def _draw(plan: SteeringPlan, layers: Any, path: Path) -> None:
    """A map for each kind of router, as a page."""
    from moescope.steering.figure_page import write_figure_page
    from moescope.steering.plan_view import kinds_of, plan_map

    kinds = [None] if layers is None else kinds_of(plan, layers)
    figures = [plan_map(plan, layers, kind=kind) for kind in kinds]
    write_figure_page(path, f"Plan {plan.title}", figures)
    console.say(f"figure written to {path}")
    if layers is None:
        console.say("only what the plan names is drawn; --model M draws all experts of a model")


def _by_strategy(
    strategy: str,
    frame: pd.DataFrame,
    settings: Sequence[str] | None,
    layer_range: str | None,
    *,
    mask: int,
    force: int,
    **common: Any,
) -> SteeringPlan:
    from moescope.probe.analysis.filters import parse_layers
    from moescope.steering.strategies import find_strategy, make_plan, parse_settings

    own = {parameter.name for parameter in find_strategy(strategy).parameters}
    given = parse_settings(strategy, settings or [])
    for name, number in (("num_mask", mask), ("num_force", force)):
        if number and name not in own:
            option = name.replace("num_", "--")
            raise InputError(f"strategy {strategy} takes no {option}; plan strategies lists its "
                             "settings")  # fmt: skip
        if number:
            given[name] = number
    if layer_range is not None:
        named = parse_layers(layer_range)
        if list(named) != list(range(named[0], named[-1] + 1)):
            raise InputError(f"--layers {layer_range!r}: a strategy takes one range, as 2-4")
        common["layer_range"] = (named[0], named[-1])
    return make_plan(strategy, frame, **common, **given)


def _scope(text: str) -> Any:
    from moescope.probe.analysis.filters import parse_scope

    return parse_scope(text)


def _layers(model: str) -> Any:
    from moescope.app.commands.steer import model_layers

    return model_layers(model)


def _finish(plan: SteeringPlan, out: Path) -> None:
    plan.write(out)
    show_plan(plan)
    console.say(f"plan written to {out}")
