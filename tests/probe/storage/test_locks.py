"""Readers and writers take turns, in one process and between processes."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from moescope.probe.errors import StoreBusyError, StoreError
from moescope.probe.storage import Store, append, locks, reading, writing
from moescope.probe.storage.files import TEMPORARY_PREFIX

HOLD = """
import sys
from contextlib import contextmanager
import duckdb
from moescope.probe.storage import reading, writing

@contextmanager
def foreign(path):
    with duckdb.connect(path, read_only=True) as con:
        yield con

way, path = sys.argv[1:]
with {"reading": reading, "writing": writing, "foreign": foreign}[way](path) as con:
    if way == "writing":
        con.execute("BEGIN; DELETE FROM runs").fetchall()
    print("in", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(way: str, store: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the store open when the block begins, until `let_go` or its end."""
    command = [sys.executable, "-c", HOLD, way, str(store)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        try:
            yield process
        finally:
            process.kill()


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def plan_rows(*ids: str) -> pa.Table:
    now = pa.array([0] * len(ids), pa.timestamp("us", tz="UTC"))
    return pa.table(
        {"plan_id": list(ids), "created_at": now, "plan": ['{"version": 1}'] * len(ids)}
    )


def plan_ids(store: Path) -> list[str]:
    return sorted(Store(store).query("SELECT plan_id FROM plans")["plan_id"])


def test_a_reader_waits_for_a_writer_in_another_process(store: Path) -> None:
    seen: list[int] = []
    reader = threading.Thread(target=lambda: seen.append(len(Store(store).runs())))
    with holder("writing", store) as process:
        reader.start()
        reader.join(timeout=0.7)
        assert reader.is_alive()
        let_go(process)
        reader.join()
    assert seen == [1]  # and nothing of what was not committed


def test_a_writer_waits_for_a_reader_and_says_for_whom(store: Path) -> None:
    said: list[str] = []
    with holder("foreign", store) as process:

        def hear(sentence: str) -> None:
            said.append(sentence)
            let_go(process)

        append(store, "plans", plan_rows("a"), announce=hear)
    assert plan_ids(store) == ["a"]
    assert len(said) == 1
    assert str(store) in said[0] and f"process {process.pid}" in said[0]


def test_a_writer_says_which_writer_it_waits_for(store: Path) -> None:
    said: list[str] = []
    with holder("writing", store) as process:

        def hear(sentence: str) -> None:
            said.append(sentence)
            let_go(process)

        append(store, "plans", plan_rows("a"), announce=hear)
    assert said == [f"waiting for {store}: process {process.pid} writes it"]


@pytest.mark.parametrize("way", ["writing", "foreign"])
def test_waiting_has_an_end(store: Path, way: str) -> None:
    with holder(way, store):
        with pytest.raises(StoreBusyError, match=r"stayed busy .*process \d+"):
            append(store, "plans", plan_rows("a"), wait_s=0.3)
        if way == "writing":
            with pytest.raises(StoreBusyError, match=r"stayed busy .*process \d+"):
                Store(store, wait_s=0.3)
    assert plan_ids(store) == []


def test_a_killed_writer_leaves_neither_rows_nor_locks(store: Path) -> None:
    with holder("writing", store) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        assert len(Store(store).runs()) == 1
        append(store, "plans", plan_rows("a"))
        assert time.monotonic() - began < 15.0  # it did not wait for the dead


def test_threads_of_one_process_take_turns(store: Path) -> None:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def read() -> None:
        for _ in range(15):
            with reading(store) as con:
                count = con.execute("SELECT count(*) FROM evaluations").fetchone()
                assert count is not None and count[0] % 2 == 0

    def write() -> None:
        row = pa.table(
            {
                "evaluation_id": ["e", "e"],
                "created_at": pa.array([0, 0], pa.timestamp("us", tz="UTC")),
                "condition": ["steered", "unsteered"],
                "set_name": ["s", "s"],
                "metric": ["refused", "refused"],
            }
        )
        for _ in range(4):
            append(store, "evaluations", row)

    threads = [guarded(read) for _ in range(3)] + [guarded(write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert Store(store).query("SELECT count(*) AS n FROM evaluations")["n"].tolist() == [16]


READ_ON_AND_ON = """
import sys, threading, time
from pathlib import Path
from moescope.probe.storage import reading
store, end = sys.argv[1], Path(sys.argv[2])
def read():
    while not end.exists():
        with reading(store) as con:
            con.execute("SELECT count(*) FROM routing").fetchall()
            time.sleep(0.3)   # so that one reader or other is always in
threads = [threading.Thread(target=read) for _ in range(3)]
for thread in threads: thread.start()
print("in", flush=True)
for thread in threads: thread.join()
"""


def test_a_writer_gets_in_among_readers_that_never_stop(store: Path) -> None:
    end = store.with_name("end")
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ_ON_AND_ON, str(store), str(end)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for reader in readers:
        assert reader.stdout is not None and reader.stdout.readline() == "in\n"
    try:
        append(store, "plans", plan_rows("a"), wait_s=20)
        assert [reader.poll() for reader in readers] == [None, None]  # they read on meanwhile
    finally:
        end.touch()
    for reader in readers:
        _, complaints = reader.communicate()
        assert (reader.returncode, complaints) == (0, "")


def test_a_writer_that_cannot_get_in_lets_readers_pass(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_ASK_S", 0.3)
    monkeypatch.setattr(locks, "_STEP_BACK_S", 0.3)
    durations = []
    with holder("foreign", store):
        writer = threading.Thread(target=_append_in_vain, args=(store,))
        writer.start()
        while writer.is_alive():
            began = time.monotonic()
            Store(store).runs()
            durations.append(time.monotonic() - began)
            time.sleep(0.02)
    # Each time is of two openings; had the writer never stepped back, each would have taken 4 s.
    assert sorted(durations)[len(durations) // 2] < locks._LET_WRITER_IN_S


def _append_in_vain(store: Path) -> None:
    with pytest.raises(StoreBusyError):
        append(store, "plans", plan_rows("a"), wait_s=3)


def test_another_spelling_of_the_path_is_the_same_store(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = store.parent / "link.duckdb"
    link.symlink_to(store)
    monkeypatch.chdir(store.parent)
    with reading(store):
        for spelling in (link, Path("runs.duckdb"), store.parent / "." / "link.duckdb"):
            with reading(spelling) as con:
                assert con.execute("SELECT count(*) FROM runs").fetchall() == [(1,)]
            with (
                pytest.raises(StoreBusyError, match="this process has it open"),
                writing(spelling, wait_s=0.05),
            ):
                pass


WRITE_IN_TURNS = """
import sys, time
from pathlib import Path
import duckdb
from moescope.probe.storage import locks
store, mark, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + seconds
turn = 0
while time.monotonic() < end:
    con = locks._open(store, read_only=False, deadline=end + 30, while_busy=lambda holder: None)
    turn += 1
    mark.write_text(str(turn))
    time.sleep(0.004)
    mark.unlink()
    locks._close(con)
    time.sleep(0.002)
print(turn)
"""


def walked_over(store: Path, seconds: float) -> tuple[int, int, int]:
    """Let threads here open and close without pause while a process writes.

    Readers do not step through the lock file here, so that only DuckDB's own lock, and what
    protects it within this process, stands between them and the writer.

    Returns:
        Turns of the writer, reads, and reads that had the store open inside a writer's turn.
    """
    mark = store.with_name("mark")
    command = [sys.executable, "-c", WRITE_IN_TURNS, str(store), str(mark), str(seconds)]
    counts = {"reads": 0, "inside": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:

        def read() -> None:
            while writer.poll() is None:
                deadline = time.monotonic() + 60
                con = locks._open(store, read_only=True, deadline=deadline, while_busy=_ignore)
                before = _text(mark)
                con.execute("SELECT count(*) FROM runs").fetchall()
                after = _text(mark)
                locks._close(con)
                counts["reads"] += 1
                counts["inside"] += bool(before) and before == after
                time.sleep(random.random() * 0.01)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.stdout is not None
        turns = int(writer.stdout.read())
    return turns, counts["reads"], counts["inside"]


def _ignore(holder: str) -> None:
    """Readers do not say what they wait for."""


def _text(mark: Path) -> str:
    try:
        return mark.read_text()
    except FileNotFoundError:
        return ""


def test_threads_that_open_and_close_never_lose_the_lock(store: Path) -> None:
    turns, reads, inside = walked_over(store, 3.0)
    assert inside == 0
    assert turns > 3 and reads > 10


@pytest.mark.soak
def test_threads_that_open_and_close_never_lose_the_lock_for_long(
    store: Path, soak_share: float
) -> None:
    turns, reads, inside = walked_over(store, max(5.0, 120 * soak_share))
    assert inside == 0
    assert turns > 10 and reads > 50


def test_appending_makes_a_missing_store(tmp_path: Path) -> None:
    store = tmp_path / "deep" / "er" / "new.duckdb"
    append(store, "plans", plan_rows("b", "a"))
    assert plan_ids(store) == ["a", "b"]
    assert sorted(path.name for path in store.parent.iterdir()) == [
        "new.duckdb",
        "new.duckdb.lock",
    ]


def test_appending_a_known_plan_changes_nothing(store: Path) -> None:
    append(store, "plans", plan_rows("a"))
    append(store, "plans", plan_rows("a", "b"))
    assert plan_ids(store) == ["a", "b"]


def test_appending_is_all_or_nothing(store: Path) -> None:
    good = {
        "measurement_id": ["m", "m"],
        "what": ["similarity", "similarity"],
        "model": ["demo", "demo"],
        "created_at": pa.array([0, 0], pa.timestamp("us", tz="UTC")),
        "metric": ["cosine", None],
    }
    with pytest.raises(Exception, match="NOT NULL"):
        append(store, "measurements", pa.table(good))
    assert Store(store).query("SELECT * FROM measurements").empty
    good["metric"] = ["cosine", "cosine"]
    append(store, "measurements", pa.table(good))
    back = Store(store).query("SELECT value, metric FROM measurements")
    assert back["value"].isna().all() and back["metric"].tolist() == ["cosine", "cosine"]


def test_only_small_tables_are_appended_to(store: Path) -> None:
    with pytest.raises(ValueError, match="plans, evaluations, measurements, not to 'routing'"):
        append(store, "routing", pa.table({}))


def test_what_is_no_store_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(StoreError, match="not a DuckDB file"):
        append(path, "plans", plan_rows("a"))
    assert path.read_text() == "my notes"
    assert list(tmp_path.iterdir()) == [path]


APPEND = """
import sys
import pyarrow as pa
from moescope.probe.storage import append
row = {"plan_id": sys.argv[2], "created_at": 0, "plan": "{}"}
kinds = {"plan_id": pa.string(), "created_at": pa.timestamp("us", tz="UTC"), "plan": pa.string()}
append(sys.argv[1], "plans", pa.Table.from_pylist([row], schema=pa.schema(kinds)))
"""


def test_processes_that_make_the_same_store_at_once_make_one(tmp_path: Path) -> None:
    store = tmp_path / "new.duckdb"
    left = tmp_path / f"{TEMPORARY_PREFIX}new.duckdb-1-a"  # of a creator that was killed
    left.write_text("half")
    names = ["a", "b", "c"]
    children = [subprocess.Popen([sys.executable, "-c", APPEND, str(store), n]) for n in names]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert plan_ids(store) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.duckdb", "new.duckdb.lock"]
