"""Imports point down: app -> steering -> probe -> kernels; analysis and storage know no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "app": {"app", "steering", "probe", "kernels"},
    "steering": {"steering", "probe", "kernels"},
    "probe": {"probe", "kernels"},
    "kernels": {"kernels"},
}
STREAMLIT_ONLY_IN = "app"
NO_TORCH = ("probe/analysis", "probe/figures", "probe/storage", "probe/prompts.py",
            "probe/outcomes.py", "probe/errors.py", "probe/shipped.py")  # fmt: skip


def modules(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_point_down(folder: str) -> None:
    for path in sources(folder):
        for module in modules(path):
            if module.startswith("moescope."):
                target = module.split(".")[1]
                assert target in MAY_IMPORT[folder], f"{path} imports {module}"
            if module.split(".")[0] == "streamlit":
                assert folder == STREAMLIT_ONLY_IN, f"{path} imports streamlit"


def test_what_reads_a_store_imports_no_torch() -> None:
    for path in [path for folder in ("probe",) for path in sources(folder)]:
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(NO_TORCH):
            heavy = {name for name in modules(path) if name.split(".")[0] in {
                "torch", "transformers", "transformer_lens"}}  # fmt: skip
            assert not heavy, f"{relative} imports {heavy}"


def test_kernels_know_nothing_but_torch() -> None:
    for path in sources("kernels"):
        roots = {module.split(".")[0] for module in modules(path)}
        assert roots <= {"__future__", "collections", "dataclasses", "typing", "torch", "moescope"}
