"""Tasks of lm-evaluation-harness from the command line: `lm-eval`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from moescope.steering.harness_run import HarnessResult


class _Template(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("lm-eval")(lm_eval)


def lm_eval(
    model: ModelArgument,
    plan: Annotated[
        Path | None, typer.Option(help="A steering plan; without one, the model as it is.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks or groups: NAME[,NAME].")] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="A folder with more tasks; may be repeated.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Make tasks of a prompt file or shipped set; may be repeated."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Of these keep prompts with FIELD=VALUE[,VALUE]; may be repeated."),
    ] = None,
    keep_tasks: Annotated[
        Path | None, typer.Option(help="Keep the tasks made of --prompts in this folder.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in each prompt.")] = None,
    controls: Annotated[int, typer.Option(min=0, help="Random plans to compare with.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random plans and of choices.")] = 0,
    chat_template: Annotated[
        _Template, typer.Option(help="The tokenizer's chat template.")
    ] = _Template.AUTO,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests in one forward.")] = 8,
    store: Annotated[Path | None, typer.Option(help="Store the rows in this DuckDB file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write to FILE.json or FILE.csv.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-evaluation-harness unsteered, steered and with random experts.

    Example: moescope lm-eval demo --plan plan.json --prompts refusal --limit 40
    """
    from moescope.steering import SteeringPlan
    from moescope.steering.harness_tasks import load_tasks, require_harness

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _check(names, prompts, where, keep_tasks, num_fewshot, out)
    require_harness()
    read = None if plan is None else SteeringPlan.read(plan)
    if store is not None:
        from moescope.probe.storage.runs import check_store_target

        check_store_target(store)
    folders = [str(folder) for folder in include or []]
    with ExitStack() as stack:
        if prompts:
            from moescope.steering.harness_prompts import write_prompt_tasks

            folder = keep_tasks or Path(stack.enter_context(TemporaryDirectory()))
            names += write_prompt_tasks(select_prompts(prompts, where), folder, seed=seed)
            folders.append(str(folder))
        found = load_tasks(names, folders)
        bundle = load(model, device, dtype, trust_remote_code)
        from moescope.steering.harness_run import run_tasks

        with console.progress("running tasks", "requests") as update:
            result = run_tasks(
                bundle, found, read, num_controls=controls, seed=seed, limit=limit,
                num_fewshot=num_fewshot, batch_size=batch_size, chat_template=chat_template.value,
                progress=update,
            )  # fmt: skip
    if store is not None:
        from moescope.steering.harness_store import store_tasks

        store_tasks(store, result)
    if out is not None:
        _write(result, out)
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_frame(result.frame)
    for line in result.lines():
        console.emit(line)


def _check(
    names: list[str],
    prompts: list[str] | None,
    where: list[str] | None,
    keep_tasks: Path | None,
    num_fewshot: int | None,
    out: Path | None,
) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    from moescope.probe.errors import InputError

    if not names and not prompts:
        raise InputError("name tasks with --tasks NAME[,NAME], or make some with --prompts SET")
    if not prompts and (where or keep_tasks is not None):
        raise InputError("--where and --keep-tasks are about tasks made of --prompts; give those")
    if prompts and num_fewshot:
        raise InputError(
            "tasks made of --prompts have no examples to show, whose answers would give others "
            "away; leave --num-fewshot out"
        )
    if out is not None and out.suffix.lower() not in (".json", ".csv"):
        raise InputError(f"{out}: results are written to a .json or .csv file")
    if out is not None and not out.resolve().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.resolve().parent}")


def _write(result: HarnessResult, out: Path) -> None:
    if out.suffix.lower() == ".csv":
        result.frame.to_csv(out, index=False)
        return
    out.write_text(
        json.dumps(result.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
