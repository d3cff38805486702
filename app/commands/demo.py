"""`moescope demo`: the whole loop on the shipped demo model, then the dashboard.

Traces the shipped prompt sets with generated answers and tells two stories: of refusal
(`demo_refusal`) and of languages (`demo_languages`). Every step is a command of its own; this one
only puts them in a row, and skips the recording when the store has it already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moescope.app import console

if TYPE_CHECKING:
    from moescope.probe.models import ModelBundle
    from moescope.probe.routers import LayerInfo
    from moescope.probe.storage.store import Store

MODEL = "demo"
RUN = "demo"
SETS = ("refusal", "parallel")
MAX_NEW_TOKENS = 32
JUDGE = "demo-base"


@dataclass(frozen=True)
class DemoModel:
    """What the stories are told about.

    Attributes:
        bundle: the model.
        judge: its sibling that does not refuse, to tell word salad.
        layers: its routed layers.
        store: with the run.
        store_path: of that store.
    """

    bundle: ModelBundle
    judge: ModelBundle
    layers: Sequence[LayerInfo]
    store: Store
    store_path: Path


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
    from moescope.app.commands.demo_languages import tell_languages
    from moescope.app.commands.demo_refusal import tell_refusal
    from moescope.probe.doctor import examine
    from moescope.probe.models import load_model

    bundle, judge = load_model(MODEL), load_model(JUDGE)
    opened = _recorded(bundle, store)
    model = DemoModel(bundle, judge, examine(bundle).layers, opened, store)
    tell_refusal(model)
    tell_languages(model)
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
