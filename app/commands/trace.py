"""`moescope trace`: record a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moescope.app import console


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
    trust_remote_code: bool = False


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
            str | None, typer.Option(help="Spread the model: auto, balanced, sequential.")
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
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="Let the model's own code run.")
        ] = False,
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
                trust_remote_code=trust_remote_code,
            )
        )  # fmt: skip


def run_trace(arguments: TraceArguments) -> None:
    """Check everything that is cheap to check, then load the model and record."""
    from moescope.probe.analysis.filters import parse_layers
    from moescope.probe.prompts import read_prompt_files
    from moescope.probe.storage.runs import check_run_name, check_store_target

    files = read_prompt_files(arguments.prompts, skip_bad_lines=arguments.skip_bad_lines)
    prompts = [prompt for file in files for prompt in file.prompts][: arguments.limit]
    for problem in (problem for file in files for problem in file.skipped):
        console.say(f"skipped: {problem}")
    check_run_name(arguments.run)
    check_store_target(arguments.store)
    layers = None if arguments.layers is None else parse_layers(arguments.layers)

    from moescope.probe.generation import read_sampling
    from moescope.probe.models import load_model
    from moescope.probe.trace import TraceOptions, trace_prompts

    options = TraceOptions(
        level=arguments.record,  # type: ignore[arg-type]
        norms=arguments.norms,
        max_new_tokens=arguments.generate,
        sampling=read_sampling(arguments.sampling),
        chat_template=arguments.chat_template,  # type: ignore[arg-type]
        system=arguments.system,
        layers=layers,
        tokens_per_batch=arguments.tokens_per_batch,
    )
    bundle = load_model(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        trust_remote_code=arguments.trust_remote_code,
    )
    hashes = {str(file.path.name): file.sha256 for file in files}
    skipped = [problem for file in files for problem in file.skipped]
    with console.progress(f"recording {arguments.run}", "prompts") as update:
        summary = trace_prompts(
            bundle,
            prompts,
            arguments.store,
            arguments.run,
            options,
            manifest={"prompt_files": hashes, "skipped_lines": skipped},
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
