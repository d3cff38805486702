"""What is written for other systems and can be read is read back as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moescope.app.cli import main
from moescope.probe.interchange.report import ImportReport
from moescope.probe.storage import Store

Import = Callable[..., ImportReport]


@pytest.fixture
def store(golden: ModuleType, import_files: Import, tmp_path: Path) -> Path:
    """A store with a run `r` of ids, weights and order."""
    path = tmp_path / "store.duckdb"
    import_files(path, "atlas", golden.atlas(tmp_path), top_k=2)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["moescope", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def rows(store: Path, name: str, columns: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        Store(store)
        .arrow(f"SELECT {columns} FROM {name} WHERE run_id = 'r' ORDER BY ALL")
        .to_pylist()
    )
    return found


SLOTS = ("routing", "prompt_id, position, layer, rank, expert, weight")
COUNTS = "SELECT layer, expert, sum(num_tokens)::INT AS n FROM usage GROUP BY ALL ORDER BY ALL"


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_of_slots(store: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, back = store.with_name("tables"), store.with_name("back.duckdb")
    run(monkeypatch, "export", kind, "--store", store, "--run", "r", "--out", out)
    run(monkeypatch, "import", "table", out / f"routing.{kind}", "--store", back, "--run", "r",
        "--num-experts", 8)  # fmt: skip
    assert rows(back, *SLOTS) == rows(store, *SLOTS) != []


@pytest.mark.parametrize("suffix", ["pt", "json"])
def test_counts_for_sglang(store: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, back = store.with_name(f"counts.{suffix}"), store.with_name("back.duckdb")
    run(monkeypatch, "export", "sglang", "--store", store, "--run", "r", "--out", out)
    run(monkeypatch, "import", "sglang", out, "--store", back, "--run", "r", "--top-k", 2)
    assert Store(back).arrow(COUNTS).equals(Store(store).arrow(COUNTS))


def test_an_archive(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, back = store.with_name("r.zip"), store.with_name("back.duckdb")
    run(monkeypatch, "export", "archive", "--store", store, "--run", "r", "--out", out)
    run(monkeypatch, "import", "archive", out, "--store", back, "--run", "r")
    for name in ("runs", "layers", "prompts", "tokens", "usage_arrays", "routing_arrays"):
        assert rows(back, name, "*") == rows(store, name, "*") != []
