"""Mutated files against importers: `python fuzz.py GOLDEN_NUMBERS REPETITIONS SEED`.

Each file ends in an import whose invariants hold or in an error that the command line turns into a
sentence and exit code 2. Prints what happened, a line of JSON each; any other end, too long a time,
or anything that smells of running code ends the process with a traceback.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb

sys.path.insert(0, str(Path(__file__).parent))

import golden

from moescope.probe.errors import InputError
from moescope.probe.interchange.assemble import AssembledRun, assemble
from moescope.probe.interchange.files import digest
from moescope.probe.interchange.imported import ImportOptions
from moescope.probe.interchange.registry import importer
from moescope.probe.storage.rows import insert_rows
from moescope.probe.storage.schema import SHARD_TABLES, conform, create_schema
from moescope.probe.storage.slots import as_stored, check_slots
from moescope.probe.storage.verify import find_problems

SECONDS = 5
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
    "os.remove", "os.rename", "ctypes.dlopen", "shutil.rmtree",
)  # fmt: skip
watching = False


def audit(event: str, _arguments: Any) -> None:
    if watching and event in FORBIDDEN:
        raise SystemExit(f"an import caused {event}")


def mutate(content: bytes, draw: random.Random) -> bytes:
    """A few random changes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(data) + 1) if data else 0
        what = draw.randrange(7)
        if what == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif what == 1:
            del data[place:]
        elif what == 2:
            data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
        elif what == 3:
            end = place + draw.randrange(1, 64)
            data[place:place] = data[place:end]
        elif what == 4:
            del data[place : place + draw.randrange(1, 32)]
        elif what == 5:
            number = draw.choice((b"-1", b"99999999999", b"1e308", b"NaN", b"null", b"0", b"[]"))
            data[place : place + draw.randrange(4)] = number
        elif data:
            digits = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[draw.choice(digits)] = 48 + draw.randrange(10)
    return bytes(data)


def check(run: AssembledRun) -> None:
    """Put the rows into a store in memory; every invariant of a run holds."""
    con = duckdb.connect()
    create_schema(con)
    described = run.description
    con.execute(
        "INSERT INTO runs (run_id, model, created_at, status, source, record_level, num_prompts, "
        "manifest) VALUES ('r', ?, now(), 'complete', ?, ?, ?, ?)",
        [described.model, described.source, described.record_level, len(described.prompt_ids),
         json.dumps(dict(described.manifest), default=str)],
    ).fetchall()  # fmt: skip
    for layer in described.layers:
        con.execute(
            f"INSERT INTO layers (run_id, {', '.join(layer)}) "
            f"VALUES ('r', {', '.join('?' for _ in layer)})",
            list(layer.values()),
        ).fetchall()
    for shard_id, tables, _ in run.shards:
        for name, rows in tables.items():
            fitting = conform(rows, name, shard_id)
            if name == "routing_arrays":
                check_slots(fitting, shard_id)
                fitting = as_stored(fitting)
            insert_rows(con, name, fitting, run_id="r")
    assert set(SHARD_TABLES) >= {"prompts"}
    problems = find_problems(con, "r")
    con.close()
    assert not problems, problems[:3]


def one(case: Any, paths: list[Path]) -> str:
    options = ImportOptions(**case.options)
    try:
        imported = importer(case.format).read(paths, options)
        check(assemble(imported, options, digest(paths)))
    except InputError as error:
        assert "\n" not in str(error) and str(error), repr(str(error))
        return "refused"
    return "imported"


def too_long(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"an import took longer than {SECONDS} s")


def main() -> None:
    sys.addaudithook(audit)
    signal.signal(signal.SIGALRM, too_long)
    for number in sys.argv[1].split(","):
        ends = mutated(golden.GOLDEN[int(number)], int(sys.argv[2]), f"{sys.argv[3]}-{number}")
        sys.stdout.write(json.dumps(ends) + "\n")
        sys.stdout.flush()


def mutated(case: Any, rounds: int, seed: str) -> dict[str, Any]:
    """Mutate the files of a golden so many times."""
    global watching
    draw = random.Random(seed)
    ends = {"refused": 0, "imported": 0}
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        whole.mkdir()
        paths = case.write(whole)
        assert one(case, paths) == "imported"
        files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
        size = sum((whole / file).stat().st_size for file in files)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(rounds):
            shutil.copytree(whole, broken)
            file = broken / draw.choice(files)
            file.write_bytes(mutate(file.read_bytes(), draw))
            began = time.monotonic()
            watching = True
            signal.alarm(SECONDS)
            try:
                ends[one(case, [broken / path.relative_to(whole) for path in paths])] += 1
            except BaseException:
                sys.stderr.write(f"{case.name}, round {number}: {file.read_bytes()[:4000]!r}\n")
                raise
            finally:
                signal.alarm(0)
                watching = False
            longest = max(longest, time.monotonic() - began)
            assert longest < SECONDS, longest
            shutil.rmtree(broken)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= (1 << 30) + 10 * size, f"{grown:,} bytes more"
    return {**ends, "format": case.name, "longest_s": round(longest, 2), "grown": grown}


if __name__ == "__main__":
    main()
