"""Steering from the command line: `generate` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.app import console

if TYPE_CHECKING:
    from moescope.probe.models import ModelBundle
    from moescope.probe.outcomes import Outcome
    from moescope.probe.prompts import Prompt

ModelArgument = Annotated[str, typer.Argument(help="demo, a directory, or a hub id[@revision].")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's own code run.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(generate)
    app.command()(evaluate)


def generate(
    model: ModelArgument,
    prompt: Annotated[list[str], typer.Option(help="What to ask; may be repeated.")],
    plan: Annotated[Path | None, typer.Option(help="A steering plan.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts, unsteered and steered side by side.

    Example: moescope generate demo --prompt "What happened in 1911 in Aldora?" --plan plan.json
    """
    from moescope.probe.prompts import Prompt
    from moescope.steering import SteeringPlan

    read = None if plan is None else SteeringPlan.read(plan)
    prompts = [
        Prompt(prompt_id=index, text=text, set_name="typed") for index, text in enumerate(prompt)
    ]
    bundle = load(model, device, dtype, trust_remote_code)
    from moescope.steering.generate import compare

    found = compare(bundle, prompts, read, max_new_tokens=max_new_tokens)
    if as_json:
        console.print_json(found.to_json())
        return
    for line in found.lines():
        console.emit(line)


def evaluate(
    model: ModelArgument,
    plan: Annotated[Path, typer.Option(help="The steering plan.")],
    prompts: Annotated[
        list[str], typer.Option(help="A prompt file, or a shipped set; may be repeated.")
    ],
    where: Annotated[
        list[str] | None,
        typer.Option(help="Keep prompts with FIELD=VALUE[,VALUE]; may be repeated."),
    ] = None,
    controls: Annotated[
        int, typer.Option(min=1, help="Seeds of the random and of the load-matched controls.")
    ] = 3,
    behavior: Annotated[
        str, typer.Option(help="The outcome that the plan is about: refused, correct, ...")
    ] = "refused",
    group_by: Annotated[
        str, typer.Option(help="The field of prompts that makes the groups.")
    ] = "label",
    neutral: Annotated[
        str, typer.Option(help="The group that a plan should leave alone.")
    ] = "neutral",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random plans.")] = 0,
    judge_model: Annotated[
        str | None,
        typer.Option(
            help="A model that does not refuse, to tell word salad from other answers; none: do "
            "not tell. By default the model itself, asked the paired neutral prompts."
        ),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Store the rows in this DuckDB file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows to FILE.csv.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Write the figure of the outcomes to FILE.html.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Outcomes before, after and with controls; side effects; achieved routing.

    Controls are the same plan on other experts of the same layers: random ones, random ones of
    similar load, and the bottom of the ranking where the plan was made from a table.

    Example: moescope evaluate demo --plan plan.json --prompts refusal --controls 3
    """
    from moescope.probe.storage.runs import check_store_target
    from moescope.steering import SteeringPlan

    outcome = _known_outcome(behavior)
    if figure is not None:
        from moescope.steering.figure_page import check_figure_target

        check_figure_target(figure)
    read = SteeringPlan.read(plan)
    chosen = select_prompts(prompts, where)[:limit]
    if store is not None:
        check_store_target(store)
    bundle = load(model, device, dtype, trust_remote_code)
    judge = None
    if judge_model not in (None, "none"):
        is_same = judge_model == model
        judge = bundle if is_same else load(judge_model, device, dtype, trust_remote_code)
    from moescope.steering.evaluate import evaluate_plan
    from moescope.steering.evaluation_store import store_evaluation

    with console.progress("evaluating", "answers") as update:
        result = evaluate_plan(
            bundle, read, chosen, num_controls=controls, seed=seed,
            max_new_tokens=max_new_tokens, progress=update, judge_bundle=judge,
            judges_fluency=judge_model != "none", behavior=outcome, group_by=group_by,
            neutral_label=neutral,
        )  # fmt: skip
    if store is not None:
        store_evaluation(store, result)
    if out is not None:
        result.frame.to_csv(out, index=False)
    if figure is not None:
        from moescope.steering.figure_page import write_figure_page
        from moescope.steering.outcome_chart import outcome_chart

        write_figure_page(figure, f"Evaluation of {read.title}", [outcome_chart(result)])
    if as_json:
        console.print_frame(result.frame, as_json=True)
        return
    for line in result.lines():
        console.emit(line)
    if out is None:
        console.say("all rates, with the paired change of each: --out FILE.csv or --json")


def select_prompts(paths: Sequence[str], where: Sequence[str] | None) -> list[Prompt]:
    """Prompts of files or shipped sets that meet all conditions.

    Raises:
        InputError: none does.
    """
    from moescope.probe.analysis.filters import parse_conditions
    from moescope.probe.errors import InputError
    from moescope.probe.prompts import prompt_field, read_prompts

    conditions = parse_conditions(where or [])
    found = [
        prompt
        for prompt in read_prompts(paths)
        if all(prompt_field(prompt, name) in values for name, values in conditions.items())
    ]
    if not found:
        raise InputError(f"no prompt of {', '.join(paths)} has {' and '.join(where or [])}")
    return found


def _known_outcome(name: str) -> Outcome:
    """An outcome by name; InputError for others."""
    from moescope.probe.errors import InputError
    from moescope.probe.outcomes import OUTCOMES

    for outcome in OUTCOMES:
        if outcome == name:
            return outcome
    raise InputError(f"--behavior is {name!r}; the outcomes are {', '.join(OUTCOMES)}")


def load(model: str, device: str, dtype: str, trust_remote_code: bool) -> ModelBundle:
    """Load a model as the options say."""
    from moescope.probe.models import load_model

    return load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def model_layers(model: str) -> Any:
    """The proved routed layers of a model."""
    from moescope.probe.doctor import examine

    return examine(load(model, "auto", "auto", False)).layers
