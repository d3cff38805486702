"""Archives of a run: they come back whole, and whatever is wrong with one is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.probe.errors import ImportFileError, MoescopeError, RunError
from moescope.probe.interchange.archive import read_archive
from moescope.probe.interchange.archive_format import MANIFEST, README
from moescope.probe.storage import writing
from moescope.probe.storage.copying import RUN_TABLES
from moescope.probe.storage.run_folder import shards_beside
from moescope.probe.storage.store import Store
from moescope.probe.storage.verify import verify_run


def load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"interchange_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


runs = load("exported")
write, tables, contents = runs.write, runs.tables, runs.contents


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run `run` that is known by hand."""
    return runs.hand_run_in(tmp_path_factory.mktemp("hand") / "store.duckdb")


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run `run` of random routing."""
    return runs.random_run_in(tmp_path_factory.mktemp("random") / "store.duckdb")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run `base`, recorded, with weights that are all exact in bfloat16."""
    return runs.record(tmp_path_factory.mktemp("recorded") / "store.duckdb")


@pytest.mark.parametrize("which", ["store", "random_run"])
def test_an_archive_comes_back_whole(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    old = request.getfixturevalue(which)
    archive = write(old, "archive", tmp_path / "run.zip")
    report = read_archive(archive, tmp_path / "in" / "new.duckdb", "copy")
    new = Store(tmp_path / "in" / "new.duckdb")
    assert tables(new, "copy") == tables(old, "run")
    assert verify_run(new, "copy") == []
    assert report.found["tokens"] == old.arrow("SELECT count(*) AS n FROM tokens")["n"][0].as_py()
    leftovers = {path.name for path in tmp_path.rglob(".*")}
    assert not leftovers


def test_a_recorded_run_comes_back_beside_others(recorded: Store, tmp_path: Path) -> None:
    archive = write(recorded, "archive", tmp_path / "run.zip", "base")
    target = Path(shutil.copy(recorded.path, tmp_path / "runs.duckdb"))
    report = read_archive(archive, target, "again")
    both = Store(target)
    assert tables(both, "again") == tables(both, "base") == tables(recorded, "base")
    assert both.arrow("SELECT count(bf16_weights) AS n FROM routing_arrays")["n"][0].as_py() > 0
    assert report.found["slots"] == 6 * 6 * 2 * 2 and report.lacks == []
    with pytest.raises(RunError, match="has a run 'base' already"):
        read_archive(archive, target)


def test_a_run_whose_routing_stays_in_shards_goes_into_the_archive(tmp_path: Path) -> None:
    old = runs.record(tmp_path / "old.duckdb", routing_in="shards")
    read_archive(write(old, "archive", tmp_path / "a.zip", "base"), tmp_path / "new.duckdb")
    new = Store(tmp_path / "new.duckdb")
    found, expected = tables(new, "base"), tables(old, "base")
    assert found["routing"] == expected["routing"]
    assert found["routing_arrays"]["weights"].null_count == found["routing_arrays"].num_rows
    shards_beside(old.path).rename(tmp_path / "elsewhere")
    with pytest.raises(MoescopeError, match="put the folder back"):
        write(old, "archive", tmp_path / "b.zip", "base")
    assert not (tmp_path / "b.zip").exists()


def test_without_text_an_archive_keeps_everything_else(recorded: Store, tmp_path: Path) -> None:
    archive = write(recorded, "archive", tmp_path / "a.zip", "base", without_text=True)
    with zipfile.ZipFile(archive) as opened:
        manifest = json.loads(opened.read(MANIFEST))
        assert "Text was left out" in opened.read(README).decode()
    assert "prompts.text" in manifest["left_out"] and "tokens.token" in manifest["left_out"]
    report = read_archive(archive, tmp_path / "new.duckdb")
    assert report.lacks == ["text"]
    new = Store(tmp_path / "new.duckdb")
    prompts = new.arrow("SELECT text, rendered_text, response, meta, label FROM prompts")
    assert set(prompts["text"].to_pylist() + prompts["response"].to_pylist()) == {""}
    assert prompts["meta"].null_count == 6 and prompts["label"].null_count == 0
    for name in ("routing", "usage", "layers"):
        assert tables(new, "base")[name] == tables(recorded, "base")[name]


def test_the_system_message_is_text_too(store: Store, tmp_path: Path) -> None:
    path = Path(shutil.copy(store.path, tmp_path / "store.duckdb"))
    arguments = {"arguments": {"system": "be secretive", "seed": 1}}
    with writing(path) as con:
        text = json.dumps(arguments | {"identity": arguments})
        con.execute("UPDATE runs SET manifest = ?", [text]).fetchall()
    archive = write(Store(path), "archive", tmp_path / "a.zip", without_text=True)
    read_archive(archive, tmp_path / "new.duckdb")
    manifest = Store(tmp_path / "new.duckdb").run("run").manifest
    assert manifest["arguments"] == manifest["identity"]["arguments"] == {"system": "", "seed": 1}


def test_an_archive_describes_itself(store: Store, tmp_path: Path) -> None:
    archive = write(store, "archive", tmp_path / "a.zip")
    columns = json.loads((runs.GOLDEN / "archive_columns.json").read_text())
    assert list(columns) == list(RUN_TABLES)
    with zipfile.ZipFile(archive) as opened:
        manifest = json.loads(opened.read(MANIFEST))
        assert (manifest["format"], manifest["version"]) == ("moescope-archive", 1)
        assert manifest["schema_version"] == 3 and manifest["run"]["model"] == "planted"
        assert set(opened.namelist()) == {MANIFEST, *manifest["members"]}
        readme = opened.read(README).decode()
        for name, stated in manifest["members"].items():
            content = opened.read(name)
            assert hashlib.sha256(content).hexdigest() == stated["sha256"]
            assert len(content) == stated["bytes"]
        for table, names in columns.items():
            rows = pq.read_table(io.BytesIO(opened.read(f"{table}.parquet")))
            assert rows.column_names == names.split(), table
            assert rows.num_rows == manifest["members"][f"{table}.parquet"]["rows"]
            assert f"{table}.parquet" in readme
    again = write(store, "archive", tmp_path / "b.zip")
    assert again.read_bytes() == archive.read_bytes()


Change = Callable[[dict[str, bytes], dict[str, Any]], None]


def rewritten(archive: Path, out: Path, change: Change, *, sealed: bool = True) -> Path:
    """The archive with its files and manifest changed; `sealed`: with hashes that fit again."""
    with zipfile.ZipFile(archive) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    manifest = json.loads(files.pop(MANIFEST))
    change(files, manifest)
    if sealed and isinstance(manifest.get("members"), dict):
        for name, content in files.items():
            stated = manifest["members"].setdefault(name, {"rows": 0})
            stated |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            if name.endswith(".parquet") and content[:4] == b"PAR1" and len(content) > 8:
                stated["rows"] = pq.read_metadata(io.BytesIO(content)).num_rows
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
        if manifest:
            opened.writestr(MANIFEST, json.dumps(manifest))
    return out


def table_changed(name: str, change: Callable[[pa.Table], pa.Table]) -> Change:
    def apply(files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        sink = io.BytesIO()
        pq.write_table(change(pq.read_table(io.BytesIO(files[f"{name}.parquet"]))), sink)
        files[f"{name}.parquet"] = sink.getvalue()

    return apply


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[..., pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        return table.set_column(place, field, pa.array(change(table[name].to_pylist()), field.type))

    return apply


def run_changed(**values: Any) -> Change:
    """Values of the run's row, in the manifest and in its table; `manifest` as data."""

    def apply(files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        manifest["run"] |= values
        for key, value in values.items():
            stored = json.dumps(value) if key == "manifest" else value
            change = with_column(key, lambda old, stored=stored: [stored])
            table_changed("runs", change)(files, manifest)

    return apply


def unreadable_text(table: pa.Table) -> pa.Table:
    """Bytes that are no UTF-8 under the name of text."""
    raw = pa.array([b"\xff\xfe"] * table.num_rows, pa.binary()).view(pa.string())
    return table.set_column(table.schema.get_field_index("text"), "text", raw)


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda old: [value, *old[1:]]


BAD_CONTENT: dict[str, tuple[Change, str]] = {
    "file unknown": (lambda files, m: files.update({"extra.txt": b"x"}), "'extra.txt' does not"),
    "path up": (lambda files, m: files.update({"../../evil": b"x"}), "'../../evil' does not"),
    "path absolute": (lambda files, m: files.update({"/etc/evil": b"x"}), "'/etc/evil' does not"),
    "file missing": (lambda files, m: files.pop("tokens.parquet") and None, "tokens.parquet is mi"),
    "no manifest": (lambda files, m: m.clear(), "manifest.json is missing"),
    "other format": (lambda files, m: m.update(format="x"), "does not say 'moescope-archive'"),
    "later version": (lambda files, m: m.update(version=2), "has version 2, this moescope reads 1"),
    "other schema": (lambda files, m: m.update(schema_version=9), "schema_version 9, this"),
    "members unnamed": (lambda files, m: m.update(members=[]), "does not name the files"),
    "no run": (lambda files, m: m.update(run=3), "does not hold the run's row"),
    "run differs": (lambda files, m: m["run"].update(model="other"), "differ in 'model'"),
    "run running": (run_changed(status="running"), "is running, not complete"),
    "run level": (run_changed(record_level="all"), "has record level 'all'"),
    "plan endless": (
        run_changed(manifest={"batch_plan": {"prompt_ranges": [[0, 10**12]]}}), "plans other promp"
    ),
    "plan odd": (run_changed(manifest={"batch_plan": {"prompt_ranges": [7]}}), "no sound plan"),
    "lacks odd": (run_changed(manifest={"lacks": "positions"}), "no list of words"),
    "lacks positions": (run_changed(manifest={"lacks": ["positions"]}), "record level 'topk'"),
    "no Parquet": (lambda f, m: f.update({"tokens.parquet": b"PAR1"}), "is no Parquet file"),
    "column gone": (
        table_changed("tokens", lambda t: t.drop_columns(["token"])), "column phase .string. where"
    ),
    "column more": (
        table_changed("tokens", lambda t: t.append_column("x", t["token"])), "where no column"
    ),
    "column type": (
        table_changed("layers", lambda t: t.set_column(1, "layer", t["layer"].cast("int64"))),
        "column layer .int64. where column layer .int16.",
    ),
    "rows of another run": (
        table_changed("tokens", with_column("run_id", first("other"))), "rows of another run"
    ),
    "text no text": (table_changed("prompts", unreadable_text), "prompts.parquet is damaged"),
    "JSON no JSON": (table_changed("prompts", with_column("meta", first("{"))), "prompts holds"),
    "value missing": (table_changed("tokens", with_column("phase", first(None))), "tokens holds"),
    "value missing in a list": (
        table_changed("usage_arrays", with_column("num_tokens", first([1, None, 1, 0]))),
        "a value is missing within num_tokens",
    ),
    "weights twice": (
        table_changed("routing_arrays", with_column("weights", first([0.5, 0.5]))), "in both forms"
    ),
    "expert out of range": (
        table_changed("routing_arrays", with_column("experts", first([0, 9]))), "expert 9"
    ),
    "expert repeated": (
        table_changed("routing_arrays", with_column("experts", first([0, 0]))), "repeated"
    ),
    "prompt lost": (table_changed("prompts", lambda t: t.slice(1)), "prompt"),
    "prompt twice": (
        table_changed("prompts", with_column("prompt_id", lambda old: [0, 0])), "prompt"
    ),
    "token lost": (table_changed("tokens", lambda t: t.slice(1)), "contradicts itself"),
    "usage wrong": (
        table_changed("usage_arrays", with_column("num_tokens", first([1, 1, 0, 0]))), "contradict"
    ),
    "negative layer": (
        table_changed("layers", with_column("layer", first(-1))), "impossible numbers"
    ),
    "no layers": (table_changed("layers", lambda t: t.slice(0, 0)), "has no layers"),
    "odd phase": (
        table_changed("tokens", with_column("phase", first("later"))), "neither of a prompt"
    ),
    "shard path": (
        table_changed(
            "ingested_shards",
            lambda t: pa.table({n: pa.array([v]) for n, v in zip(t.column_names, (
                "run", "../x", "c"), strict=True)}),
        ),
        "a shard id has the form",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def archive(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(store, "archive", tmp_path_factory.mktemp("archive") / "run.zip")


@pytest.fixture
def target(recorded: Store, tmp_path: Path) -> Path:
    """A store that has the run `base`."""
    folder = tmp_path / "target"
    folder.mkdir()
    return Path(shutil.copy(recorded.path, folder / "runs.duckdb"))


def refused(bad: Path, target: Path, words: str) -> None:
    """The archive is refused in one sentence, and nothing is left of it."""
    Store(target)
    before = contents(target.parent)
    with pytest.raises(ImportFileError, match=words) as caught:
        read_archive(bad, target)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(target.parent) == before
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_bad_content_is_refused(case: str, archive: Path, target: Path, tmp_path: Path) -> None:
    change, words = BAD_CONTENT[case]
    refused(rewritten(archive, tmp_path / "bad.zip", change), target, words)


def test_an_archive_that_was_only_packed_again_is_welcome(archive: Path, target: Path) -> None:
    again = rewritten(archive, target.parent / "again.zip", lambda files, manifest: None)
    read_archive(again, target)
    assert verify_run(Store(target), "run") == []


def test_a_wrong_hash_is_refused(archive: Path, target: Path, tmp_path: Path) -> None:
    def change(files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        content = bytearray(files["tokens.parquet"])
        content[10] ^= 1
        files["tokens.parquet"] = bytes(content)

    bad = rewritten(archive, tmp_path / "bad.zip", change, sealed=False)
    refused(bad, target, "tokens.parquet is not what was written")


def test_a_file_that_is_in_twice_is_refused(archive: Path, target: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copy(archive, tmp_path / "bad.zip"))
    with zipfile.ZipFile(bad, "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
        opened.writestr(README, b"x")
    refused(bad, target, "a file is in it twice")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.999])
def test_a_truncated_archive_is_refused(
    archive: Path, target: Path, tmp_path: Path, share: float
) -> None:
    content = archive.read_bytes()
    bad = tmp_path / "bad.zip"
    bad.write_bytes(content[: int(share * len(content))])
    refused(bad, target, "no whole .zip")


def test_flipped_bytes_never_get_in(archive: Path, target: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    rng = np.random.default_rng(0)
    before = contents(target.parent)
    for place in rng.integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        bad = tmp_path / "bad.zip"
        bad.write_bytes(damaged)
        try:
            read_archive(bad, tmp_path / "other.duckdb")
        except ImportFileError:
            assert not (tmp_path / "other.duckdb").exists()
        else:  # a byte that says nothing, such as a time of a file
            (tmp_path / "other.duckdb").unlink()
    assert contents(target.parent) == before


def test_a_zip_bomb_is_refused(archive: Path, target: Path, tmp_path: Path) -> None:
    def bomb(files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        files["tokens.parquet"] = bytes(50 << 20)

    refused(rewritten(archive, tmp_path / "bad.zip", bomb), target, "tokens.parquet would unpack")


def test_rows_out_of_nothing_are_refused(
    archive: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def many(table: pa.Table) -> pa.Table:
        return table.take(pa.array(np.zeros(400_000, np.int64)))

    monkeypatch.setattr("moescope.probe.interchange.archive._ROWS_FROM", 1_000)
    bad = rewritten(archive, tmp_path / "bad.zip", table_changed("tokens", many))
    refused(bad, target, "rows; that is no real recording")


def test_what_is_no_archive_is_refused(target: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.zip"
    text.write_text("hello")
    refused(text, target, "no whole .zip")
    with pytest.raises(ImportFileError, match="does not exist"):
        read_archive(tmp_path / "none.zip", target)
