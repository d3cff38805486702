"""What experts cause: `attribute`, and `plan search` for a set of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from moescope.app import console
from moescope.app.commands.steer import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    load,
    select_prompts,
)
from moescope.probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.models import ModelBundle
    from moescope.probe.prompts import Prompt
    from moescope.steering.causes.asking import Question, TargetName
    from moescope.steering.causes.keys import Mode

Method = Literal["gradient", "integrated", "exact", "force"]

PromptsOption = Annotated[
    list[str], typer.Option(help="A prompt file, or a shipped set; may be repeated.")
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(help="Keep prompts with FIELD=VALUE[,VALUE]; may be repeated."),
]
TargetOption = Annotated[
    str,
    typer.Option(
        help="opening: its own refusal against the known answer; answer: the known answer's "
        "log-probability; loss: of the prompt; own: its own answer's log-probability."
    ),
]
ModeOption = Annotated[str, typer.Option(help="How experts go: drop, drop_renorm, replace.")]
OpeningOption = Annotated[
    int | None,
    typer.Option(min=1, help="Of opening: tokens of each text that count; 4 without it."),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only so many prompts, drawn.")]
SeedOption = Annotated[int, typer.Option(help="Of everything drawn at random.")]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(attribute)


def attribute(
    model: ModelArgument,
    prompts: PromptsOption,
    target: TargetOption = "opening",
    where: WhereOption = None,
    method: Annotated[
        str,
        typer.Option(
            help="gradient: all experts in one backward pass; integrated: several passes, nearer "
            "to large effects; exact: every expert taken out; force: what forcing each would do, "
            "also where it is not selected, from one backward pass for 16 experts of a layer."
        ),
    ] = "gradient",
    mode: Annotated[
        str | None, typer.Option(help="How experts go: drop (as without it), drop_renorm, replace.")
    ] = None,
    opening_tokens: OpeningOption = None,
    passes: Annotated[int | None, typer.Option(min=1, help="Of integrated; 5 without it.")] = None,
    checked: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of gradient and integrated: experts whose exact effect is measured beside the "
            "estimate; 24 without it.",
        ),
    ] = None,
    contrast: Annotated[
        Path | None, typer.Option(help="A contrast's table, whose columns are set beside.")
    ] = None,
    take: Annotated[
        int | None, typer.Option(min=1, help="With --plan: experts that move the target most.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="With --take: write a plan of these experts to this file.")
    ] = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    store: Annotated[
        Path | None,
        typer.Option(help="Of exact: keep finished parts in this DuckDB file, to go on there."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the table to FILE.csv, .parquet or .json.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 20,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which experts cause it: the change of a target when one expert is taken out.

    Example: moescope attribute demo --prompts refusal --where half=first --target opening
    """
    from moescope.probe.analysis.export import check_suffix, write_frame

    known_target, known_mode = _target(target), _mode(mode or "drop")
    chosen = _method(method)
    estimates = chosen in ("gradient", "integrated")
    _refuse_idle("--method", chosen, {
        "--mode": mode is not None and chosen == "force",
        "--passes": passes is not None and chosen != "integrated",
        "--checked": checked is not None and not estimates,
        "--store": store is not None and chosen != "exact",
    })  # fmt: skip
    _refuse_idle("--target", known_target, {
        "--opening-tokens": opening_tokens is not None and known_target != "opening",
    })  # fmt: skip
    if out is not None:
        check_suffix(out)
    if (take is None) != (plan is None):
        raise InputError("--take and --plan go together: how many experts, and where to")
    asked = select_prompts(prompts, where)
    beside = None if contrast is None else _contrast(contrast)
    bundle = load(model, device, dtype, trust_remote_code)
    question = _ask(bundle, asked, known_target, opening_tokens or 4, limit, seed)
    frame, notes = _effects(
        bundle, question, chosen, known_mode, passes=passes or 5,
        checked=24 if checked is None else checked, seed=seed, store=store,
    )  # fmt: skip
    if beside is not None:
        frame = frame.merge(beside, on=["layer", "expert"], how="left")
    if plan is not None and take is not None:
        _write_plan(bundle, frame, take, plan, question.name, chosen, known_mode)
    if out is not None:
        write_frame(frame, out)
    said = [f"{bundle.name}: {question.note}", *notes]
    if as_json:
        for note in said:
            console.say(note)
        console.print_frame(frame, as_json=True)
        return
    for note in said:
        console.emit(note)
    console.print_frame(frame.head(rows))
    if len(frame) > rows:
        console.emit(f"... {len(frame) - rows} more rows; --out FILE.csv writes them all")


def plan_search(
    model: ModelArgument,
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option(help="The plan file to write.")],
    target: TargetOption = "opening",
    where: WhereOption = None,
    max_experts: Annotated[int, typer.Option(min=1, help="The set's largest size.")] = 14,
    budget: Annotated[
        float,
        typer.Option(min=0, help="Nats a token that neutral answers may lose in likelihood."),
    ] = 0.05,
    mode: ModeOption = "replace",
    bound: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of opening: nats beyond which a prompt is as good as won; 10 without it.",
        ),
    ] = None,
    opening_tokens: OpeningOption = None,
    exact: Annotated[int, typer.Option(min=1, help="Experts measured exactly in a step.")] = 8,
    beam: Annotated[int, typer.Option(min=1, help="Sets carried on side by side.")] = 1,
    group: Annotated[int, typer.Option(min=1, help="Experts that join in a step.")] = 1,
    neutral: Annotated[str, typer.Option(help="The label of prompts to be left alone.")] = (
        "neutral"
    ),
    limit: Annotated[
        int, typer.Option(min=1, help="Prompts of each kind that the search uses, drawn.")
    ] = 80,
    random_sets: Annotated[
        int, typer.Option(min=1, help="Random sets beside the confirmation.")
    ] = 20,
    seed: SeedOption = 0,
    name: Annotated[str | None, typer.Option(help="The plan's name.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search for a set of experts that causes it, and confirm it on other units.

    Half of the units (pairs, else prompts) are searched on, the other half confirms. Experts join
    one by one, each time anew by what they cause with the others gone, while neutral answers keep
    to the budget.

    Example: moescope plan search demo --prompts refusal --where half=first --out cause.json
    """
    from moescope.steering.causes.found import search_and_confirm

    known_target, known_mode = _target(target), _mode(mode)
    _refuse_idle("--target", known_target, {
        "--opening-tokens": opening_tokens is not None and known_target != "opening",
        "--bound": bound is not None and known_target != "opening",
    })  # fmt: skip
    asked = select_prompts(prompts, where)
    about = [one for one in asked if one.label != neutral]
    beside = [one for one in asked if one.label == neutral]
    bundle = load(model, device, dtype, trust_remote_code)
    with console.progress("searching", "experts") as update:
        found = search_and_confirm(
            bundle, about, beside, known_target, max_experts=max_experts, budget=budget,
            mode=known_mode, bound=10.0 if bound is None else bound,
            num_tokens=opening_tokens or 4, num_exact=exact, beam=beam, group=group,
            most=limit, num_random=random_sets, seed=seed, name=name,
            told=lambda _, done, total: update(done, total),
        )  # fmt: skip
    if found.plan is not None:
        found.plan.write(out)
    if as_json:
        console.print_frame(found.found.frame(), as_json=True)
        return
    for line in found.lines():
        console.emit(line)
    if found.plan is not None:
        console.say(f"plan written to {out}")


def _ask(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    target: TargetName,
    num_tokens: int,
    limit: int | None,
    seed: int,
) -> Question:
    from moescope.steering.causes.asking import ask

    with console.progress("answering", "prompts") as update:
        return ask(
            bundle, prompts, target, num_tokens=num_tokens, most=limit, seed=seed, progress=update
        )


def _effects(
    bundle: ModelBundle,
    question: Question,
    method: Method,
    mode: Mode,
    *,
    passes: int,
    checked: int,
    seed: int,
    store: Path | None,
) -> tuple[pd.DataFrame, list[str]]:
    """The table, largest effect first, and what must be said beside it."""
    from moescope.steering.causes import ablation, attribution, unselected

    if method == "force":
        with console.progress("attributing", "batches") as update:
            found = unselected.attribute_forcing(
                bundle, question.rows, question.rendered, progress=update
            )
        frame, column = found.frame(question.units, seed=seed), "estimate"
        notes = [f"{found.method}; {found.cost:g} forwards; not compared with exact effects"]
    elif method == "exact":
        with console.progress("taking experts out", "rows") as update:
            scan = ablation.scan(
                bundle, question.rows, question.rendered, mode=mode, progress=update, store=store
            )
        frame, notes, column = scan.frame(question.units, seed=seed), list(scan.notes), "effect"
    else:
        with console.progress("attributing", "batches") as update:
            found = attribution.attribute(
                bundle, question.rows, question.rendered, mode=mode, num_checked=checked,
                integrated_steps=passes if method == "integrated" else None, seed=seed,
                progress=update,
            )  # fmt: skip
        frame, column = found.frame(question.units, seed=seed), "estimate"
        notes = [f"{found.method}; {found.cost:g} forwards"]
        if found.agreement is not None:
            notes.append(str(found.agreement))
    order = frame[column].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True), notes


def _write_plan(
    bundle: ModelBundle,
    frame: pd.DataFrame,
    take: int,
    path: Path,
    target: TargetName,
    method: Method,
    mode: Mode,
) -> None:
    """The experts that move the target where it should go, as a plan."""
    from moescope.probe.routers import find_routers
    from moescope.steering.causes.asking import DIRECTIONS
    from moescope.steering.causes.effect_plan import plan_from_effects

    made = plan_from_effects(
        frame, take, DIRECTIONS[target], [site.info for site in find_routers(bundle.model)],
        action="force" if method == "force" else "mask", mode=mode, name=path.stem,
        model=bundle.name, provenance={"target": target, "method": f"single effects, {method}"},
    )  # fmt: skip
    made.write(path)
    console.say(f"plan written to {path}")


def _contrast(path: Path) -> pd.DataFrame:
    """What a contrast says of each expert, by columns that name it."""
    from moescope.steering.derive import read_contrast_table

    table = read_contrast_table(path)
    names = [
        one for one in ("score", "risk_difference", "effect", "q", "confirmed") if one in table
    ]
    if table.duplicated(["layer", "expert"]).any():
        raise InputError(
            f"{path}: the table names an expert twice; a contrast beside effects has one row for "
            "each layer and expert"
        )
    renamed = {one: f"contrast_{one}" for one in names}
    return table[["layer", "expert", *names]].rename(columns=renamed)


def _refuse_idle(option: str, value: str, given: dict[str, bool]) -> None:
    """Refuse options that would do nothing beside another one's value."""
    for name, is_idle in given.items():
        if is_idle:
            raise InputError(f"{name} means nothing with {option} {value}; leave it out")


def _target(name: str) -> TargetName:
    from moescope.steering.causes.asking import TARGETS

    for target in TARGETS:
        if target == name:
            return target
    raise InputError(f"--target is {name!r}; the targets are {', '.join(TARGETS)}")


def _mode(name: str) -> Mode:
    from moescope.steering.causes.keys import Mode

    for mode in get_args(Mode):
        if mode == name:
            found: Mode = mode
            return found
    raise InputError(f"--mode is {name!r}; the modes are {', '.join(get_args(Mode))}")


def _method(name: str) -> Method:
    for method in get_args(Method):
        if method == name:
            found: Method = method
            return found
    raise InputError(f"--method is {name!r}; the methods are {', '.join(get_args(Method))}")
