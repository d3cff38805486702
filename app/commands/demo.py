"""`moescope demo`: the whole loop on the shipped demo model, then the dashboard."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
