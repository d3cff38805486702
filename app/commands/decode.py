"""Other ways of decoding from the command line: `decode contrast` and `decode remix`.

Both stand beside the model's own decoding and beside random controls of the method.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
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
    from moescope.steering.decoding import DecodingComparison

PromptsOption = Annotated[
    list[str], typer.Option(help="A prompt file, or a shipped set; may be repeated.")
]
WhereOption = Annotated[
    list[str] | None, typer.Option(help="Keep prompts with FIELD=VALUE[,VALUE]; may be repeated.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only so many prompts.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Longest answer.")]
ControlsOption = Annotated[
    int, typer.Option(min=0, help="Controls: the method with something random in its place.")
]
StoreOption = Annotated[Path | None, typer.Option(help="Store the rates in this DuckDB file.")]
OutOption = Annotated[Path | None, typer.Option(help="Write the rates to FILE.csv.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    decode = typer.Typer(help="Answer prompts by another way of decoding.", no_args_is_help=True)
    decode.command("contrast")(contrast)
    decode.command("remix")(remixed)
    app.add_typer(decode, name="decode")


def contrast(
    model: ModelArgument,
    prompts: PromptsOption,
    where: WhereOption = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="The weak forward's expert, by rank from 0; else K.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Plausible: at least so much of the best.")] = 0.1,
    beta: Annotated[float, typer.Option(help="How much the weak scores are discounted.")] = 0.5,
    controls: ControlsOption = 2,
    seed: Annotated[int, typer.Option(help="Seed of the controls and of the bootstrap.")] = 0,
    limit: LimitOption = None,
    max_new_tokens: LengthOption = 32,
    store: StoreOption = None,
    out: OutOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Contrast the model with itself under one unchosen expert (SCMoE).

    Each control does the same by another unchosen rank, drawn at random.

    Example: moescope decode contrast demo --prompts refusal --beta 0.5 --limit 40
    """
    from moescope.steering.contrast_decoding import SelfContrast, contrasting
    from moescope.steering.decoding import compare_decoding
    from moescope.steering.decoding_controls import contrast_controls

    _check_store(store)
    settings = SelfContrast(rank=rank, alpha=alpha, beta=beta)
    chosen = select_prompts(prompts, where)[:limit]
    bundle = load(model, device, dtype, trust_remote_code)
    others, notes = contrast_controls(bundle.model, settings, number=controls, seed=seed)
    with console.progress("decoding", "answers") as update:
        found = compare_decoding(
            bundle, chosen, lambda _: contrasting(bundle.model, settings), name="self-contrast",
            settings=asdict(settings), controls=others, notes=notes, seed=seed,
            max_new_tokens=max_new_tokens, progress=update,
        )  # fmt: skip
    _keep_and_show(found, store, out, as_json)


def remixed(
    model: ModelArgument,
    prompts: PromptsOption,
    references: Annotated[
        list[str], typer.Option(help="Reference prompts with answers; file or shipped set.")
    ],
    where: WhereOption = None,
    references_where: Annotated[
        list[str] | None, typer.Option(help="Keep references with FIELD=VALUE[,VALUE].")
    ] = None,
    num_references: Annotated[
        int, typer.Option(min=1, help="Ask only so many references, drawn at random.")
    ] = 200,
    seed: Annotated[
        int, typer.Option(help="Seed of that draw, of the controls and of the bootstrap.")
    ] = 0,
    controls: ControlsOption = 2,
    neighbours: Annotated[int, typer.Option(min=1, help="References for each prompt.")] = 3,
    mix: Annotated[float, typer.Option(help="The references' share of the scores.")] = 1.0,
    layers: Annotated[int, typer.Option(min=1, help="The last so many routed layers.")] = 5,
    core: Annotated[int, typer.Option(min=0, help="Experts that change; 0 for all.")] = 20,
    limit: LimitOption = None,
    max_new_tokens: LengthOption = 32,
    store: StoreOption = None,
    out: OutOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Route by similar prompts that the model answers right (C3PO's kernel regression).

    References are the prompts of --references that the model answers right by itself; those with
    the text of a prompt that is asked are left out. Each control takes references drawn at random
    instead of the nearest.

    Example: moescope decode remix demo --prompts new.jsonl --references known.jsonl
    """
    from moescope.steering.decoding import compare_decoding, right_prompts
    from moescope.steering.decoding_controls import remix_controls
    from moescope.steering.remix import Remix, remix
    from moescope.steering.remix_store import references_of

    _check_store(store)

    settings = Remix(
        num_neighbours=neighbours, mix=mix, num_layers=layers, core_experts=core or None
    )
    chosen = select_prompts(prompts, where)[:limit]
    asked = {prompt.text for prompt in chosen}
    sources = [one for one in select_prompts(references, references_where) if one.text not in asked]
    bundle = load(model, device, dtype, trust_remote_code)
    with console.progress("answering references", "answers") as update:
        right = right_prompts(
            bundle, sources, at_most=num_references, seed=seed, max_new_tokens=max_new_tokens,
            progress=update,
        )  # fmt: skip
    known = references_of(bundle, right)
    console.say(f"{len(right)} references that the model answers right")
    texts = {prompt.prompt_id: prompt.text for prompt in chosen}
    others, notes = remix_controls(
        bundle.model, known, texts, settings, number=controls, seed=seed
    )  # fmt: skip
    with console.progress("decoding", "answers") as update:
        found = compare_decoding(
            bundle, chosen, lambda sites: remix(bundle.model, known, texts, settings, sites=sites),
            name="remix", controls=others, notes=notes, max_new_tokens=max_new_tokens, seed=seed,
            settings={**asdict(settings), "references": list(known.keys)}, progress=update,
        )  # fmt: skip
    _keep_and_show(found, store, out, as_json)


def _check_store(store: Path | None) -> None:
    """Refuse what is no store before the long work."""
    from moescope.probe.storage.runs import check_store_target

    if store is not None:
        check_store_target(store)


def _keep_and_show(
    found: DecodingComparison, store: Path | None, out: Path | None, as_json: bool
) -> None:
    from moescope.steering.decoding_store import store_decoding

    if store is not None:
        store_decoding(store, found)
    if out is not None:
        found.frame.to_csv(out, index=False)
    if as_json:
        console.print_json(found.to_json())
        return
    for line in found.lines():
        console.emit(line)
