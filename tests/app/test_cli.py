"""The commands as a user runs them: what they print, what they refuse, what survives a kill."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import duckdb
import pytest
import typer

from moescope.app.cli import main
from moescope.probe.storage import writing
from moescope.probe.storage.runs import run_folder
from moescope.probe.storage.store import Store

MOESCOPE = str(Path(sys.executable).with_name("moescope"))
COMMANDS = ["demo", "doctor", "families", "models list", "models save", "trace", "runs",
            "store verify", "store repair", "store merge", "store delete", "store vacuum",
            "store migrate", "store log", "sql", "analyze", "contrast", "plan from-table",
            "plan show", "plan check", "generate", "evaluate", "dashboard", "import", "export",
            "plan convert", "plan strategies", "plan control", "plan compose", "plan invert",
            "decode contrast", "decode remix", "sweep", "lm-eval", "attribute",
            "plan search", "causes swap", "causes patch", "causes paths",
            "causes writes"]  # fmt: skip


def moescope(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The program's entry point, in this process: starting Python anew takes most of the time."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["moescope", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except typer.Exit as end:
            code = end.exit_code
    return subprocess.CompletedProcess(list(words), code, out.getvalue(), err.getvalue())


def started(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed program, as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [MOESCOPE, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="session")
def model_folder(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model as a directory on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_bundle.model.save_pretrained(folder)
    tiny_bundle.tokenizer.save_pretrained(folder)
    return folder


def questions(folder: Path, count: int) -> Path:
    path = folder / "questions.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"Question number {i}: {'why ' * (i % 7)}?"}
            for i in range(count)]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = moescope(*command.split(), "--help")
    assert done.returncode == 0
    assert f"Example: moescope {command}" in re.sub(r"\s+", " ", done.stdout)


def test_the_commands_are_those_documented() -> None:
    shown = started("--help").stdout
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    for command in COMMANDS:
        assert command.split()[0] in shown
        assert f"moescope {command}" in readme, f"README does not mention `moescope {command}`"


def test_trace_with_usage_layers_and_limit(model_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    done = moescope(
        "trace", model_folder, "--prompts", questions(tmp_path, 5), "--store", store, "--run", "r",
        "--record", "usage", "--layers", "0,2", "--limit", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 prompts" in done.stderr
    listed = json.loads(moescope("runs", "--store", store, "--json").stdout)
    assert [(r["run_id"], r["status"], r["num_prompts"]) for r in listed] == [("r", "complete", 3)]
    layers = Store(store).query("SELECT DISTINCT layer FROM usage ORDER BY 1")["layer"].tolist()
    assert layers == [0, 2]
    verified = moescope("store", "verify", "--store", store)
    assert verified.returncode == 0 and "adds up" in verified.stdout


def test_stores_are_merged_asked_in_sql_emptied_and_shrunk(
    model_folder: Path, tmp_path: Path
) -> None:
    stores = [tmp_path / "a.duckdb", tmp_path / "b.duckdb"]
    for store, place in zip(stores, ("store", "shards"), strict=True):
        done = moescope(
            "trace", model_folder, "--prompts", questions(tmp_path, 3), "--store", store,
            "--run", "r", "--routing-in", place,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    log = json.loads(moescope("store", "log", "--store", stores[0], "--run", "r", "--json").stdout)
    assert [log[0]["event"], log[-1]["event"], log[-1]["status"]] == [
        "began",
        "finished",
        "complete",
    ]
    whole = tmp_path / "all.duckdb"
    clash = moescope("store", "merge", *stores, "--into", whole)
    assert clash.returncode == 2 and "different runs 'r'" in clash.stderr
    assert not whole.exists()
    assert moescope("store", "merge", stores[0], "--into", whole).returncode == 0
    merged = moescope("store", "merge", stores[1], "--into", whole, "--rename", "r=s")
    assert merged.returncode == 0 and "as 's'" in merged.stdout
    assert "nothing to mend" in moescope("store", "repair", "--store", whole).stdout
    asked = moescope(
        "sql", "SELECT run_id, count(DISTINCT prompt_id) AS prompts, count(*) AS slots "
        "FROM routing GROUP BY 1 ORDER BY 1", "--store", whole, "--json",
    )  # fmt: skip
    first, second = json.loads(asked.stdout)
    assert (first["run_id"], second["run_id"]) == ("r", "s")
    assert first["prompts"] == second["prompts"] == 3
    assert first["slots"] == second["slots"] > 0
    deleted = moescope("store", "delete", "--store", whole, "--run", "r", "--yes")
    assert deleted.returncode == 0 and "run 'r' deleted" in deleted.stdout
    assert "MB before" in moescope("store", "vacuum", "--store", whole).stdout
    assert list(Store(whole).runs()["run_id"]) == ["s"]


def test_sql_is_read_only_and_stays_inside_the_store(model_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    with writing(store):
        pass
    with duckdb.connect(str(store)) as con:
        con.execute("CREATE VIEW peek AS SELECT * FROM read_text('/etc/passwd')").fetchall()
    for query, words in (
        ("SELECT * FROM peek", "reach outside the store"),
        ("SELECT * FROM '/etc/passwd'", "moescope:"),
        ("DELETE FROM runs", "moescope:"),
        ("SELEC 1", "the query is wrong"),
    ):
        done = moescope("sql", query, "--store", store)
        assert done.returncode != 0 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and "root:" not in done.stdout + done.stderr
    out = tmp_path / "runs.csv"
    assert moescope("sql", "SELECT 1 AS one", "--store", store, "--out", out).returncode == 0
    assert out.read_text() == "one\n1\n"


def test_doctor_says_how_a_model_routes(model_folder: Path) -> None:
    done = moescope("doctor", model_folder, "--json")
    report = json.loads(done.stdout)
    assert report["family"] == "qwen3_moe"
    assert [layer["verified"] for layer in report["layers"]] == [True] * 3
    shown = moescope("doctor", model_folder).stdout
    assert "verified on every layer" in shown and "softmax, top-2 of 8, renormalized" in shown


def test_shipped_models_are_listed_and_saved_for_plain_transformers(tmp_path: Path) -> None:
    listed = json.loads(moescope("models", "list", "--json").stdout)
    assert {row["name"]: row["tuned_experts"] > 0 for row in listed} == {
        "demo": True, "demo-base": False, "demo-random": True,
    }  # fmt: skip
    folder = tmp_path / "saved"
    done = moescope("models", "save", "demo-random", folder)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json", "tuned_experts.json"} <= {
        path.name for path in folder.iterdir()
    }
    again = moescope("models", "save", "demo-random", folder)
    assert again.returncode == 2 and "not an empty directory" in again.stderr
    unknown = moescope("models", "save", "demo-other", tmp_path / "other")
    assert unknown.returncode == 2 and "demo-base" in unknown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def start_trace(words: list[str | Path]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [MOESCOPE, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment,
    )  # fmt: skip


def snapshot(store: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table but timestamps, and what names the ingested files."""
    opened = Store(store)
    tables = ("layers", "prompts", "tokens", "routing", "usage_arrays", "ingested_shards")
    rows = {
        table: [
            tuple(row.values())
            for row in opened.arrow(f"SELECT * FROM {table} ORDER BY ALL").to_pylist()
        ]
        for table in tables
    }
    rows["runs"] = [
        tuple(row.values())
        for row in opened.arrow(
            "SELECT * EXCLUDE (created_at, finished_at) FROM runs ORDER BY ALL"
        ).to_pylist()
    ]
    return rows


def test_a_killed_run_resumes_to_the_same_tables(model_folder: Path, tmp_path: Path) -> None:
    prompts = questions(tmp_path, 120)

    def command(store: Path) -> list[str | Path]:
        return ["trace", model_folder, "--prompts", prompts, "--store", store, "--run", "night",
                "--generate", "4", "--tokens-per-batch", "150"]  # fmt: skip

    whole, killed = tmp_path / "whole.duckdb", tmp_path / "killed.duckdb"
    assert moescope(*command(whole)).returncode == 0
    expected = snapshot(whole)
    assert len(expected["ingested_shards"]) > 30

    kills = 0
    for wanted in (12,):
        process = start_trace(command(killed))
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if num_shards(killed) >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 1
    listed = Store(killed).run("night") if killed.exists() else None
    assert listed is None or listed.status == "running"

    resumed = moescope(*command(killed))
    assert resumed.returncode == 0, resumed.stderr
    assert "of them earlier" in resumed.stderr
    totals = f"{len(expected['tokens']):,} tokens, {len(expected['routing']):,} routing rows"
    assert totals in resumed.stderr
    assert snapshot(killed) == expected
    assert not killed.with_name("killed.duckdb.shards").exists()


def num_shards(store: Path) -> int:
    """Whole shards, on disk and in the store, without disturbing either."""
    folder = run_folder(store, "night").path
    on_disk = {path.name for path in folder.glob("shard-*")}
    if not store.exists():
        return len(on_disk)
    try:
        ids = Store(store).query("SELECT shard_id FROM ingested_shards")["shard_id"]
    except Exception:
        return len(on_disk)
    return len(on_disk | set(ids))


def test_resuming_with_other_arguments_is_refused(model_folder: Path, tmp_path: Path) -> None:
    prompts, store = questions(tmp_path, 3), tmp_path / "s.duckdb"
    words = ["trace", model_folder, "--prompts", prompts, "--store", store, "--run", "r"]
    assert moescope(*words).returncode == 0
    before = snapshot(store)
    again = moescope(*words, "--generate", "2")
    assert again.returncode == 2
    assert "max_new_tokens: 0 -> 2" in again.stderr
    assert snapshot(store) == before


def bad_inputs(folder: Path, model: Path) -> dict[str, tuple[list[str | Path], str]]:
    """Name -> the command, and what its one sentence must say."""
    good = questions(folder, 2)
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    text = folder / "text.duckdb"
    text.write_text("this is not a database")
    foreign = folder / "foreign.duckdb"
    duckdb.connect(str(foreign)).execute("CREATE TABLE t (x INTEGER)").close()
    newer = folder / "newer.duckdb"
    with duckdb.connect(str(newer)) as con:
        con.execute("CREATE TABLE moescope_schema (version INTEGER)")
        con.execute("INSERT INTO moescope_schema VALUES (999)")
    dense = folder / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    tail: list[str | Path] = ["--store", folder / "out.duckdb", "--run", "r"]

    def trace(model: str | Path, prompts: Path, *more: str | Path) -> list[str | Path]:
        return ["trace", model, "--prompts", prompts, *(more or tail)]

    gone = folder / "gone.jsonl"
    return {
        "unknown model": (trace("nosuch", good), "there is no model 'nosuch'"),
        "folder without a model": (trace(folder, good), "without a config.json"),
        "dense model": (trace(dense, good), "dense model without routers"),
        "missing prompts": (trace(model, gone), "does not exist"),
        "bad line": (trace(model, bad), "bad.jsonl, line 2, field 'prompt'"),
        "not a store": (trace(model, good, "--store", text, "--run", "r"), "text.duckdb"),
        "foreign database": (["runs", "--store", foreign], "not a moescope store"),
        "newer store": (["runs", "--store", newer], "schema version 999"),
        "newer store, writing": (
            trace(model, good, "--store", newer, "--run", "r"),
            "schema version 999",
        ),
        "missing store": (["runs", "--store", folder / "none.duckdb"], "none.duckdb"),
        "unknown device": (trace(model, good, *tail, "--device", "warp"), "'warp'"),
        "unknown layer": (trace(model, good, *tail, "--layers", "7"), "no router"),
        "unknown analysis": (["analyze", "magic", "--store", foreign], "magic"),
        "unknown option": (["trace", model, "--colour", "red"], "--colour"),
        "missing plan": (["generate", model, "--prompt", "x", "--plan", gone], "gone.jsonl"),
    }


def test_bad_input_is_one_sentence_and_nothing_is_written(
    model_folder: Path, tmp_path: Path
) -> None:
    cases = bad_inputs(tmp_path, model_folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, (words, sentence) in cases.items():
        done = moescope(*words)
        code, said = done.returncode, done.stderr
        assert code == 2, f"{name}: {code} {said}"
        assert sentence in said, f"{name}: {said}"
        assert "Traceback" not in said, name
        lines = [line for line in said.splitlines() if line.startswith("moescope: ")]
        assert len(lines) == 1 or "Usage" in said, f"{name}: {said}"
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_any_analysis_is_answered_drawn_and_found_again(
    recorded_store: Path, tmp_path: Path
) -> None:
    store = shutil.copy(recorded_store, tmp_path / "runs.duckdb")
    words = ["analyze", "coactivation", "--store", store, "--run", "base"]
    figures, table = tmp_path / "out" / "pairs.html", tmp_path / "out" / "pairs.csv"
    done = moescope(*words, "--figure", figures, "--out", table)
    assert done.returncode == 0, done.stderr
    assert "stored result" not in done.stderr
    page = figures.read_text()
    assert "Plotly.newPlot" in page and "run base" in page
    again = moescope(*words)
    assert "nothing has changed since" in again.stderr
    assert again.stdout == done.stdout
    assert "stored result" not in moescope(*words, "--fresh").stderr
    refused = moescope(*words, "--figure", tmp_path / "pairs.png")
    assert (refused.returncode, "must end in .html" in refused.stderr) == (2, True)
    refused = moescope("analyze", "prompts", "--store", store, "--run", "base", "--figure", figures)
    assert (refused.returncode, "has no figure" in refused.stderr) == (2, True)
    refused = moescope(*words, "--out", tmp_path / "pairs.xlsx")
    assert (refused.returncode, "does not say a format" in refused.stderr) == (2, True)


def test_filters_are_options_of_every_analysis(recorded_store: Path) -> None:
    words = ["analyze", "load", "--store", recorded_store, "--run", "base", "--json"]
    counted = {}
    for name, more in {
        "all": (), "user": ("--segment", "user"), "answer": ("--segment", "answer"),
        "both": ("--segment", "user,answer"), "kind": ("--kind", "mlp", "--layers", "1"),
    }.items():  # fmt: skip
        done = moescope(*words, *more)
        assert done.returncode == 0, done.stderr
        counted[name] = json.loads(done.stdout)["context"]["num_tokens"]
    assert counted["both"] == counted["user"] + counted["answer"] == counted["all"]
    assert counted["kind"] == counted["all"]
    for more, said in ((("--segment", "usr"), "segment 'usr' does not exist"),
                       (("--kind", "attention"), "no router of kind 'attention'")):  # fmt: skip
        done = moescope(*words, *more)
        assert done.returncode == 2 and said in done.stderr


def test_a_contrast_by_another_method_and_against_another_run(recorded_store: Path) -> None:
    common = ["--store", recorded_store, "--run", "base", "--json"]
    done = moescope("contrast", "--method", "esft_gate", "--mass", "0.5", *common)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["context"]["parameters"]["measure"] == "weights"
    assert sum(row["candidate"] for row in about["rows"]) >= 3
    marked = moescope("contrast", "--method", "npmi", "--marker", " the=-1", *common)
    assert marked.returncode == 2 and "no marker has a positive" in marked.stderr
    done = moescope("analyze", "saturation", "--against", "nowhere", *common)
    assert done.returncode == 2 and "has no run 'nowhere'" in done.stderr


def test_plans_are_made_by_strategies_and_of_other_plans(tmp_path: Path) -> None:
    table, loads = tmp_path / "experts.csv", tmp_path / "loads.csv"
    table.write_text(
        "layer,expert,a1,d1,a2,d2\n0,1,8,2,1,9\n0,2,1,9,8,2\n1,3,7,3,2,8\n2,5,4,6,5,5\n"
    )
    rows = [f"{layer},{expert},{1 / 40}" for layer in range(6) for expert in range(40)]
    loads.write_text("layer,expert,load\n" + "\n".join(rows) + "\n")
    plan, other = tmp_path / "plan.json", tmp_path / "other.json"
    listed = moescope("plan", "strategies")
    assert "steermoe" in listed.stdout and "arXiv 2509.09660" in listed.stdout

    done = moescope("plan", "from-table", table, "--strategy", "steermoe", "--force", "1",
                    "--mask", "1", "--model", "demo", "--out", plan)  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(plan.read_text())
    shown = [(one["action"], one["layer"], one["experts"]) for one in made["interventions"]]
    assert sorted(shown) == [("force", 0, [1]), ("mask", 0, [2])]
    assert made["provenance"]["strategy"] == "steermoe"

    for kind, more in {"random": (), "load-matched": ("--table", loads)}.items():
        done = moescope("plan", "control", plan, "--kind", kind, "--model", "demo", "--seed", "3",
                        "--out", other, *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
        drawn = json.loads(other.read_text())["interventions"]
        assert [one["layer"] for one in drawn] == [0, 0]
        assert not {1, 2} & {expert for one in drawn for expert in one["experts"]}
    done = moescope("plan", "compose", plan, other, "--model", "demo", "--out", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    done = moescope("plan", "invert", plan, "--out", tmp_path / "i.json")
    turned = json.loads((tmp_path / "i.json").read_text())["interventions"]
    assert sorted((one["action"], one["experts"]) for one in turned) == [
        ("force", [2]), ("mask", [1])
    ]  # fmt: skip
    conflict = moescope("plan", "compose", plan, tmp_path / "i.json", "--out", tmp_path / "x.json")
    assert conflict.returncode == 2 and not (tmp_path / "x.json").exists()
    for words, said in {
        ("--strategy", "magic"): "strategy 'magic' is not available",
        ("--strategy", "rice"): "needs beta",
        ("--strategy", "rice", "--set", "beta=2", "--mask", "3"): "takes no --mask",
        ("--set", "beta=2"): "go with --strategy",
        ("--strategy", "steermoe", "--force", "9"): "",
    }.items():
        done = moescope("plan", "from-table", table, "--out", other, *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    twice = tmp_path / "twice.csv"
    twice.write_text("layer,expert,score\n0,1,2\n0,1,3\n")
    asked = ("demo", "--prompts", "refusal")
    for words, said in {
        ("attribute", *asked, "--passes", "3"): "--passes means nothing with --method gradient",
        ("attribute", *asked, "--method", "exact", "--checked", "3"): "--checked means nothing",
        ("attribute", *asked, "--method", "force", "--mode", "drop"): "--mode means nothing",
        ("attribute", *asked, "--store", tmp_path / "s.duckdb"): "--store means nothing",
        ("attribute", *asked, "--target", "answer", "--opening-tokens", "2"): "--target answer",
        ("attribute", *asked, "--take", "3"): "--take and --plan go together",
        ("attribute", *asked, "--contrast", twice): "names an expert twice",
        ("plan", "search", *asked, "--out", tmp_path / "p.json", "--target", "answer",
         "--bound", "3"): "--bound means nothing with --target answer",
    }.items():  # fmt: skip
        done = moescope(*words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "s.duckdb").exists() and not (tmp_path / "p.json").exists()
