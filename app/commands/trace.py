"""`moescope trace`: record a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moescope.app import console

if TYPE_CHECKING:
    from moescope.probe.engine import Engine
    from moescope.probe.prompts import Prompt
    from moescope.probe.rendering import RenderedPrompt
    from moescope.probe.trace_options import TraceOptions


class Level(StrEnum):
    """What is kept of the routing."""

    usage = "usage"
    topk = "topk"
    probs = "probs"


class Switch(StrEnum):
    """Whether the chat template is used."""

    auto = "auto"
    on = "on"
    off = "off"


class RoutingIn(StrEnum):
    """Where the routing of single tokens is kept."""

    store = "store"
    shards = "shards"


class EngineName(StrEnum):
    """Where batches run."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True, kw_only=True)
class TraceArguments:
    """`moescope trace` as the user typed it."""

    model: str
    prompts: list[str]
    store: Path
    run: str
    record: str = "topk"
    norms: bool = False
    generate: int = 0
    sampling: str = "greedy"
    chat_template: str = "auto"
    system: str | None = None
    layers: str | None = None
    tokens_per_batch: int = 4096
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    limit: int | None = None
    skip_bad_lines: bool = False
    keep_shards: bool = False
    routing_in: str = "store"
    trust_remote_code: bool = False
    engine: str = "local"
    workers: int = 1
    gpus_per_worker: float = 0.0
    cpus_per_worker: int = 1
    shards_at: str | None = None
    ray_address: str | None = None


def register(app: typer.Typer) -> None:
    """Add the command to the program."""

    @app.command()
    def trace(
        model: Annotated[str, typer.Argument(help="demo, a directory, or a hub id[@revision].")],
        prompts: Annotated[
            list[str], typer.Option(help="A prompt file, or a shipped set; may be repeated.")
        ],
        store: Annotated[Path, typer.Option(help="The DuckDB file; made if it does not exist.")],
        run: Annotated[str, typer.Option(help="The run's name, unique in the store.")],
        record: Annotated[
            Level,
            typer.Option(
                help="Counts per prompt (usage), every token's experts too (topk), or the "
                "router's probability of every expert as well (probs)."
            ),
        ] = Level.topk,
        norms: Annotated[
            bool,
            typer.Option(
                "--norms", help="Measure the outputs of the selected experts (they run twice)."
            ),
        ] = False,
        generate: Annotated[
            int, typer.Option(min=0, help="Tokens to generate after each prompt.")
        ] = 0,
        sampling: Annotated[
            str, typer.Option(help="greedy, or a JSON file with temperature, top_p, seed.")
        ] = "greedy",
        chat_template: Annotated[
            Switch, typer.Option(help="Put prompts through the tokenizer's chat template.")
        ] = Switch.auto,
        system: Annotated[str | None, typer.Option(help="A system message.")] = None,
        layers: Annotated[str | None, typer.Option(help="Keep only these, as 0-15,20.")] = None,
        tokens_per_batch: Annotated[
            int, typer.Option(min=1, help="Padded tokens per batch, answers included.")
        ] = 4096,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
        dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
        device_map: Annotated[
            str | None, typer.Option(help="Spread a model over GPUs: auto, balanced, sequential.")
        ] = None,
        limit: Annotated[
            int | None, typer.Option(min=1, help="Only the first so many prompts.")
        ] = None,
        skip_bad_lines: Annotated[
            bool, typer.Option("--skip-bad-lines", help="List bad lines instead of stopping.")
        ] = False,
        keep_shards: Annotated[
            bool, typer.Option("--keep-shards", help="Keep the Parquet shards beside the store.")
        ] = False,
        routing_in: Annotated[
            RoutingIn,
            typer.Option(
                help="Put routing into the store, or leave it in Parquet shards beside it, which "
                "the store reads in place."
            ),
        ] = RoutingIn.store,
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="Let the model's own code run.")
        ] = False,
        engine: Annotated[
            EngineName, typer.Option(help="Run batches in this process, or on a Ray cluster.")
        ] = EngineName.local,
        workers: Annotated[
            int, typer.Option(min=1, help="Ray: workers, each with a model of its own.")
        ] = 1,
        gpus_per_worker: Annotated[float, typer.Option(min=0, help="Ray: GPUs of a worker.")] = 0.0,
        cpus_per_worker: Annotated[
            int, typer.Option(min=1, help="Ray: CPUs and threads of a worker.")
        ] = 1,
        shards_at: Annotated[
            str | None,
            typer.Option(help="Ray: an fsspec URL for shards, where no folder is shared."),
        ] = None,
        ray_address: Annotated[
            str | None, typer.Option(help="Ray: the cluster; else one on this machine.")
        ] = None,
    ) -> None:
        """Record a run; the same command again resumes an unfinished one.

        Example: moescope trace demo --prompts refusal --store demo.duckdb --run base --generate 24
        """
        run_trace(
            TraceArguments(
                model=model, prompts=prompts, store=store, run=run, record=record.value,
                norms=norms,
                generate=generate, sampling=sampling, chat_template=chat_template.value,
                system=system, layers=layers, tokens_per_batch=tokens_per_batch, device=device,
                dtype=dtype, device_map=device_map, limit=limit,
                skip_bad_lines=skip_bad_lines, keep_shards=keep_shards,
                routing_in=routing_in.value,
                trust_remote_code=trust_remote_code, engine=engine.value, workers=workers,
                gpus_per_worker=gpus_per_worker, cpus_per_worker=cpus_per_worker,
                shards_at=shards_at, ray_address=ray_address,
            )
        )  # fmt: skip


def run_trace(arguments: TraceArguments) -> None:
    """Check everything that is cheap to check, then load the model and record."""
    from moescope.probe.analysis.filters import parse_layers
    from moescope.probe.prompts import read_prompt_files
    from moescope.probe.storage.runs import check_run_name, check_store_target

    files = read_prompt_files(arguments.prompts, skip_bad_lines=arguments.skip_bad_lines)
    prompts = [prompt for file in files for prompt in file.prompts][: arguments.limit]
    for file in (file for file in files if file.recognized is not None):
        console.say(f"{file.path}: read as {file.recognized} ({len(file.prompts):,} prompts)")
    for problem in (problem for file in files for problem in file.skipped):
        console.say(f"skipped: {problem}")
    check_run_name(arguments.run)
    check_store_target(arguments.store)
    layers = None if arguments.layers is None else parse_layers(arguments.layers)

    from moescope.probe.generation import read_sampling
    from moescope.probe.trace_options import TraceOptions

    options = TraceOptions(
        level=arguments.record,  # type: ignore[arg-type]
        norms=arguments.norms,
        max_new_tokens=arguments.generate,
        sampling=read_sampling(arguments.sampling),
        chat_template=arguments.chat_template,  # type: ignore[arg-type]
        system=arguments.system,
        layers=layers,
        tokens_per_batch=arguments.tokens_per_batch,
        routing_in=arguments.routing_in,  # type: ignore[arg-type]
    )
    hashes = {str(file.path.name): file.sha256 for file in files}
    skipped = [problem for file in files for problem in file.skipped]
    rendered, engine, chat_template = _engine(arguments, prompts, options)
    from moescope.probe.trace import collect

    with console.progress(f"recording {arguments.run}", "prompts") as update:
        summary = collect(
            engine,
            rendered,
            arguments.store,
            arguments.run,
            options,
            manifest={
                "prompt_files": hashes,
                "skipped_lines": skipped,
                "chat_template": chat_template,
                "engine": arguments.engine,
            },
            keep_shards=arguments.keep_shards,
            announce=console.say,
            progress=update,
        )
    resumed = f" ({summary.resumed:,} of them earlier)" if summary.resumed else ""
    console.say(
        f"run {summary.run_id!r}: {summary.prompts:,} prompts{resumed}, {summary.tokens:,} tokens, "
        f"{summary.rows:,} routing rows in {arguments.store}; this took "
        f"{console.duration(summary.seconds)} and {summary.size_bytes / 1e6:.1f} MB of shards"
    )


def _engine(
    arguments: TraceArguments, prompts: Sequence[Prompt], options: TraceOptions
) -> tuple[Sequence[RenderedPrompt], Engine, str | None]:
    """Rendered prompts, what runs them, and the chat template."""
    from moescope.probe.models import load_model, load_tokenizer

    if arguments.engine == "local":
        bundle = load_model(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            device_map=arguments.device_map,
            trust_remote_code=arguments.trust_remote_code,
        )
        from moescope.probe.engine import LocalEngine
        from moescope.probe.trace import render_prompts

        rendered = render_prompts(bundle.tokenizer, prompts, options)
        return rendered, LocalEngine(bundle, rendered, options), bundle.tokenizer.chat_template
    from moescope.probe.ray_engine import ModelSource, RayEngine, RayOptions
    from moescope.probe.trace import render_prompts

    tokenizer = load_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
    rendered = render_prompts(tokenizer, prompts, options)
    source = ModelSource(
        name=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        trust_remote_code=arguments.trust_remote_code,
    )
    spread = RayOptions(
        workers=arguments.workers,
        gpus_per_worker=arguments.gpus_per_worker,
        cpus_per_worker=arguments.cpus_per_worker,
        shards_at=arguments.shards_at,
        address=arguments.ray_address,
    )
    return rendered, RayEngine(source, rendered, options, spread), tokenizer.chat_template
