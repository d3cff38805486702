"""A disk that fills up while a run is recorded: said in one sentence, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moescope.probe.storage import Store, begin_run, finished_shards, verify_run

LIMITED = """
import resource, sys
from moescope.probe.storage.ingest import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def assert_complete(store: Path, num_prompts: int) -> None:
    reader = Store(store)
    assert reader.run("base").status == "complete"
    assert reader.runs()["num_prompts"].tolist() == [num_prompts]
    assert verify_run(reader, "base") == []  # nothing missing, nothing twice


@pytest.mark.parametrize("limit", [20_000, 400_000])  # while making the store, and after that
def test_a_disk_that_fills_up_while_ingesting_is_said_and_loses_nothing(
    tmp_path: Path, synthetic: ModuleType, limit: int
) -> None:
    store = tmp_path / "a.duckdb"
    description = synthetic.describe(2, 150)
    with begin_run(store, "base", description) as point:
        synthetic.write_all(point.folder.path, description, point.missing)
        point.folder.finish()
        folder = point.folder.path
    command = [sys.executable, "-c", LIMITED, str(limit), str(store), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "disk is full" in result.stderr and str(store) in result.stderr
    assert result.stderr.count("\n") == 1
    assert finished_shards(folder)
    assert not list(tmp_path.glob(".*"))
    assert subprocess.run(synthetic.by_hand(store, folder)).returncode == 0
    assert_complete(store, 300)


ON_A_SMALL_DISK = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 77
"$4" "$5" "$2/a.duckdb" base --shards 4 --prompts-per-shard 60 2> "$3/complaint" && exit 78
mount -o remount,size=64m "$2" || exit 77
"$4" "$5" "$2/a.duckdb" base --shards 4 --prompts-per-shard 60 || exit 79
mv "$2"/a.duckdb* "$3/"
"""


@pytest.mark.parametrize("size", ["200k", "700k"])  # no room for a store; for some shards
def test_a_really_full_disk_loses_nothing(tmp_path: Path, collector: list[str], size: str) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("a small disk needs `unshare`")
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    command = ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", size, str(disk), str(out)]
    result = subprocess.run([*command, *collector], capture_output=True, text=True)
    if result.returncode in (1, 77):
        pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    complaint = (out / "complaint").read_text().splitlines()[-1]
    assert "the disk is full while" in complaint and "make room" in complaint
    assert_complete(out / "a.duckdb", 240)
