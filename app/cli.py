"""The command line: one program, `moescope`, whose commands import heavy things when they run.

Exit codes: 0 done; 2 the user's input is wrong (one sentence); 1 anything else (one sentence, and
the traceback in a log file that it names); 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from moescope.app.commands import (
    analyze,
    cause_parts,
    causes,
    decode,
    demo,
    exchange,
    exporting,
    families,
    harness,
    inspect,
    plans,
    shipped,
    steer,
    store,
    sweep,
    trace,
)
from moescope.probe.errors import InputError, MoescopeError

app = typer.Typer(
    name="moescope",
    help="Record, analyse and steer the routing of Mixture-of-Experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
demo.register(app)
inspect.register(app)
store.register(app)
shipped.register(app)
exchange.register(app)
exporting.register(app)
trace.register(app)
analyze.register(app)
steer.register(app)
plans.register(app)
decode.register(app)
sweep.register(app)
harness.register(app)
causes.register(app)
cause_parts.register(app)
families.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moescope {version('moescope')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say which version."),
    ] = False,
) -> None:
    """Record, analyse and steer the routing of Mixture-of-Experts language models."""


def main() -> None:
    """Run the program and turn every error into a sentence and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for work sleep instead of spinning: on cores shared with an ingester, a
    # dashboard or another job, spinning slows small batches down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # transformers' own bars are for terminals
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = app(standalone_mode=False)
    except (typer.Exit, SystemExit):
        raise
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        _say("interrupted; start the same command again to go on where it stopped")
        sys.exit(130)
    except InputError as error:
        _say(str(error))
        sys.exit(2)
    except MoescopeError as error:
        _say(str(error))
        sys.exit(1)
    except Exception as error:
        _exit_for(error)
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _say(sentence: str) -> None:
    print(f"moescope: {sentence}", file=sys.stderr)


def _exit_for(error: Exception) -> None:
    """Usage errors of the command line say what they are; all else goes into a log file."""
    show = getattr(error, "show", None)
    code = getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        sys.exit(code)
    descriptor, name = tempfile.mkstemp(prefix="moescope-", suffix=".log")
    with os.fdopen(descriptor, "w") as log:
        traceback.print_exc(file=log)
    sentence = " ".join(str(error).split())[:300]
    _say(f"stopped by an unexpected {type(error).__name__}: {sentence}; details in {Path(name)}")
    sys.exit(1)


if __name__ == "__main__":
    main()
