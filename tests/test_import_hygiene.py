"""What an import or `--help` costs: heavy packages only when they are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "streamlit", "pandas", "plotly", "sklearn", "scipy", "duckdb")


def imported_by(code: str) -> set[str]:
    report = f"import sys; {code}; print(','.join(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in found.stdout.strip().splitlines()[-1].split(",")}


def test_the_command_line_itself_is_light() -> None:
    assert not imported_by("import moescope.app.cli") & set(HEAVY)


@pytest.mark.parametrize("package", ["moescope.probe", "moescope.steering"])
def test_packages_are_light_until_a_name_is_used(package: str) -> None:
    assert not imported_by(f"import {package}") & set(HEAVY)


def test_reading_a_store_and_analysing_needs_no_torch() -> None:
    loaded = imported_by(
        "import moescope.probe.analysis, moescope.probe.storage.store, moescope.probe.figures"
    )
    assert not loaded & {"torch", "transformers", "streamlit"}
