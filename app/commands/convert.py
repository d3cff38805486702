"""`moescope plan convert`: plans for other steering systems, and theirs as plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.app import console
from moescope.probe.errors import InputError


def plan_convert(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan, or with --from a file.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    to: Annotated[str | None, typer.Option(help="steermoe or ds4.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="steermoe or ds4.")] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers of the model.")
    ] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Experts of a layer.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="A store with a run of the model, instead of numbers.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="That run.")] = None,
    name: Annotated[str | None, typer.Option(help="With --from, the plan's name.")] = None,
    model: Annotated[str | None, typer.Option(help="With --from, the plan's model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a plan for another steering system, or make a plan of its file.

    Example: moescope plan convert plan.json --to steermoe --store demo.duckdb --run a --out w.npy
    """
    if (to is None) == (from_ is None):
        raise InputError("give either --to or --from, with steermoe or ds4")
    if (store is None) != (run is None):
        raise InputError("--store and --run go together")
    if from_ is not None:
        if (num_layers, num_experts, store) != (None, None, None):
            raise InputError("--from reads layers and experts from the file; leave them out")
        _from(path, out, from_, name, model, force=force)
        return
    if (name, model) != (None, None):
        raise InputError("--name and --model go with --from")
    assert to is not None
    if store is not None and run is not None:
        layers, experts = _shape_of(store, run)
        num_layers, num_experts = num_layers or layers, num_experts or experts
    from moescope.steering import SteeringPlan
    from moescope.steering.export import write_plan

    plan = SteeringPlan.read(path)
    write_plan(plan, out, to, num_layers=num_layers, num_experts=num_experts, force=force)
    console.say(f"{plan.title} written to {out}")


def _from(
    path: Path, out: Path, form: str, name: str | None, model: str | None, *, force: bool
) -> None:
    from moescope.probe.interchange.exporting import check_target, whole
    from moescope.steering.export import read_plan

    plan = read_plan(path, form, name=name, model=model)
    check_target(out, is_folder=False, force=force)
    with whole(out) as unfinished:
        plan.write(unfinished)
    console.say(f"{plan.title} written to {out}")


def _shape_of(store: Path, run: str) -> tuple[int, int]:
    """Decoder layers up to the last routed one, and experts of a layer, of a run's model."""
    from moescope.probe.interchange.run_tables import run_layers
    from moescope.probe.storage.store import Store

    opened = Store(store)
    opened.run(run)
    with opened.connection() as con:
        layers = run_layers(con, run)
    sizes = {num_experts for num_experts, _ in layers.values()}
    if len(sizes) > 1:
        raise InputError(
            f"the layers of run {run!r} have {' or '.join(map(str, sorted(sizes)))} experts; such "
            "a matrix has the same number in each"
        )
    return max(layers) + 1, sizes.pop()
