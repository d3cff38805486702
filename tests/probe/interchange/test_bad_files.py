"""Files that are not what they should be: one sentence, exit code 2, the store as it was."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moescope.app.cli import main
from moescope.probe.errors import ImportFileError, InputError
from moescope.probe.interchange import registry
from moescope.probe.interchange.imported import ImportOptions
from moescope.probe.interchange.registry import importer, importers
from moescope.probe.interchange.report import ImportReport
from moescope.probe.storage import Store

Import = Callable[..., ImportReport]


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/moescope-was-here",)


def evil_pickle(folder: Path, _golden: ModuleType) -> tuple[str, Path, str]:
    path = folder / "activations.pkl"
    path.write_bytes(pickle.dumps({"a": Evil()}))
    return "steermoe", path, "asks for posix.system, which no table needs"


def evil_tensors(folder: Path, _golden: ModuleType) -> tuple[str, Path, str]:
    path = folder / "stat.pt"
    path.write_bytes(pickle.dumps({"logical_count": Evil()}))
    return "sglang", path, "no file of tensors"


def other_gguf(folder: Path, _golden: ModuleType) -> tuple[str, Path, str]:
    import gguf

    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "model")
    writer.add_tensor("blk.0.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "imatrix", path, "a GGUF file of type 'model', not an imatrix"


def legacy_imatrix(folder: Path, _golden: ModuleType) -> tuple[str, Path, str]:
    path = folder / "imatrix.dat"
    path.write_bytes(b"\x01\x00\x00\x00")
    return "imatrix", path, "legacy .dat files have no expert counts"


def wrong_shape(folder: Path, golden: ModuleType) -> tuple[str, Path, str]:
    path = folder / "reply.json"
    path.write_text(json.dumps({"choices": [{"routed_experts": golden.IDS[:, 0].tolist()}]}))
    return "vllm", path, "expected whole numbers as [tokens, layers, k]"


def cut_short(folder: Path, golden: ModuleType) -> tuple[str, Path, str]:
    path = golden.sglang_native(folder)[0]
    reply = json.loads(path.read_text().splitlines()[0])
    reply["meta_info"]["routed_experts"] = reply["meta_info"]["routed_experts"][:-8]
    path.write_text(json.dumps(reply))
    return "sglang-reply", path, "routed_experts is cut short: 75 bytes"


def out_of_range(folder: Path, golden: ModuleType) -> tuple[str, Path, str]:
    ids = golden.IDS.copy()
    ids[3, 1, 0] = 8
    path = folder / "reply.json"
    path.write_text(json.dumps({"choices": [{"routed_experts": ids.tolist()}]}))
    return "vllm", path, "layer 1, token 3: expert 8 is not one of 0 to 7"


def repeated(folder: Path, golden: ModuleType) -> tuple[str, Path, str]:
    rows = [{**row, "expert": 3} if row["rank"] == 1 else row for row in golden.rows()]
    rows[0]["expert"], rows[1]["expert"], rows[2]["rank"] = 5, 5, 0
    path = folder / "slots.jsonl"
    three = [{**row, "rank": 2, "expert": 7} for row in rows if row["rank"] == 0]
    path.write_text("\n".join(json.dumps(row) for row in rows + three))
    return "table", path, "an expert is repeated in [5, 5, 7]; a top-k row has different ids"


def all_equal(folder: Path, golden: ModuleType) -> tuple[str, Path, str]:
    ids = np.zeros_like(golden.IDS)
    path = folder / "reply.json"
    path.write_text(json.dumps({"choices": [{"routed_experts": ids.tolist()}]}))
    return "vllm", path, "no token was captured in any layer"


def disagreeing_ranks(folder: Path, golden: ModuleType) -> tuple[str, Path, str]:
    rows = list(golden.rows())
    rows[1]["rank"] = 0
    path = folder / "slots.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return "table", path, "layer 0, position 0: the ranks are not 0 to 1 once each"


def zip_bomb(folder: Path, _golden: ModuleType) -> tuple[str, Path, str]:
    path = folder / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer_0.npy", b"\x00" * (200 << 20))
    return "router-logits", path, "would unpack to 209,715,200 bytes"


def ranks_of_passes(folder: Path, golden: ModuleType) -> tuple[str, Path, str]:
    import torch

    first = golden.sglang_per_pass(folder)[0]
    data = torch.load(first)
    other = {"rank": 1, "global_physical_count": torch.ones((2, 9), dtype=torch.int32)}
    data["records"].append({**data["records"][0], **other})
    torch.save(data, first)
    return "sglang", first, "ranks disagree on the counts of pass 0"


def no_columns(folder: Path, _golden: ModuleType) -> tuple[str, Path, str]:
    path = folder / "some.csv"
    pd.DataFrame({"a": [1]}).to_csv(path, index=False)
    return "table", path, "has no column sequence, position, layer, expert; it has a"


CASES = [
    evil_pickle, evil_tensors, other_gguf, legacy_imatrix, wrong_shape, cut_short, out_of_range,
    repeated, all_equal, disagreeing_ranks, zip_bomb, ranks_of_passes, no_columns,
]  # fmt: skip


@pytest.mark.parametrize("make", CASES, ids=lambda case: case.__name__)
def test_bad_files_are_one_sentence_and_leave_the_store_alone(
    make: Callable[[Path, ModuleType], tuple[str, Path, str]],
    golden: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, path, words = make(tmp_path, golden)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", [
        "moescope", "import", name, str(path), "--store", str(tmp_path / "s.duckdb"), "--run", "r",
        "--num-experts", "8", "--top-k", "2",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert words in said and str(path) in said
    assert len(said.strip().splitlines()) == 1, said
    assert sorted(tmp_path.iterdir()) == before
    assert not Path("/tmp/moescope-was-here").exists()


def test_an_import_goes_into_a_store_with_other_runs_once(
    golden: ModuleType, import_files: Import, tmp_path: Path
) -> None:
    store = tmp_path / "s.duckdb"
    paths = golden.vllm_021(tmp_path)
    import_files(store, "vllm", paths, "a", num_experts=8)
    import_files(store, "vllm", paths, "b", num_experts=8)
    with pytest.raises(InputError, match="'a' is complete already"):
        import_files(store, "vllm", paths, "a", num_experts=8)
    assert list(Store(store).runs()["run_id"]) == ["a", "b"]


def test_unknown_formats_are_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match="no format 'magic' to import; known are esft, table, "):
        importer("magic")


def test_others_add_a_format_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = registry.Importer(
        name="mine", description="d", versions=("1",), holds="h", read=importers()["esft"].read
    )

    class Point:
        name = "mine"

        def load(self) -> registry.Importer:
            return mine

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()])
    assert importer("mine") is mine


def test_options_that_do_not_fit_are_refused(golden: ModuleType, tmp_path: Path) -> None:
    paths = golden.vllm_older(tmp_path)
    with pytest.raises(ImportFileError, match="--layers names 3 layers, the source has 2"):
        importer("vllm").read(paths, ImportOptions(layers=(0, 1, 2)))
    with pytest.raises(ImportFileError, match="there is no rule 'magic'"):
        importer("router-logits").read(golden.logits_npz(tmp_path), ImportOptions(rule="magic"))


@pytest.fixture(scope="session")
def rounds() -> Iterator[int]:
    share = float(os.environ.get("MOESCOPE_SOAK", "1"))
    yield 2000 if share >= 1 else 50


@pytest.mark.soak
def test_mutated_files_are_imported_whole_or_refused(rounds: int, golden: ModuleType) -> None:
    """No crash, no run code, no more than 5 s and 1 GB + 10 x file size."""
    script = Path(__file__).with_name("fuzz.py")
    numbers = ",".join(map(str, range(len(golden.GOLDEN))))
    done = subprocess.run(
        [sys.executable, str(script), numbers, str(rounds), "7"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(golden.GOLDEN)
    assert all(line["imported"] + line["refused"] == rounds for line in lines)
