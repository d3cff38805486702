"""Streamlit's own command line, with what the first page needs imported before the server is up.

    python -m moescope.app.start run app/main.py --server.port=8501

The first visitor would otherwise wait for these imports; none of them is torch or scipy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from streamlit.web import cli

FIRST_PAGE: Final = (
    "duckdb",
    "pandas",
    "pyarrow.pandas_compat",
    "streamlit.dataframe_util",
    "streamlit.elements.arrow",
    "moescope.probe.storage.store",
)


def main() -> None:
    """Import, then do as Streamlit would."""
    for name in FIRST_PAGE:
        import_module(name)
    cli.main(prog_name="streamlit")


if __name__ == "__main__":
    main()
