"""Plans in the forms of other systems: hand-made files, round trips, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.app.cli import main
from moescope.probe.errors import ImportFileError, InputError, MoescopeError, PlanError
from moescope.probe.storage import writing
from moescope.steering import SteeringPlan
from moescope.steering.export import (
    DS4_SHAPE,
    plan_of_weights,
    plan_weights,
    read_plan,
    write_plan,
)

GOLDEN = Path(__file__).parents[1] / "probe" / "interchange" / "golden"
SMALL = {"num_layers": 4, "num_experts": 4}


def mask(layer: int, *experts: int, **changes: Any) -> dict[str, Any]:
    return {"action": "mask", "layer": layer, "experts": experts, **changes}


def force(layer: int, *experts: int, **changes: Any) -> dict[str, Any]:
    return {"action": "force", "layer": layer, "experts": experts, **changes}


def plan(*interventions: dict[str, Any], **fields: Any) -> SteeringPlan:
    return SteeringPlan(interventions=interventions, **fields)


#: The plan of `steermoe.json`, and the same without fill-up, which a matrix cannot tell apart.
SMALL_PLAN = plan(mask(1, 1, fill_up=True), force(1, 3), mask(3, 0, 2, fill_up=True))
PLAIN_PLAN = plan(mask(1, 1), force(1, 3), mask(3, 0, 2))
#: The plan of `ds4.f32` and `ds4.json`.
DS4_PLAN = plan(mask(5, 9, 200), force(5, 0), force(42, 255), model="deepseek-v4-flash")


def test_steermoe_is_as_written_by_hand(tmp_path: Path) -> None:
    expected = (GOLDEN / "steermoe.json").read_text()
    write_plan(SMALL_PLAN, tmp_path / "w.json", "steermoe", **SMALL)
    assert (tmp_path / "w.json").read_text() == expected
    write_plan(SMALL_PLAN, tmp_path / "w.npy", "steermoe", **SMALL)
    weights = np.load(tmp_path / "w.npy", allow_pickle=False)
    assert weights.dtype == np.int8 and weights.tolist() == json.loads(expected)
    write_plan(PLAIN_PLAN, tmp_path / "plain.json", "steermoe", **SMALL)
    assert (tmp_path / "plain.json").read_text() == expected


def test_steermoe_is_read_as_the_plan_it_was() -> None:
    assert read_plan(GOLDEN / "steermoe.json", "steermoe") == SMALL_PLAN


def test_ds4_is_as_written_by_hand(tmp_path: Path) -> None:
    write_plan(DS4_PLAN, tmp_path / "x.f32", "ds4")
    assert (tmp_path / "x.f32").read_bytes() == (GOLDEN / "ds4.f32").read_bytes()
    found = json.loads((tmp_path / "x.json").read_text())
    expected = json.loads((GOLDEN / "ds4.json").read_text())
    assert found == expected and list(found) == list(expected)


@pytest.mark.parametrize("name", ["ds4.f32", "ds4.json"])
def test_ds4_is_read_as_the_plan_it_was(name: str) -> None:
    assert read_plan(GOLDEN / name, "ds4") == DS4_PLAN


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_round_trip_gives_the_plan(tmp_path: Path, suffix: str) -> None:
    named = SteeringPlan(interventions=SMALL_PLAN.interventions, name="n", model="m")
    path = tmp_path / f"w{suffix}"
    write_plan(named, path, "steermoe", **SMALL)
    assert read_plan(path, "steermoe", name="n", model="m") == named


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=5, max_size=5), min_size=1))
def test_every_matrix_is_a_plan_and_back(cells: list[list[int]]) -> None:
    weights = np.array(cells)
    made = plan_of_weights(weights)
    assert plan_weights(made, *weights.shape).tolist() == cells
    assert plan_of_weights(plan_weights(made, *weights.shape)) == made


def test_an_intervention_on_several_layers_is_in_each() -> None:
    both = plan({"action": "mask", "layers": [0, 2], "experts": [1]}, mask(2, 1, 3))
    assert plan_weights(both, 3, 4).tolist() == [[0, -1, 0, 0], [0, 0, 0, 0], [0, -1, 0, -1]]


@pytest.mark.parametrize(
    ("intervention", "words"),
    [
        (mask(0, 1, mode="drop"), "intervention 2 is 'mask drop', which a matrix"),
        (mask(0, 1, mode="drop_renorm"), "'mask drop_renorm'"),
        (mask(0, 1, via="inf"), "'mask via inf'"),
        (mask(0, 1, via="selection"), "'mask via selection'"),
        (force(0, 1, strength="natural"), "'force natural'"),
        ({"action": "bias", "layer": 0, "experts": [1], "value": 0.5}, "'bias"),
        ({"action": "scale", "layer": 0, "experts": [1], "value": 2}, "'scale x2'"),
        ({"action": "replay", "layer": 0, "run": "base"}, "'replay of base'"),
        ({"action": "top_k", "layer": 0, "value": 1}, "'top_k 1'"),
        ({"action": "top_p", "layer": 0, "value": 0.5}, "'top_p 0.5'"),
        (mask(0, 1, tokens="generated"), "certain tokens only"),
        (force(0, 1, tokens={"first_generated": 2}), "certain tokens only"),
        (mask(0, 1, prompt_ids=[3]), "certain prompt_ids only"),
        (mask(0, 1, kind="attention"), "certain kind only"),
        (mask(4, 1), "layer 4, expert 1 is outside of 4 layers of 4 experts"),
        (force(0, 4), "layer 0, expert 4 is outside"),
        (force(1, 1), "layer 1, expert 1 is masked and forced"),
    ],
)
def test_what_a_matrix_cannot_say_is_refused(
    tmp_path: Path, intervention: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        write_plan(plan(mask(1, 1), intervention), tmp_path / "w.npy", "steermoe", **SMALL)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_ds4_has_one_shape_and_layers_without_router(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="layers 0 to 2, which have no router"):
        write_plan(plan(mask(2, 0)), tmp_path / "x.f32", "ds4")
    with pytest.raises(InputError, match="43 layers of 256 experts, not 43 layers of 4 experts"):
        write_plan(plan(mask(3, 0)), tmp_path / "x.f32", "ds4", num_experts=4)
    assert not list(tmp_path.iterdir())


def test_the_numbers_of_a_model_are_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --num-layers and --num-experts"):
        write_plan(SMALL_PLAN, tmp_path / "w.npy", "steermoe", num_layers=4)
    with pytest.raises(InputError, match="no model has 3000 layers"):
        write_plan(SMALL_PLAN, tmp_path / "w.npy", "steermoe", num_layers=3000, num_experts=4)
    with pytest.raises(InputError, match=r"written to \.npy or \.json, not"):
        write_plan(SMALL_PLAN, tmp_path / "w.txt", "steermoe", **SMALL)
    with pytest.raises(InputError, match="known are steermoe, ds4"):
        write_plan(SMALL_PLAN, tmp_path / "w.npy", "gguf", **SMALL)


def test_neither_file_of_a_pair_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(InputError, match=r"x\.json is there already"):
        write_plan(DS4_PLAN, tmp_path / "x.f32", "ds4")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    write_plan(DS4_PLAN, tmp_path / "x.f32", "ds4", force=True)
    assert read_plan(tmp_path / "x.f32", "ds4") == DS4_PLAN


def huge_header(path: Path) -> None:
    """A .npy that claims to hold a terabyte."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|i1", "fortran_order": False, "shape": (10**6, 10**6)}
        )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.json", "[[0, 2]]", "layer 0, expert 1 has 2, expected -1, 0 or 1"),
        ("w.json", "[[0, 0.5]]", "expert 1 has 0.5"),
        ("w.json", "[[0, 1], [0]]", "rows of one length"),
        ("w.json", "[0, 1]", "expected numbers as .layers, experts., got int64 .2."),
        ("w.json", '[["a"]]', "expected numbers"),
        ("w.json", "[[true]]", "expected numbers"),
        ("w.json", "{}", "expected numbers"),
        ("w.json", "[[]]", "expected numbers"),
        ("w.json", "[[0", "not JSON"),
        ("w.npy", "no array", "is no .npy file of numbers"),
        ("w.npy", np.array([[0, 1]], object), "is no .npy file of numbers"),
        ("w.npy", np.array([[np.nan]]), "has nan"),
        ("w.npy", np.zeros((2001, 1)), "no model has"),
        ("w.npy", huge_header, "is no .npy file of numbers"),
    ],
)
def test_a_bad_steermoe_file_is_refused(
    tmp_path: Path, name: str, content: Any, words: str
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        content(path)
    with pytest.raises(ImportFileError, match=words) as caught:
        read_plan(path, "steermoe")
    assert str(path) in str(caught.value)


def damaged_numbers(folder: Path, layer: int, value: float) -> None:
    weights = np.fromfile(folder / "ds4.f32", "<f4").reshape(DS4_SHAPE).copy()
    weights[layer, 0] = value
    weights.tofile(folder / "ds4.f32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda at: (at / "ds4.f32").write_bytes(b"\0" * 8), "has 8 bytes, 44,032 are expected"),
        (lambda at: damaged_numbers(at, 7, 0.5), "layer 7, expert 0 has 0.5"),
        (lambda at: damaged_numbers(at, 2, 1), "a layer that has no router"),
        (lambda at: (at / "ds4.json").unlink(), "ds4.json does not exist"),
        (lambda at: (at / "ds4.f32").unlink(), "ds4.f32 does not exist"),
        (lambda at: (at / "ds4.json").write_text("{}"), "field 'format' is not"),
        (lambda at: (at / "ds4.json").write_text("[]"), "field 'format' is not"),
        (
            lambda at: (at / "ds4.json").write_text('{"format": "ds4-expert-steering-v1"}'),
            "expected shape",
        ),
    ],
)
def test_a_bad_ds4_pair_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    for name in ("ds4.f32", "ds4.json"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    change(tmp_path)
    with pytest.raises(ImportFileError, match=words):
        read_plan(tmp_path / "ds4.f32", "ds4")


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `moescope plan convert`; returns the exit code."""

    def run(*words: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["moescope", "plan", "convert", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    return run


def model_store(path: Path, widths: dict[int, int]) -> Path:
    """A store with a run `base` of a model with these routed layers, and no prompts."""
    with writing(path) as con:
        con.execute(
            "INSERT INTO runs (run_id, model, created_at, status, source, record_level, manifest) "
            "VALUES ('base', 'm', now(), 'complete', 'recorded', 'topk', '{}')"
        ).fetchall()
        for layer, width in widths.items():
            con.execute(
                "INSERT INTO layers VALUES ('base', ?, 'mlp', 0, 'gate', ?, 2, 0, NULL)",
                [layer, width],
            ).fetchall()
    return path


def test_the_command_converts_there_and_back(tmp_path: Path, convert: Any) -> None:
    SMALL_PLAN.write(tmp_path / "plan.json")
    store = model_store(tmp_path / "s.duckdb", {1: 4, 3: 4})
    out = tmp_path / "w.npy"
    where = ("--store", store, "--run", "base")
    assert convert(tmp_path / "plan.json", "--to", "steermoe", *where, "--out", out) == 0
    assert np.load(out).tolist() == json.loads((GOLDEN / "steermoe.json").read_text())
    assert convert(out, "--from", "steermoe", "--out", tmp_path / "back.json") == 0
    assert SteeringPlan.read(tmp_path / "back.json") == SMALL_PLAN
    named = ("--out", tmp_path / "named.json", "--name", "n", "--model", "m")
    assert convert(GOLDEN / "ds4.f32", "--from", "ds4", *named) == 0
    assert SteeringPlan.read(tmp_path / "named.json").name == "n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give either --to or --from"),
        (("--to", "ds4", "--from", "ds4"), "give either --to or --from"),
        (("--to", "steermoe", "--store", "s.duckdb"), "--store and --run go together"),
        (("--from", "ds4", "--num-layers", "4"), "reads layers and experts from the file"),
        (("--to", "ds4", "--name", "n"), "--name and --model go with --from"),
        (("--to", "steermoe"), "needs the numbers of layers and experts"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, convert: Any, capsys: pytest.CaptureFixture[str], words: Any, sentence: str
) -> None:
    SMALL_PLAN.write(tmp_path / "plan.json")
    assert convert(tmp_path / "plan.json", "--out", tmp_path / "w.npy", *words) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_store_of_uneven_layers_gives_no_matrix(
    tmp_path: Path, convert: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    SMALL_PLAN.write(tmp_path / "plan.json")
    store = model_store(tmp_path / "s.duckdb", {1: 4, 3: 8})
    options = ("--to", "steermoe", "--store", store, "--run", "base", "--out", tmp_path / "w.npy")
    assert convert(tmp_path / "plan.json", *options) == 2
    assert "have 4 or 8 experts" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoescopeError, match="nothing half-written is kept"):
        write_plan(SMALL_PLAN, tmp_path / "file" / "w.npy", "steermoe", **SMALL)
