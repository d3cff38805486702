"""What the tests of other systems' formats share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moescope.probe.interchange.assemble import assemble
from moescope.probe.interchange.files import digest
from moescope.probe.interchange.imported import ImportOptions
from moescope.probe.interchange.into_store import store_import
from moescope.probe.interchange.registry import importer
from moescope.probe.interchange.report import ImportReport


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"interchange_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The module `golden.py` beside this file."""
    return load("golden")


@pytest.fixture(scope="session")
def import_files() -> Callable[..., ImportReport]:
    """Import files into a store as the command does; returns the report."""

    def run(
        store: Path, format_name: str, paths: list[Path], name: str = "r", **options: Any
    ) -> ImportReport:
        chosen = ImportOptions(**options)
        imported = importer(format_name).read(paths, chosen)
        store_import(assemble(imported, chosen, digest(paths)), store, name)
        return imported.report

    return run
