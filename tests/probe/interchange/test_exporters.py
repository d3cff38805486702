"""A run in the formats of others: hand-computed files, and archives that come back whole."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from moescope.app.cli import main
from moescope.probe.errors import InputError, MoescopeError, RunError
from moescope.probe.interchange import run_tables
from moescope.probe.interchange.archive import read_archive
from moescope.probe.interchange.exporting import ExportOptions, export_run
from moescope.probe.interchange.registry import exporter, exporters
from moescope.probe.interchange.writers import without_formulas
from moescope.probe.storage.store import Store


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


def test_sglang_has_a_row_for_every_hidden_layer(store: Store, tmp_path: Path) -> None:
    expected = json.loads((runs.GOLDEN / "sglang.json").read_text())
    assert json.loads(write(store, "sglang", tmp_path / "a.json").read_text()) == expected
    loaded = torch.load(write(store, "sglang", tmp_path / "a.pt"), weights_only=True)
    assert list(loaded) == ["logical_count"]
    assert loaded["logical_count"].dtype == torch.int64
    assert loaded["logical_count"].tolist() == expected["logical_count"]
    longer = write(store, "sglang", tmp_path / "b.json", num_layers=6)
    assert json.loads(longer.read_text())["logical_count"][4:] == [[0] * 4, [0] * 4]


def test_fewer_layers_than_are_routed_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 3 is routed, so the model has at least 4 layers"):
        write(store, "sglang", tmp_path / "a.json", num_layers=3)
    assert not list(tmp_path.iterdir())


def test_eplb_is_the_matrix_of_routed_layers(store: Store, tmp_path: Path) -> None:
    expected = json.loads((runs.GOLDEN / "eplb.json").read_text())
    assert json.loads(write(store, "eplb", tmp_path / "a.json").read_text()) == expected
    matrix = np.load(write(store, "eplb", tmp_path / "a.npy"), allow_pickle=False)
    assert matrix.dtype == np.int64 and matrix.tolist() == expected


def test_keep_list_ranks_by_load_and_ties_by_id(store: Store, tmp_path: Path) -> None:
    whole = write(store, "vllm-keep", tmp_path / "a.jsonl").read_bytes()
    assert whole == (runs.GOLDEN / "vllm_keep.jsonl").read_bytes()
    part = write(store, "vllm-keep", tmp_path / "b.jsonl", keep=2)
    assert part.read_text() == '{"1":[2,0],"3":[3,1]}\n'


@pytest.mark.parametrize("keep", [1, 5])
def test_a_layer_keeps_what_a_token_selects(store: Store, tmp_path: Path, keep: int) -> None:
    with pytest.raises(InputError, match=f"--keep must be 2 to 4, not {keep}"):
        write(store, "vllm-keep", tmp_path / "a.jsonl", keep=keep)
    assert not list(tmp_path.iterdir())


def test_layers_of_different_width_are_no_matrix(tmp_path: Path) -> None:
    shapes = [
        runs.lab.Shape(layer=0, num_experts=2, top_k=1),
        runs.lab.Shape(layer=1, num_experts=3, top_k=1),
    ]
    items = [runs.lab.Item(tokens=[runs.lab.Token(slots={0: [(0, 1.0)], 1: [(2, 1.0)]})])]
    uneven = runs.lab.write_run(tmp_path / "store.duckdb", shapes, items)
    for name in ("sglang", "eplb"):
        with pytest.raises(InputError, match="layer 0 has 2 experts and layer 1 has 3"):
            write(uneven, name, tmp_path / "out.json")
    ranked = write(uneven, "vllm-keep", tmp_path / "keep.json").read_text()
    assert ranked == '{"0":[0,1],"1":[2,0,1]}\n'


def test_only_routers_of_decoder_layers_are_in_matrices(tmp_path: Path) -> None:
    shapes = [runs.lab.Shape(layer=0, num_experts=2, top_k=1),
              runs.lab.Shape(layer=1, num_experts=9, top_k=1, kind="mtp")]  # fmt: skip
    items = [runs.lab.Item(tokens=[runs.lab.Token(slots={0: [(1, 1.0)], 1: [(8, 1.0)]})])]
    mixed = runs.lab.write_run(tmp_path / "store.duckdb", shapes, items)
    assert json.loads(write(mixed, "eplb", tmp_path / "a.json").read_text()) == [[0, 1]]
    shapes = [runs.lab.Shape(layer=1, num_experts=9, top_k=1, kind="mtp")]
    other = runs.lab.write_run(tmp_path / "other.duckdb", shapes, items)
    with pytest.raises(InputError, match="no routed decoder layer"):
        write(other, "eplb", tmp_path / "b.json")


def test_counts_have_no_prompts(store: Store, tmp_path: Path) -> None:
    expected = (runs.GOLDEN / "counts.csv").read_bytes()
    assert write(store, "counts", tmp_path / "a.csv").read_bytes() == expected
    rows = pa_csv.read_csv(runs.GOLDEN / "counts.csv").to_pylist()
    assert pq.read_table(write(store, "counts", tmp_path / "a.parquet")).to_pylist() == rows
    assert json.loads(write(store, "counts", tmp_path / "a.json").read_text()) == rows


# --- tables ---------------------------------------------------------------------------------------


def test_csv_is_as_written_by_hand(store: Store, tmp_path: Path) -> None:
    out = write(store, "csv", tmp_path / "run")
    for name in ("prompts", "routing"):
        assert (out / f"{name}.csv").read_text() == (runs.GOLDEN / f"{name}.csv").read_text(), name
    names = {"runs", "layers", "prompts", "tokens", "usage", "routing"}
    assert {path.stem for path in out.iterdir()} == names


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_text_that_a_spreadsheet_would_compute_is_made_harmless(start: str) -> None:
    table = pa.table({"text": [f"{start}x", "x" + start, "", None], "number": [-1, 2, -3, 4]})
    found = without_formulas(table).to_pydict()
    assert found["text"] == [f"'{start}x", "x" + start, "", None]
    assert found["number"] == [-1, 2, -3, 4]


def test_csv_says_what_the_store_says(recorded: Store, tmp_path: Path) -> None:
    out = write(recorded, "csv", tmp_path / "run", "base")
    with (out / "prompts.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    stored = recorded.arrow("SELECT * FROM prompts ORDER BY prompt_id").to_pylist()
    assert [row["text"] for row in rows] == [row["text"] for row in stored]
    with (out / "runs.csv").open(newline="", encoding="utf-8") as file:
        (run,) = csv.DictReader(file)
    assert run["created_at"].endswith("Z")
    assert json.loads(run["manifest"]) == recorded.run("base").manifest


def test_parquet_holds_the_rows_of_the_store(random_run: Store, tmp_path: Path) -> None:
    out = write(random_run, "parquet", tmp_path / "run")
    for name in run_tables.SHOWN_TABLES:
        found = pq.read_table(out / f"{name}.parquet")
        order = [(column, "ascending") for column in found.column_names if column != "manifest"]
        expected = random_run.arrow(f"SELECT * FROM {name}")
        assert found.column_names == expected.column_names
        assert found.sort_by(order).to_pylist() == expected.sort_by(order).to_pylist(), name


def test_parquet_of_the_run_written_by_hand(store: Store, tmp_path: Path) -> None:
    out = write(store, "parquet", tmp_path / "run")
    found = pq.read_table(out / "routing.parquet").to_pylist()
    assert found == pa_csv.read_csv(runs.GOLDEN / "routing.csv").to_pylist()
    usage = pq.read_table(out / "usage.parquet")
    mine = pc.and_(pc.equal(usage["layer"], 1), pc.equal(usage["phase"], "generated"))
    assert usage.filter(mine)["num_tokens"].to_pylist() == [0, 1, 1, 0]
    assert usage.filter(mine)["weight_sum"].to_pylist() == [0.0, 0.5, 0.5, 0.0]


def test_long_tables_are_written_in_pieces(
    random_run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_tables, "_MOST_ROWS", 100)
    whole = write(random_run, "csv", tmp_path / "pieces")
    rows = (whole / "routing.csv").read_text().splitlines()
    assert len(rows) == 1 + 12 * 10 * 3 * 2
    with random_run.connection() as con, run_tables.stream(con, "routing", "run") as stream:
        pieces = [batch.num_rows for batch in stream.batches]
    assert len(pieces) > 1


def test_a_run_of_usage_alone_has_empty_routing(tmp_path: Path) -> None:
    usage = runs.lab.write_run(
        tmp_path / "store.duckdb", runs.SHAPES, runs.ITEMS, record_level="usage"
    )
    out = write(usage, "csv", tmp_path / "run")
    header = (runs.GOLDEN / "routing.csv").read_text().splitlines()[0]
    assert (out / "routing.csv").read_text().splitlines() == [header]
    read_archive(write(usage, "archive", tmp_path / "a.zip"), tmp_path / "new.duckdb")
    assert tables(Store(tmp_path / "new.duckdb"), "run") == tables(usage, "run")


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_without_text_no_file_holds_any(recorded: Store, tmp_path: Path, name: str) -> None:
    out = write(recorded, name, tmp_path / "run", "base", without_text=True)
    if name == "csv":
        text = "".join(path.read_text() for path in out.iterdir())
        assert "DROP TABLE" not in text and "naïve" not in text
        prompts = pa_csv.read_csv(out / "prompts.csv", read_options=pa_csv.ReadOptions())
    else:
        prompts = pq.read_table(out / "prompts.parquet")
        assert set(pq.read_table(out / "tokens.parquet")["token"].to_pylist()) == {""}
    assert set(prompts["label"].to_pylist()) == {"a", "b"}
    assert prompts["expected"].null_count == prompts["meta"].null_count == 6


def test_what_is_there_is_kept_unless_forced(store: Store, tmp_path: Path) -> None:
    out = write(store, "eplb", tmp_path / "a.json")
    out.write_text("mine")
    with pytest.raises(InputError, match="there already"):
        write(store, "eplb", out)
    assert out.read_text() == "mine"
    export_run(exporter("eplb"), store, "run", out, ExportOptions(), force=True)
    assert json.loads(out.read_text()) == json.loads((runs.GOLDEN / "eplb.json").read_text())


def test_force_replaces_only_what_an_export_wrote(store: Store, tmp_path: Path) -> None:
    folder = write(store, "csv", tmp_path / "run")
    (folder / "prompts.csv").unlink()
    export_run(exporter("csv"), store, "run", folder, ExportOptions(), force=True)
    assert (folder / "prompts.csv").is_file()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"no earlier export \(thesis.tex\)"):
        export_run(exporter("csv"), store, "run", folder, ExportOptions(), force=True)
    taken = tmp_path / "b.json"
    taken.mkdir()
    with pytest.raises(InputError, match="is a folder, and a file would be written"):
        export_run(exporter("eplb"), store, "run", taken, ExportOptions(), force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "b.json"}
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_failure_in_the_middle_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moescope.probe.interchange.exporters.csv_tables.write_csv", fail)
    with pytest.raises(MoescopeError, match="the disk is full"):
        write(store, "csv", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_options_that_a_format_does_not_know_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--keep is no option of 'eplb'"):
        write(store, "eplb", tmp_path / "a.json", keep=2)
    with pytest.raises(InputError, match="--without-text is no option of 'counts'"):
        write(store, "counts", tmp_path / "a.csv", without_text=True)
    with pytest.raises(InputError, match=r"ends in \.json or \.pt"):
        write(store, "sglang", tmp_path / "a.csv")
    with pytest.raises(InputError, match="there is no format 'gguf' to export; known are parquet"):
        exporter("gguf")


def test_only_complete_runs_are_exported(tmp_path: Path) -> None:
    running = runs.lab.write_run(
        tmp_path / "store.duckdb", runs.SHAPES, runs.ITEMS, status="running"
    )
    with pytest.raises(RunError, match="is running, only complete runs"):
        write(running, "eplb", tmp_path / "a.json")
    with pytest.raises(RunError, match="has no run 'x'"):
        write(running, "eplb", tmp_path / "a.json", "x")


def test_the_store_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    path = Path(shutil.copy(store.path, tmp_path / "store.zip"))
    with pytest.raises(InputError, match="is the store itself"):
        export_run(exporter("archive"), Store(path), "run", path, ExportOptions(), force=True)
    assert Store(path).run("run").status == "complete"


def test_every_format_is_described() -> None:
    for name, one in exporters().items():
        assert name == one.name and one.description and one.versions and one.needs
        assert bool(one.suffixes) != bool(one.members)


def test_the_command_exports(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(*words: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["moescope", "export", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    out = tmp_path / "keep.jsonl"
    where = ("--store", store.path, "--run", "run", "--out", out)
    assert run("vllm-keep", *where, "--keep", "2") == 0
    assert out.read_text() == '{"1":[2,0],"3":[3,1]}\n'
    assert run("vllm-keep", *where) == 2
    assert capsys.readouterr().err.count("\n") == 2  # of both, one sentence each
    assert run("vllm-keep") == 2
    assert run("--list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in listed] == list(exporters())


def test_listing_formats_needs_no_torch() -> None:
    code = (
        "import sys; from moescope.probe.interchange.registry import exporters; exporters(); "
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
