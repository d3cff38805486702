"""Beginning a run, and beginning it again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.errors import MoescopeError, RunError, StoreError
from moescope.probe.storage import (
    Store,
    begin_run,
    check_store_target,
    run_folder,
    writing,
)
from moescope.probe.storage.files import TEMPORARY_PREFIX
from moescope.probe.storage.ingest import Ingester
from moescope.probe.storage.run_folder import RunFolder

printable = st.characters(exclude_categories=("Cs", "Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs"))
run_names = st.text(st.one_of(printable, st.sampled_from(" ./\\:*~'\"%")), min_size=1, max_size=200)


def ingest(store: Path, folder: Path) -> None:
    Ingester(store, RunFolder(folder)).run(lambda: False)


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_new_run_has_a_folder_and_everything_to_do(tmp_path: Path, synthetic: ModuleType) -> None:
    description = synthetic.describe(3)
    with begin_run(tmp_path / "a.duckdb", "base", description) as point:
        assert (point.is_new, point.is_complete) == (True, False)
        assert point.missing == ("shard-00000", "shard-00001", "shard-00002")
        name, _, recorded = point.folder.read()
        assert name == "base"
        assert recorded.to_json() == description.to_json()
        assert recorded.fingerprint() == description.fingerprint()
    assert not (tmp_path / "a.duckdb").exists()


def test_whole_shards_are_found_on_disk_and_in_the_store(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(4)
    with begin_run(store, "base", description) as point:
        synthetic.write_all(point.folder.path, description, ["shard-00001"])
        ingest(store, point.folder.path)  # moves it into the store
        synthetic.write_all(point.folder.path, description, ["shard-00002"])
        (point.folder.path / f"{TEMPORARY_PREFIX}shard-00003-77-ab").mkdir()
        began = point.folder.read()[1]
    with begin_run(store, "base", description) as point:
        assert point.finished == {"shard-00001", "shard-00002"}
        assert point.missing == ("shard-00000", "shard-00003")
        assert (point.is_new, point.is_complete) == (False, False)
        assert not list(point.folder.path.glob(f"{TEMPORARY_PREFIX}*"))
    shutil.rmtree(point.folder.path)  # the shard that was only there is lost
    with begin_run(store, "base", description) as point:
        assert point.finished == {"shard-00001"}
        assert point.folder.read()[1] == began


def test_a_complete_run_is_said_to_be_complete(store: Path, synthetic: ModuleType) -> None:
    before = everything_below(store.parent)
    with begin_run(store, "base", synthetic.describe(3)) as point:
        assert point.is_complete and not point.missing
        assert point.finished == {"shard-00000", "shard-00001", "shard-00002"}
    assert everything_below(store.parent) == before


def test_the_folder_of_a_complete_run_that_was_left_is_removed(
    store: Path, synthetic: ModuleType
) -> None:
    left = run_folder(store, "base")
    left.path.mkdir(parents=True)
    left.finish()
    begin_run(store, "base", synthetic.describe(3))
    assert not left.path.exists()


@pytest.mark.parametrize("state", ["on disk", "in the store"])
def test_other_arguments_are_refused_with_every_difference(
    tmp_path: Path, synthetic: ModuleType, state: str
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(2)
    with begin_run(store, "base", description) as point:
        synthetic.write_all(point.folder.path, description, ["shard-00000"])
        if state == "in the store":
            ingest(store, point.folder.path)
    before = everything_below(tmp_path)
    other = {"model": "synthetic", "arguments": {"limit": None, "levels": [1]}, "seed": 1}
    with pytest.raises(RunError) as refusal:
        begin_run(store, "base", synthetic.describe(2, identity=other))
    message = str(refusal.value)
    assert "seed: 0 -> 1" in message
    assert "arguments.limit: 4 -> null" in message
    assert "arguments.levels: null -> [1]" in message
    assert "model:" not in message and "\n" not in message
    with pytest.raises(RunError, match=r"batch_plan\.num_shards: 2 -> 3"):
        same = description.identity
        begin_run(store, "base", synthetic.describe(3, identity=same))
    assert everything_below(tmp_path) == before


def test_a_run_that_was_imported_is_not_gone_on_with(store: Path, synthetic: ModuleType) -> None:
    with writing(store) as con:
        con.execute("UPDATE runs SET manifest = '{}', source = 'import:routes'").fetchall()
    with pytest.raises(RunError, match=r"'base' already \(import:routes\)"):
        begin_run(store, "base", synthetic.describe(3))


def test_names_of_files_that_are_no_text_can_be_in_the_arguments(
    tmp_path: Path, synthetic: ModuleType, filled: Callable[..., Path]
) -> None:
    odd = {"arguments": {"prompts": ["odd-\udc80.jsonl"], "layers": (1, 2)}}
    store = filled(tmp_path / "a.duckdb", num_shards=1, identity=odd, manifest=odd)
    manifest = Store(store).run("base").manifest
    assert manifest["identity"] == {"arguments": {"prompts": ["odd-?.jsonl"], "layers": [1, 2]}}
    assert begin_run(store, "base", synthetic.describe(1, identity=odd)).is_complete


def test_one_collector_at_a_time(tmp_path: Path, synthetic: ModuleType) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(1)
    with begin_run(store, "base", description):
        with pytest.raises(RunError, match="being recorded by another process"):
            begin_run(store, "base", description)
        begin_run(store, "other", description).close()
    begin_run(store, "base", description).close()


def test_a_finished_run_with_a_lost_shard_is_reopened(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    store, description = tmp_path / "a.duckdb", synthetic.describe(2)
    with begin_run(store, "base", description) as point:
        synthetic.write_all(point.folder.path, description, point.missing)
        point.folder.finish()
    shutil.rmtree(point.folder.path / "shard-00001")
    with begin_run(store, "base", description) as point:
        assert point.missing == ("shard-00001",)
        assert not point.folder.is_finished


def test_a_store_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    (tmp_path / "a.duckdb").write_text("text")
    with pytest.raises(StoreError, match="not a DuckDB file"):
        begin_run(tmp_path / "a.duckdb", "base", synthetic.describe(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.duckdb"]


def test_a_place_below_a_file_is_refused(tmp_path: Path, synthetic: ModuleType) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoescopeError, match="is a file, not a folder"):
        check_store_target(tmp_path / "file" / "a.duckdb")
    with pytest.raises(MoescopeError, match="Not a directory"):
        begin_run(tmp_path / "file" / "a.duckdb", "base", synthetic.describe(1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "1 to 200 characters, this has 0"),
        ("x" * 201, "1 to 200 characters, this has 201"),
        ("a\nb", r"U\+000A"),
        ("a\x00b", r"U\+0000"),
        ("a\ud800", r"U\+D800"),
        ("a\u202eb", r"U\+202E"),
    ],
)
def test_names_that_cannot_be_used(
    tmp_path: Path, synthetic: ModuleType, name: str, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        begin_run(tmp_path / "a.duckdb", name, synthetic.describe(1))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=200, deadline=None)
@given(run_names)
def test_any_name_gives_one_folder_right_beside_the_store(name: str) -> None:
    store = Path("/somewhere/runs.duckdb")
    folder = run_folder(store, name).path
    assert folder.parent == Path("/somewhere/runs.duckdb.shards")
    assert folder.name.encode().isalnum() or set(folder.name) <= set(
        "abcdefghijklmnopqrstuvwxyz0123456789-"
    )
    assert len(folder.name) <= 60
    assert run_folder(store, name) == run_folder(store, name)


@settings(max_examples=200, deadline=None)
@given(run_names, run_names)
def test_two_names_never_share_a_folder(one: str, other: str) -> None:
    store = Path("/somewhere/runs.duckdb")
    same = run_folder(store, one).path.name == run_folder(store, other).path.name
    assert same == (one == other)
    if one.swapcase() != one:  # also where the file system ignores case
        swapped = run_folder(store, one.swapcase()).path.name
        assert swapped.lower() != run_folder(store, one).path.name.lower()


@settings(max_examples=4, deadline=None)
@given(name=run_names)
def test_any_name_comes_back_from_the_store(
    name: str, synthetic: ModuleType, filled: Callable[..., Path]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = filled(Path(folder) / "runs.duckdb", run=name, num_shards=1)
        assert Store(store).run(name).run_id == name
        assert sorted(path.name for path in Path(folder).iterdir()) == [
            "runs.duckdb",
            "runs.duckdb.lock",
            "runs.duckdb.logs",
        ]


def test_descriptions_that_cannot_be_stored_are_programming_errors(synthetic: ModuleType) -> None:
    with pytest.raises(ValueError, match="planned in more than one place"):
        synthetic.describe(1, planned_shards={"shard-00000": [1], "shard-00001": [1]})
    with pytest.raises(ValueError, match="a layer has the keys"):
        synthetic.describe(1, layers=[{"layer": 0}])
    with pytest.raises(ValueError, match="a shard id has the form"):
        synthetic.describe(1, planned_shards={"../x": [1]})
