"""Looking at what is there: a model (`doctor`), a store (`runs`), a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.app import console

StoreOption = Annotated[Path, typer.Option(help="The DuckDB file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(doctor)
    app.command()(runs)
    app.command()(dashboard)


def doctor(
    model: Annotated[str, typer.Argument(help="demo, a directory, or a hub id[@revision].")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model: auto, balanced, sequential.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own code run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a model needs and how it routes, and prove that moescope reads it right.

    Example: moescope doctor allenai/OLMoE-1B-7B-0125-Instruct
    """
    from moescope.probe.doctor import examine
    from moescope.probe.models import estimate_memory, load_model

    memory = estimate_memory(model, dtype=dtype, trust_remote_code=trust_remote_code)
    if not as_json:  # before loading: it is what one wants to know of a model that does not fit
        for line in memory.lines():
            console.emit(line)
    bundle = load_model(
        model,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    report = examine(bundle)
    if as_json:
        console.print_json({**report.to_json(), "memory": memory.to_json()})
        return
    told_before_loading = memory.active_parameters is not None
    for line in [*report.lines(), *([] if told_before_loading else report.size_lines())]:
        console.emit(line)
    console.print_rows(
        ("layer", "kind", "experts", "top-k", "shared", "rule", "verified"), report.layer_rows()
    )


def runs(store: StoreOption, as_json: JsonOption = False) -> None:
    """List the runs of a store.

    Example: moescope runs --store demo.duckdb
    """
    from moescope.probe.storage.store import Store

    frame = Store(store).query(
        "SELECT run_id, model, status, record_level, num_prompts, num_tokens, source, "
        "strftime(created_at, '%Y-%m-%d %H:%M') AS created_at FROM runs ORDER BY created_at, run_id"
    )
    console.print_frame(frame, as_json=as_json)


def dashboard(
    store: StoreOption,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8501,
) -> None:
    """Open the dashboard on a store, on 127.0.0.1 only.

    Example: moescope dashboard --store demo.duckdb
    """
    from moescope.app.server import serve
    from moescope.probe.storage.store import Store

    Store(store).runs()
    console.say(f"dashboard of {store} at http://127.0.0.1:{port} (Ctrl-C ends it)")
    raise typer.Exit(serve(store, port))
