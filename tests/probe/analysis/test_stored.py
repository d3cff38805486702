"""Stored results: found again when nothing changed, computed again when anything did."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moescope.probe.analysis import ANALYSES, Analysis, AnalysisTable, Filters, find_analysis
from moescope.probe.analysis.stored import Answer, answer
from moescope.probe.storage.care import delete_run, vacuum_store
from moescope.probe.storage.locks import writing
from moescope.probe.storage.results import results_folder
from moescope.probe.storage.store import Store


@pytest.fixture
def store(random_store: Store, tmp_path: Path) -> Store:
    return Store(shutil.copy(random_store.path, tmp_path / "store.duckdb"))


def ask(store: Store, name: str = "load", filters: Filters | None = None, **typed: str) -> Answer:
    analysis = find_analysis(name)
    arguments = analysis.parse(typed)
    return answer(store, "run", analysis, filters=filters or analysis.filters, arguments=arguments)


def same(first: AnalysisTable, second: AnalysisTable) -> bool:
    pd.testing.assert_frame_equal(first.frame, second.frame)
    return (first.columns, first.context, first.notes, first.title) == (
        second.columns, second.context, second.notes, second.title
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "typed"),
    [("load", {}), ("specialization", {"by": "lang"}), ("balance-loss", {}),
     ("contrast", {"a": "label=a", "b": "label=b", "candidates": "4", "bootstrap": "20"}),
     ("contrast", {"a": "label=a", "method": "esft_token", "bootstrap": "20"})],
)  # fmt: skip
def test_a_stored_result_is_the_result(store: Store, name: str, typed: dict[str, str]) -> None:
    first, second = ask(store, name, **typed), ask(store, name, **typed)
    assert first.stored_at is None
    assert second.stored_at is not None
    assert same(first.table, second.table)
    assert dict(first.table.summary).keys() == dict(second.table.summary).keys()


def test_other_questions_are_computed(store: Store) -> None:
    ask(store)
    for answered in (
        ask(store, by="lang"), ask(store, "balance"), ask(store, filters=Filters(layers=(1,))),
    ):  # fmt: skip
        assert answered.stored_at is None


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE prompts SET outcome = 'refused' WHERE prompt_id = 0",
        "UPDATE runs SET status = 'running'",
        "INSERT INTO ingested_shards VALUES ('run', 'x', 'y')",
        "DELETE FROM prompts WHERE prompt_id = 5",
    ],
)
def test_a_changed_run_is_asked_again(store: Store, change: str) -> None:
    ask(store)
    assert ask(store).stored_at is not None
    with writing(store.path) as con:
        con.execute(change).fetchall()
    assert ask(store).stored_at is None


def test_a_changed_file_is_read_again(store: Store, tmp_path: Path) -> None:
    scores = tmp_path / "scores.csv"
    read: list[str] = []

    def reader(opened: Store, run_id: str, *, filters: Filters, scores: str) -> AnalysisTable:
        read.append(Path(scores).read_text())
        return find_analysis("load").function(opened, run_id, filters=filters)

    parameter = replace(
        next(p for p in ANALYSES["language-scores"].parameters if p.name == "scores")
    )
    analysis = Analysis(
        name="reads-a-file", title="", question="", function=reader, parameters=(parameter,)
    )
    arguments: dict[str, Any] = {"scores": str(scores)}
    for text in ("one", "one", "two"):
        scores.write_text(text)
        answer(store, "run", analysis, filters=Filters(), arguments=arguments)
    assert read == ["one", "two"]


def test_fresh_and_damaged_results_are_computed(store: Store) -> None:
    ask(store)
    analysis = find_analysis("load")
    arguments = analysis.parse({})
    fresh = answer(store, "run", analysis, filters=Filters(), arguments=arguments, fresh=True)
    assert fresh.stored_at is None
    (path,) = results_folder(store.path, "run").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    assert ask(store).stored_at is None
    assert ask(store).stored_at is not None


def test_what_cannot_be_written_is_still_answered(store: Store) -> None:
    results_folder(store.path).write_text("a file where the folder should be")
    answered = ask(store)
    assert len(answered.table.frame)
    assert answered.not_stored is not None
    assert "cannot be written" in answered.not_stored


def test_results_go_with_their_run_and_with_a_vacuum(store: Store) -> None:
    ask(store)
    vacuum_store(store.path)
    assert not results_folder(store.path).exists()
    ask(store)
    delete_run(store.path, "run")
    assert not results_folder(store.path, "run").exists()
