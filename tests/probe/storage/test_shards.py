"""Shards are whole or absent, and damage is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from moescope.probe.errors import RecordingError
from moescope.probe.storage import (
    SHARD_TABLES,
    finished_shards,
    read_shard,
    shard_name,
    write_shard,
)
from moescope.probe.storage.files import REMOVED_PREFIX, TEMPORARY_PREFIX
from moescope.probe.storage.shards import remove_shard

IDS = [7, 3]


@pytest.fixture
def shard(tmp_path: Path, synthetic: ModuleType) -> Path:
    write_shard(tmp_path, "shard-00004", synthetic.tables(IDS), prompt_ids=IDS)
    return tmp_path / "shard-00004"


def test_a_shard_reads_back_exactly(tmp_path: Path, shard: Path, synthetic: ModuleType) -> None:
    manifest, tables = read_shard(tmp_path, shard.name)
    assert manifest.prompt_ids == (3, 7)
    assert set(tables) == set(SHARD_TABLES)
    for name, table in synthetic.tables(IDS).items():
        assert tables[name].to_pylist() == table.to_pylist()
        assert manifest.files[name].rows == table.num_rows
        assert manifest.files[name].size_bytes == (shard / f"{name}.parquet").stat().st_size
    assert finished_shards(tmp_path) == ["shard-00004"]


def test_tables_left_out_are_empty(tmp_path: Path, synthetic: ModuleType) -> None:
    tables = synthetic.tables(IDS)
    del tables["routing_arrays"]
    write_shard(tmp_path, "shard-00000", tables, prompt_ids=IDS)
    _, back = read_shard(tmp_path, "shard-00000")
    assert back["routing_arrays"].num_rows == 0 and back["usage_arrays"].num_rows > 0


def test_a_shard_that_is_there_already_is_kept(
    tmp_path: Path, shard: Path, synthetic: ModuleType
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in shard.iterdir()}
    again = write_shard(tmp_path, shard.name, synthetic.tables(IDS), prompt_ids=IDS)
    assert again == read_shard(tmp_path, shard.name)[0]
    assert {path.name: path.stat().st_mtime_ns for path in shard.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [shard.name]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_the_end, Path.unlink])
@pytest.mark.parametrize("file", [*(f"{name}.parquet" for name in SHARD_TABLES), "manifest.json"])
def test_damage_is_refused_with_shard_and_remedy(
    tmp_path: Path, shard: Path, file: str, damage: object
) -> None:
    damage(shard / file)  # type: ignore[operator]
    with pytest.raises(RecordingError, match=r"shard-00004 is damaged: .*delete .*shard-00004"):
        read_shard(tmp_path, shard.name)


def test_files_of_another_shard_are_damage(tmp_path: Path, shard: Path) -> None:
    shard.rename(tmp_path / "shard-00005")
    with pytest.raises(RecordingError, match="shard-00005 is damaged"):
        read_shard(tmp_path, "shard-00005")


def test_a_manifest_that_hides_rows_is_damage(tmp_path: Path, shard: Path) -> None:
    manifest = json.loads((shard / "manifest.json").read_text())
    manifest["files"]["tokens"]["rows"] -= 1
    (shard / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecordingError, match="other rows than were written"):
        read_shard(tmp_path, shard.name)


def test_rows_of_other_prompts_are_refused(tmp_path: Path, synthetic: ModuleType) -> None:
    with pytest.raises(RecordingError, match=r"planned are the prompts 3, 7, 9, recorded were 3"):
        write_shard(tmp_path, "shard-00000", synthetic.tables(IDS), prompt_ids=[*IDS, 9])
    tables = synthetic.tables(IDS)
    tables["tokens"] = pa.concat_tables([tables["tokens"], synthetic.tables([8])["tokens"]])
    with pytest.raises(RecordingError, match=r"tokens has rows of prompts .* not planned: 8"):
        write_shard(tmp_path, "shard-00000", tables, prompt_ids=IDS)
    with pytest.raises(RecordingError, match="a shard has no table tokenz"):
        write_shard(
            tmp_path, "shard-00000", {**synthetic.tables(IDS), "tokenz": pa.table({})},
            prompt_ids=IDS,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("meta", ["nope", '{"a": "\\ud800"}', "{'a': 1}"])
def test_meta_that_the_store_would_refuse_is_refused_at_once(
    tmp_path: Path, synthetic: ModuleType, meta: str
) -> None:
    tables = synthetic.tables(IDS)
    rows = tables["prompts"].to_pylist()
    rows[1]["meta"] = meta
    tables["prompts"] = pa.Table.from_pylist(rows, schema=SHARD_TABLES["prompts"])
    with pytest.raises(RecordingError, match="the meta of prompt 3 is no JSON"):
        write_shard(tmp_path, "shard-00000", tables, prompt_ids=IDS)


@pytest.mark.parametrize("name", ["../x", "shard-1", "shard-00001/..", "Shard-00001", ""])
def test_names_that_are_no_shard_ids_never_become_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a shard id has the form"):
        write_shard(tmp_path, name, {}, prompt_ids=[])


def test_unfinished_and_removed_shards_are_not_listed(tmp_path: Path, shard: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}shard-00009-1-a").mkdir()
    (tmp_path / f"{REMOVED_PREFIX}shard-00009-1-a").mkdir()
    assert finished_shards(tmp_path) == [shard.name]
    remove_shard(tmp_path, shard.name)
    assert finished_shards(tmp_path) == [] and not shard.exists()
    assert finished_shards(tmp_path / "nowhere") == []


def test_numbers_become_names() -> None:
    assert [shard_name(n) for n in (0, 12, 123456)] == [
        "shard-00000",
        "shard-00012",
        "shard-123456",
    ]
    with pytest.raises(ValueError, match="numbered from 0"):
        shard_name(-1)


WRITE_UNDER_A_LIMIT = """
import resource, runpy, sys
from pathlib import Path
from moescope.probe.errors import MoescopeError
from moescope.probe.storage import write_shard
synthetic = runpy.run_path(sys.argv[1])
tables = synthetic["tables"](range(20))
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    write_shard(Path(sys.argv[2]), "shard-00000", tables, prompt_ids=range(20))
except MoescopeError as error:
    sys.exit(f"{error}")
"""


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, synthetic: ModuleType) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WRITE_UNDER_A_LIMIT, str(synthetic.__file__), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "shard-00000" in result.stderr and "make room" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
