"""Which model families work: `families`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.app import console

if TYPE_CHECKING:
    from moescope.steering.survey import SurveyRow


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(families)


def families(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FAMILY]...", help="Families, or family+variant; else all."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32 or bfloat16; repeat it for both (default).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Try recording and every steering action on a tiny model of every family that is installed.

    Example: moescope families olmoe deepseek_v3
    """
    import transformers

    from moescope.app.survey_table import document
    from moescope.probe.errors import InputError
    from moescope.steering.survey import DTYPES, survey

    unknown = sorted(set(dtype or DTYPES) - set(DTYPES))
    if unknown:
        raise InputError(f"--dtype is {' or '.join(DTYPES)}, not {unknown[0]!r}")
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no directory {out.absolute().parent}")
    transformers.logging.set_verbosity_error()
    with console.progress("families", "families") as progress:
        rows = list(survey(names or (), dtypes=dtype or DTYPES, progress=progress))
    text = document(rows, transformers.__version__)
    if out is not None:
        out.write_text(text, encoding="utf-8")
        console.say(f"{len({row.family for row in rows})} rows written to {out}")
    if as_json:
        console.print_json([row.to_json() for row in rows])
    elif out is None:
        console.print_rows(
            ("family", "dtype", "layers", "held", "what does not hold"), map(_short, rows)
        )


def _short(row: SurveyRow) -> tuple[Any, ...]:
    """A row of the survey for people: what holds is counted, what does not is said."""
    if row.outcomes is None:
        return row.family, row.dtype or None, None, None, row.reason
    reasons: dict[str, list[str]] = {}
    for name, reason in row.failed.items():
        reasons.setdefault(reason, []).append(name)
    said = "; ".join(f"{', '.join(found)}: {reason}" for reason, found in reasons.items())
    held = f"{len(row.outcomes) - len(row.failed)} of {len(row.outcomes)}"
    return row.family, row.dtype, len(row.layers), held, said
