"""`moescope analyze` and `moescope contrast`: questions asked of a recorded run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.app import console
from moescope.probe.errors import AnalysisInputError, InputError

if TYPE_CHECKING:
    from moescope.probe.analysis import Analysis, AnalysisTable, Filters, Parameter

StoreOption = Annotated[Path | None, typer.Option(help="The DuckDB file.")]
RunOption = Annotated[str | None, typer.Option(help="The run; not needed if there is only one.")]
WhereOption = Annotated[
    list[str] | None, typer.Option(help="Keep prompts with FIELD=VALUE[,VALUE]; may be repeated.")
]
TokensOption = Annotated[
    str | None,
    typer.Option(help="all, prompt, generated, last_prompt, first_generated:N or span."),
]
LayersOption = Annotated[str | None, typer.Option(help="Only these layers, as 0-15,20.")]
AllTokensOption = Annotated[
    bool, typer.Option("--all-tokens", help="Count template and special tokens too.")
]
SegmentOption = Annotated[
    list[str] | None,
    typer.Option(help="Only these segments: system, user, template, thinking, answer."),
]
KindOption = Annotated[
    str | None, typer.Option(help="Only routers of this kind: mlp, attention, encoder, mtp.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="Write the table to FILE.csv, .parquet or .json.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
FigureOption = Annotated[
    Path | None, typer.Option(help="Write the figures of the table to FILE.html.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Compute again, also when the result is stored.")
]
RowsOption = Annotated[int, typer.Option(min=1, help="Rows to print.")]


_CONTRAST_COLUMNS = (
    "layer", "kind", "expert", "rate_a", "rate_b", "score", "effect", "low", "high", "p", "q",
    "confirmed",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(analyze)
    app.command()(contrast)


def analyze(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The analysis; --list shows them.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    where: WhereOption = None,
    tokens: TokensOption = None,
    layers: LayersOption = None,
    segment: SegmentOption = None,
    kind: KindOption = None,
    all_tokens: AllTokensOption = False,
    out: OutOption = None,
    figure: FigureOption = None,
    fresh: FreshOption = False,
    rows: RowsOption = 20,
    as_json: JsonOption = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="List the analyses and their parameters.")
    ] = False,
) -> None:
    """Answer one question as a table. Parameters of an analysis are given as --NAME VALUE.

    Example: moescope analyze specialization --store demo.duckdb --by lang --out lang.csv
    """
    if list_all:
        _list_analyses(as_json)
        return
    if name is None or store is None:
        raise InputError("name an analysis and a --store; moescope analyze --list shows them")
    from moescope.probe.analysis import find_analysis

    check_targets(out, figure)
    analysis = find_analysis(name)
    arguments = analysis.parse(_extra_parameters(context.args))
    filters = read_filters(
        analysis.filters, where, tokens, layers, segment, kind, all_tokens=all_tokens
    )
    opened, run_id = open_run(store, run)
    table = _answer(opened, run_id, analysis, filters, arguments, fresh=fresh)
    show_table(table, out=out, figure=figure, rows=rows, as_json=as_json)


def contrast(
    store: Annotated[Path, typer.Option(help="The DuckDB file.")],
    a: Annotated[
        list[str] | None, typer.Option(help="Group a: FIELD=VALUE[,VALUE]; may be repeated.")
    ] = None,
    b: Annotated[list[str] | None, typer.Option(help="Group b, the same way.")] = None,
    run: RunOption = None,
    where: WhereOption = None,
    tokens: TokensOption = None,
    layers: LayersOption = None,
    segment: SegmentOption = None,
    kind: KindOption = None,
    all_tokens: AllTokensOption = False,
    method: Annotated[
        str,
        typer.Option(
            help="What ranks the experts: risk_difference, log_odds, paired, ftri, npmi, safex, "
            "esft_token, esft_gate or seuf."
        ),
    ] = "risk_difference",
    measure: Annotated[
        str | None, typer.Option(help="selections, weights or scores; as the method's paper.")
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(help="pooled: every token counts alike; unit: every unit does; prompt; sum."),
    ] = None,
    marker: Annotated[
        list[str] | None,
        typer.Option(help="npmi: TOKEN or TOKEN=COEFFICIENT; may be repeated."),
    ] = None,
    mass: Annotated[
        float | None, typer.Option(help="esft: share of the score that chosen experts reach.")
    ] = None,
    stability: Annotated[
        float | None, typer.Option(help="safex: share of resamples that choose an expert.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Field that joins prompts into units of resampling.")
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="Experts that the discovery half may nominate.")
    ] = 50,
    no_split: Annotated[
        bool, typer.Option("--no-split", help="No halves: step-down max-T over all experts.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of halves and resampling.")] = 0,
    out: OutOption = None,
    figure: FigureOption = None,
    fresh: FreshOption = False,
    rows: RowsOption = 20,
    as_json: JsonOption = False,
) -> None:
    """Which experts differ between two groups: found on one half, confirmed on the other.

    Example: moescope contrast --store demo.duckdb --a outcome=refused --b outcome=correct
    """
    from moescope.probe.analysis import find_analysis

    check_targets(out, figure)
    analysis = find_analysis("contrast")
    given = {
        "a": a, "b": b, "method": method, "measure": measure, "average": average, "unit": unit,
        "markers": marker, "mass": mass, "stability": stability, "candidates": candidates,
        "seed": seed, "split": "no" if no_split else "yes",
    }  # fmt: skip
    typed: dict[str, str | Sequence[str]] = {
        name: value if isinstance(value, list) else str(value)
        for name, value in given.items()
        if value is not None
    }
    arguments = analysis.parse(typed)
    filters = read_filters(
        analysis.filters, where, tokens, layers, segment, kind, all_tokens=all_tokens
    )
    opened, run_id = open_run(store, run)
    table = _answer(opened, run_id, analysis, filters, arguments, fresh=fresh)
    show_table(table, out=out, figure=figure, rows=rows, as_json=as_json, columns=_CONTRAST_COLUMNS)


def _answer(
    store: Any,
    run_id: str,
    analysis: Analysis,
    filters: Filters,
    arguments: Mapping[str, Any],
    *,
    fresh: bool,
) -> AnalysisTable:
    """The table, stored or computed, with a word on which of the two."""
    from moescope.probe.analysis.stored import answer

    found = answer(store, run_id, analysis, filters=filters, arguments=arguments, fresh=fresh)
    if found.stored_at is not None:
        console.say(
            f"stored result of {found.stored_at:%Y-%m-%d %H:%M} UTC, nothing has changed since; "
            "--fresh computes it again"
        )
    if found.not_stored is not None:
        console.say(f"the result is not stored: {found.not_stored}")
    return found.table


def open_run(store: Path, run: str | None) -> tuple[Any, str]:
    """The store and the run: the named one, or the only one there is.

    Raises:
        InputError: no such run, or several and none named.
    """
    from moescope.probe.storage.store import Store

    opened = Store(store)
    if run is not None:
        return opened, str(opened.run(run).run_id)
    names = [str(name) for name in opened.runs()["run_id"]]
    if len(names) != 1:
        known = ", ".join(names) if names else "none"
        raise InputError(f"say which run of {store} with --run; it has: {known}")
    return opened, names[0]


def read_filters(
    base: Filters,
    where: Sequence[str] | None,
    tokens: str | None,
    layers: str | None,
    segments: Sequence[str] | None,
    kind: str | None,
    *,
    all_tokens: bool,
) -> Filters:
    """The filters an analysis starts from, changed by what the user typed."""
    from dataclasses import replace

    from moescope.probe.analysis.filters import parse_conditions, parse_layers, parse_scope

    changes: dict[str, Any] = {}
    if where:
        changes["fields"] = {**base.fields, **parse_conditions(where)}
    if tokens is not None:
        changes["tokens"] = parse_scope(tokens)
    if layers is not None:
        changes["layers"] = parse_layers(layers)
    if segments:
        changes["segments"] = tuple(name for text in segments for name in text.split(","))
    if kind is not None:
        changes["kind"] = kind
    if all_tokens:
        changes["content_only"] = False
    return replace(base, **changes)


def show_table(
    table: AnalysisTable,
    *,
    out: Path | None,
    figure: Path | None = None,
    rows: int,
    as_json: bool,
    columns: Sequence[str] | None = None,
) -> None:
    """Print a table with what it was computed from, and write it where asked.

    `columns` limits what is printed for people; files and JSON hold all.
    """
    from moescope.probe.analysis import table_as_json, write_table

    if out is not None:
        write_table(table, out)
    if figure is not None:
        write_figures(table, figure)
    if as_json:
        console.print_json(table_as_json(table))
        return
    context = table.context
    console.emit(table.title)
    console.emit(
        f"{context.model}, run {context.run_id!r}: {context.num_prompts:,} prompts, "
        f"{context.num_tokens:,} tokens; {context.selection}"
    )
    for name, value in table.summary.items():
        console.emit(f"{name}: {_short(value)}")
    frame = table.frame if columns is None else table.frame[list(columns)]
    console.print_frame(frame, limit=rows)
    for note in table.notes:
        console.emit(f"note: {note}")
    if out is not None:
        console.say(f"{len(table.frame):,} rows written to {out}")
    if figure is not None:
        console.say(f"figures written to {figure}")


def check_targets(out: Path | None, figure: Path | None) -> None:
    """Refuse names that do not say a format, before anything is computed.

    Raises:
        InputError: for another suffix.
    """
    from moescope.probe.analysis.export import check_suffix

    if out is not None:
        check_suffix(out)
    if figure is not None and figure.suffix.lower() != ".html":
        raise InputError(f"{figure}: figures are written as a page; its name must end in .html")


def write_figures(table: AnalysisTable, path: Path) -> None:
    """All figures of a table as one page.

    Raises:
        InputError: the table is only read, or the place cannot be written.
    """
    from moescope.probe.analysis.export import write_whole
    from moescope.probe.figures.drawings import drawings_of, figure_page

    if not drawings_of(table):
        raise InputError(f"analysis {table.name} has no figure; leave out --figure")
    write_whole(path, figure_page(table).encode())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, default=str) if isinstance(value, Mapping | list) else str(value)


def _extra_parameters(words: Sequence[str]) -> dict[str, str | Sequence[str]]:
    """`--by lang --normalized` as `{"by": ["lang"], "normalized": ["true"]}`."""
    found: dict[str, list[str]] = {}
    name: str | None = None
    for word in words:
        if word.startswith("--"):
            if name is not None:
                found[name].append("true")
            option, has_value, value = word.removeprefix("--").partition("=")
            name = option.replace("-", "_")
            found.setdefault(name, [])
            if has_value:
                found[name].append(value)
                name = None
        elif name is None:
            raise AnalysisInputError(f"{word!r} is not expected here; parameters are --NAME VALUE")
        else:
            found[name].append(word)
            name = None
    if name is not None:
        found[name].append("true")
    return dict(found)


def _list_analyses(as_json: bool) -> None:
    from moescope.probe.analysis import ANALYSES

    if as_json:
        console.print_json(
            {
                name: {
                    "question": analysis.question,
                    "parameters": {p.name: p.help for p in analysis.parameters},
                }
                for name, analysis in ANALYSES.items()
            }
        )
        return
    for analysis in ANALYSES.values():
        console.emit(f"{analysis.name}: {analysis.question}")
        for parameter in analysis.parameters:
            name = parameter.name.replace("_", "-")
            console.emit(f"    --{name}  {parameter.help} ({_default(parameter)})")


def _default(parameter: Parameter) -> str:
    """What holds when a parameter is not given, in words."""
    if parameter.required:
        return "required"
    if parameter.default is None:
        return "none by default"
    if parameter.type == "conditions":
        from moescope.probe.analysis.filters import describe_conditions

        return f"default {describe_conditions(parameter.default)}"
    return f"default {parameter.default}"
