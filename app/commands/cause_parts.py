"""`moescope causes`: which part of a model, which routing and which path carries a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.app import console
from moescope.app.commands.cause_arguments import (
    ask_of,
    begin,
    masked_experts,
    named_experts,
    one_of,
)
from moescope.app.commands.causes import (
    LimitOption,
    PromptsOption,
    SeedOption,
    TargetOption,
    WhereOption,
)
from moescope.app.commands.steer import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    load,
)
from moescope.probe.errors import InputError

OpeningOption = Annotated[
    int, typer.Option(min=1, help="Of target opening: tokens of each text that count.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="Write the table to FILE.csv, .parquet or .json.")
]
FigureOption = Annotated[Path | None, typer.Option(help="Write the figure to FILE.html.")]
RowsOption = Annotated[int, typer.Option(min=1, help="Rows to print.")]
ExpertsOption = Annotated[
    str | None, typer.Option(help="LAYER:EXPERT or LAYER:KIND:EXPERT, with commas between.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    group = typer.Typer(
        help="Which part, which routing and which path carries a target.", no_args_is_help=True
    )
    for command in (swap, patch, paths, writes):
        group.command()(command)
    app.add_typer(group, name="causes")


def swap(
    tuned: Annotated[str, typer.Argument(help="The model that the target is asked of.")],
    base: Annotated[str, typer.Option(help="Another of its architecture, such as its base.")],
    prompts: PromptsOption,
    target: TargetOption = "opening",
    where: WhereOption = None,
    parts: Annotated[
        str, typer.Option(help="Weights to exchange: experts, routers or both.")
    ] = "both",
    by: Annotated[str, typer.Option(help="One at a time: expert, layer or all.")] = "expert",
    converse: Annotated[
        bool, typer.Option("--converse", help="The other way round: TUNED's part in BASE.")
    ] = False,
    opening_tokens: OpeningOption = 4,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    figure: FigureOption = None,
    rows: RowsOption = 20,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which part of TUNED, exchanged for BASE's, moves the target back.

    Exact: weights are exchanged and the target is measured again. An expert goes with its router
    rows unless --parts says otherwise.

    Example: moescope causes swap demo --base demo-base --prompts refusal --where half=first
    """
    from moescope.steering.causes.exchange import WHATS, Exchange

    what = one_of("--parts", parts, WHATS)
    one_of("--by", by, ("expert", "layer", "all"))
    chosen = begin(prompts, where, target, out, figure)
    first, other = (load(name, device, dtype, trust_remote_code) for name in (tuned, base))
    from moescope.app.commands.cause_tables import largest_first, print_rows, say_first
    from moescope.probe.analysis.export import write_frame
    from moescope.steering.causes.swaps import expert_parts, layer_parts, scan_swaps

    Exchange(first.model, other.model)  # refuses models that do not match before anything runs
    question = ask_of(first, chosen, target, opening_tokens, limit, seed, other=other)
    host, donor = (other, first) if converse else (first, other)
    if by == "expert":
        exchanged = expert_parts(host.model, what)
    else:
        exchanged = [one for one in layer_parts(host.model, [what])
                     if by == "layer" or one.layer is None]  # fmt: skip
    with console.progress("exchanging parts", "parts") as update:
        scan = scan_swaps(
            host, donor, question.rows, question.rendered, parts=exchanged, progress=update
        )
    frame = scan.frame(question.units, seed=seed)
    if by == "expert":
        frame = largest_first(frame)
    if out is not None:
        write_frame(frame, out)
    if figure is not None:
        from moescope.steering.causes.cause_figures import swap_figures
        from moescope.steering.figure_page import write_figure_page

        about = f"parts of {donor.name} in {host.name} · {question.note}"
        title = "Effects of exchanged parts"
        drawn = swap_figures(frame, title, about, question.unit)
        write_figure_page(figure, title, drawn)
    if as_json:
        console.print_frame(frame, as_json=True)
        return
    own, theirs = ("BASE", "TUNED") if converse else ("TUNED", "BASE")
    say_first(
        f"TUNED is {first.name}, BASE is {other.name}, {theirs}'s parts in {own}, asked of TUNED",
        question,
        f"effect: change of the target, {question.unit}, when {own} gets {theirs}'s part; share: "
        f"of the way from {own}'s {scan.baseline.mean():.4g} to {theirs}'s {scan.donor.mean():.4g}",
        seed,
    )
    num_same = int(frame["same_weights"].sum())
    if num_same:
        console.emit(
            f"{num_same} of {len(frame)} parts have the same weights in both; their effect is 0"
        )
    print_rows(frame[~frame["same_weights"]], rows)


def patch(
    a: Annotated[str, typer.Argument(help="The model that the target is asked of.")],
    b: Annotated[str, typer.Argument(help="Another with the same routers.")],
    prompts: PromptsOption,
    target: TargetOption = "opening",
    where: WhereOption = None,
    opening_tokens: OpeningOption = 4,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """How much of the difference between A and B lies in who is selected, and how much elsewhere.

    Each model runs the same tokens with the routing (experts and weights) of the other.

    Example: moescope causes patch demo demo-base --prompts refusal --where half=first --limit 60
    """
    chosen = begin(prompts, where, target, out)
    first, other = (load(name, device, dtype, trust_remote_code) for name in (a, b))
    question = ask_of(first, chosen, target, opening_tokens, limit, seed, other=other)
    from moescope.app.commands.cause_tables import for_people, patch_table, say_first
    from moescope.probe.analysis.export import write_frame
    from moescope.steering.causes.patching import PatchSide, patch_routing

    sides = [PatchSide(one, question.rows, question.rendered) for one in (first, other)]
    with console.progress("patching routing", "batches") as update:
        found = patch_routing(*sides, progress=update)
    split = found.summary(question.units, seed=seed)
    layers = found.frame(question.units, seed=seed)
    frame = patch_table(split, layers)
    if out is not None:
        write_frame(frame, out)
    if as_json:
        console.print_frame(frame, as_json=True)
        return
    say_first(
        f"a is {first.name}, b is {other.name}, asked of a", question,
        f"difference: target of a ({found.a.mean():.4g}) minus that of b ({found.b.mean():.4g}), "
        f"{question.unit}; routing in b: what b gains under a's routing; routing in a: what a "
        "gains under b's; routing: half their difference; rest: what routing leaves; share: of "
        "the difference", seed,
    )  # fmt: skip
    console.print_frame(split)
    console.emit("")
    console.emit("routing in b by layer")
    console.print_frame(for_people(frame[frame["quantity"] == "routing in b"]))


def paths(
    model: ModelArgument,
    prompts: PromptsOption,
    experts: ExpertsOption = None,
    plan: Annotated[
        Path | None, typer.Option(help="A steering plan: the experts that it masks.")
    ] = None,
    target: TargetOption = "opening",
    where: WhereOption = None,
    mode: Annotated[
        str | None,
        typer.Option(help="drop, drop_renorm, replace; else that of --plan, or drop."),
    ] = None,
    split_ids: Annotated[
        bool, typer.Option("--split-ids", help="Later routing in two: its weights, its experts.")
    ] = False,
    opening_tokens: OpeningOption = 4,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    figure: FigureOption = None,
    rows: RowsOption = 20,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """What taking an expert out does by itself, and what through the routing of later layers.

    One expert is out at a time, on all tokens.

    Example: moescope causes paths demo --prompts refusal --where half=first --experts 2:7,3:10
    """
    if mode is not None:
        one_of("--mode", mode, ("drop", "drop_renorm", "replace"))
    if (experts is None) == (plan is None):
        raise InputError("name either --experts or --plan")
    chosen = begin(prompts, where, target, out, figure)
    from moescope.app.commands.cause_tables import print_rows, say_first, side_by_side
    from moescope.probe.analysis.export import write_frame
    from moescope.steering.causes.paths import path_effects
    from moescope.steering.plan import SteeringPlan

    read = None if plan is None else SteeringPlan.read(plan)
    bundle = load(model, device, dtype, trust_remote_code)
    how: Any = mode or "drop"
    if read is not None:
        places, how = masked_experts(bundle, read, mode)
    else:
        places = named_experts(bundle, str(experts))
    question = ask_of(bundle, chosen, target, opening_tokens, limit, seed)
    with console.progress("taking experts out", "experts and batches") as update:
        found = path_effects(
            bundle, question.rows, question.rendered, places, mode=how, split_ids=split_ids,
            progress=update,
        )  # fmt: skip
    frame = found.frame(question.units, seed=seed)
    if out is not None:
        write_frame(frame, out)
    if figure is not None:
        from moescope.steering.causes.cause_figures import path_figure
        from moescope.steering.figure_page import write_figure_page

        about = f"{bundle.name} · each expert out alone ({how}) · {question.note}"
        title = "Effects of experts by path"
        write_figure_page(figure, title, [path_figure(frame, title, about, question.unit)])
    if as_json:
        console.print_frame(frame, as_json=True)
        return
    say_first(
        f"{bundle.name}, each expert out alone ({how})", question,
        f"numbers: change of the target, {question.unit}; total: later layers route anew; "
        "direct+values: their routing is frozen; later routing: the difference of both"
        + (", of which later weights with the same experts, later ids by others" if split_ids
           else ""), seed,
    )  # fmt: skip
    print_rows(side_by_side(frame), rows)


def writes(
    model: ModelArgument,
    prompts: PromptsOption,
    experts: ExpertsOption = None,
    target: TargetOption = "opening",
    where: WhereOption = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens on each side.")] = 5,
    opening_tokens: OpeningOption = 4,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Without --experts: so many, largest contribution first.")
    ] = 14,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which tokens each expert writes for and against, and what it adds to the target.

    The direct path only: what later layers make of an expert's output is not in it.

    Example: moescope causes writes demo --prompts refusal --where half=first --experts 2:7,3:10
    """
    chosen = begin(prompts, where, target, out)
    bundle = load(model, device, dtype, trust_remote_code)
    named = None if experts is None else named_experts(bundle, experts)
    question = ask_of(bundle, chosen, target, opening_tokens, limit, seed)
    from moescope.app.commands.cause_tables import (
        largest_first,
        print_rows,
        say_first,
        tokens_in_words,
    )
    from moescope.probe.analysis.export import write_frame
    from moescope.steering.causes.logit_attribution import attribute_logits

    with console.progress("attributing logits", "batches") as update:
        found = attribute_logits(bundle, question.rows, question.rendered, progress=update)
    frame = found.frame(question.units, seed=seed)
    others = frame[frame["part"] != "expert"].groupby("part", sort=False)["effect"].sum()
    own = largest_first(frame[frame["part"] == "expert"])
    keys = [*zip(own["layer"], own["kind"], own["expert"], strict=True)]
    shown = keys[:rows] if named is None else named
    words = {key: found.top_tokens(bundle, key, number=top) for key in shown}
    for side in ("for", "against"):
        own[f"writes_{side}"] = [tokens_in_words(bundle, words.get(key), side) for key in keys]
    if named is not None:
        own = own[[key in words for key in keys]]
    if out is not None:
        write_frame(own, out)
    if as_json:
        console.print_frame(own, as_json=True)
        return
    say_first(
        bundle.name, question,
        "effect: what the expert writes directly into the target, logits relative to their mean; "
        "num_used: prompts on which it was used there; words: those whose logits it raises and "
        "lowers most, with the change", seed,
    )  # fmt: skip
    sums = ", ".join(f"{part} {value:+.4g}" for part, value in others.items())
    all_experts = float(found.values.sum(0).mean())
    console.emit(
        f"target {found.target.mean():+.4g} logits: all routed experts {all_experts:+.4g}, {sums}"
    )
    print_rows(own.drop(columns="part"), len(shown))
