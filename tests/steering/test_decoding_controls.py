"""Controls of decoding: what they change and what they leave, seeds, planted truths, storing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from moescope.app.cli import main
from moescope.probe import Store
from moescope.probe.errors import InputError
from moescope.probe.prompts import Prompt
from moescope.steering.contrast_decoding import SelfContrast, contrasting
from moescope.steering.decoding import compare_decoding
from moescope.steering.decoding_controls import contrast_controls, remix_controls
from moescope.steering.decoding_store import store_decoding
from moescope.steering.remix import Remix, remix
from moescope.steering.remix_store import References

TEXTS = ("Where is the ring?", "Hello", "What happened in 1868?", "Hi")
BY_ID = dict(enumerate(TEXTS))
NUM_NEW = 5


def asked(expected: list[str] | None = None) -> list[Prompt]:
    return [
        Prompt(prompt_id=at, text=text, set_name="typed", expected=expected and expected[at])
        for at, text in BY_ID.items()
    ]


def references(near: int = 3, far: int = 9) -> References:
    """Near ones use experts 0 and 1 alone, all others 6 and 7; every text resembles the near."""
    num = near + far
    angles = torch.cat([torch.linspace(0, 0.1, near), torch.linspace(0.5, 1.5, far)])
    scores_NE = torch.zeros(num, 8)
    scores_NE[:near, :2] = torch.tensor([0.7, 0.3])
    scores_NE[near:, 6:] = torch.tensor([0.4, 0.6])
    return References(
        keys=tuple(f"r{at}" for at in range(num)),
        embeddings=functional.normalize(torch.stack([angles.cos(), angles.sin()], dim=1), dim=1),
        scores=dict.fromkeys(range(3), scores_NE),
        embed=lambda _: torch.tensor([1.0, 0.0]),
    )


def written(found: Any, condition: str) -> list[str]:
    return [answer.text for answer, _ in found.answers(condition)]


# Self-contrast


def test_a_control_differs_in_the_rank_alone_and_takes_an_unchosen_one(tiny_bundle: Any) -> None:
    method = SelfContrast(alpha=0.3, beta=0.7, weight="own")
    own = {"rank": None, "alpha": 0.3, "beta": 0.7, "weight": "own"}
    for seed in range(8):
        controls, _ = contrast_controls(tiny_bundle.model, method, number=3, seed=seed)
        assert [one.name for one in controls] == [f"random-rank:{seed + at}" for at in range(3)]
        ranks = [one.settings["rank"] for one in controls]
        assert len(set(ranks)) == 3
        assert set(ranks) <= {3, 4, 5, 6, 7}  # 8 experts, top-2, and rank 2 is the method's own
        assert all({**one.settings, "rank": None} == own for one in controls)
        again, _ = contrast_controls(tiny_bundle.model, method, number=2, seed=seed)
        assert [one.settings for one in again] == [one.settings for one in controls[:2]]
    drawn = {
        contrast_controls(tiny_bundle.model, method, number=1, seed=seed)[0][0].settings["rank"]
        for seed in range(40)
    }
    assert drawn == {3, 4, 5, 6, 7}


def test_ranks_that_run_out_are_told(tiny_bundle: Any) -> None:
    controls, notes = contrast_controls(tiny_bundle.model, SelfContrast(rank=7), number=9)
    assert sorted(one.settings["rank"] for one in controls) == [2, 3, 4, 5, 6]
    assert notes[-1].startswith("5 of 9 controls: there are no more unchosen ranks")
    assert contrast_controls(tiny_bundle.model, SelfContrast(), number=0) == ([], [])


def test_a_control_writes_what_the_method_with_that_rank_writes(tiny_bundle: Any) -> None:
    """Planted: what the best unchosen rank makes the model write is what is right."""
    model, method = tiny_bundle.model, SelfContrast(beta=4.0, alpha=0.01)

    def run(settings: SelfContrast, prompts: list[Prompt], controls: Any = ()) -> Any:
        return compare_decoding(
            tiny_bundle, prompts, lambda _: contrasting(model, settings), name="self-contrast",
            controls=controls, max_new_tokens=NUM_NEW,
        )  # fmt: skip

    controls, _ = contrast_controls(model, method, number=2, seed=3)
    right = written(run(method, asked()), "steered")
    found = run(method, asked(right), controls)
    for one in controls:
        alone = run(replace(method, rank=one.settings["rank"]), asked())
        assert written(found, f"control:{one.name}") == written(alone, "steered")
    assert_helps_and_controls_do_not(found)


# Re-mixing


def test_random_references_are_others_with_the_same_weights() -> None:
    known = references()
    nearest = known.neighbour_scores(TEXTS, [0])[0]
    assert torch.allclose(nearest[:, :2], torch.tensor([0.7, 0.3]).expand(4, 2))
    # One expert a reference, so that a mean shows who was drawn, and with what weight.
    single = replace(known, scores={0: torch.eye(12)})
    weights = single.neighbour_scores(TEXTS, [0])[0][0, :3]
    seen = []
    for seed in range(20):
        drawn = single.neighbour_scores(TEXTS, [0], drawn_by=seed)[0]
        assert (drawn[:, :3] == 0).all()
        for row in drawn:
            assert torch.allclose(row[row > 0].sort().values, weights.sort().values)
        again = single.neighbour_scores(TEXTS[::-1], [0], drawn_by=seed)[0]
        assert torch.equal(again.flip(0), drawn)  # whatever else is in the batch
        seen.append(drawn)
    assert len({tuple(row.tolist()) for drawn in seen for row in drawn}) > 60
    assert (torch.stack(seen)[..., 3:] > 0).any(0).any(0).all()  # each other one at some time
    with pytest.raises(InputError, match="5 references are too few to draw 3 others"):
        references(3, 2).neighbour_scores(TEXTS, [0], drawn_by=0)


def test_remixing_helps_by_the_nearest_references_and_not_by_random_ones(tiny_bundle: Any) -> None:
    """Planted: right is what the model writes by the near references' experts."""
    model, settings = tiny_bundle.model, Remix(core_experts=None)
    near = references(3, 0)

    def run(known: References, prompts: list[Prompt], controls: Any = ()) -> Any:
        return compare_decoding(
            tiny_bundle, prompts, lambda sites: remix(model, known, BY_ID, settings, sites=sites),
            name="remix", controls=controls, max_new_tokens=NUM_NEW,
        )  # fmt: skip

    right = written(run(near, asked()), "steered")
    controls, notes = remix_controls(model, references(), BY_ID, settings, number=2, seed=5)
    assert [one.name for one in controls] == ["random-references:5", "random-references:6"]
    assert [one.settings["drawn_by"] for one in controls] == [5, 6]
    assert "at random instead of the nearest" in notes[0]
    found = run(references(), asked(right), controls)
    assert_helps_and_controls_do_not(found)
    again = run(references(), asked(right), controls)
    assert again.frame.equals(found.frame)


def test_too_few_references_give_no_control_and_say_so(tiny_bundle: Any) -> None:
    controls, notes = remix_controls(
        tiny_bundle.model, references(3, 2), BY_ID, Remix(), number=2
    )  # fmt: skip
    assert controls == []
    assert notes == [
        "no control: 5 references, and 6 are needed so that others than the 3 nearest can be drawn"
    ]


def assert_helps_and_controls_do_not(found: Any) -> None:
    """All right by the method, none by a control; changes are paired with unsteered."""
    value = found.frame.set_index(["condition", "metric"])["value"]
    names = [one.name for one in found.conditions]
    assert names[:2] == ["unsteered", "steered"] and len(names) == 4
    assert value["steered", "correct"] == 1.0
    assert value["unsteered", "correct"] == 0.0
    for name in names[1:]:
        assert value[name, "correct_change"] == value[name, "correct"]
        assert name == "steered" or value[name, "correct"] == 0.0
    lines = "\n".join(found.lines())
    assert f"change, {names[2].removeprefix('control:')}" in lines
    shown = found.to_json()
    assert list(shown["controls"]) == names[2:]
    assert list(shown["answers"][0]["controls"]) == names[2:]


# Kept


def test_a_comparison_is_stored_with_its_controls(tiny_bundle: Any, tmp_path: Path) -> None:
    model, method = tiny_bundle.model, SelfContrast()
    controls, notes = contrast_controls(model, method, number=1)
    found = compare_decoding(
        tiny_bundle, asked(), lambda _: contrasting(model, method), name="self-contrast",
        settings={"rank": None}, controls=controls, notes=notes, max_new_tokens=2,
    )  # fmt: skip
    store_decoding(tmp_path / "s.duckdb", found)
    kept = Store(tmp_path / "s.duckdb").query("SELECT * FROM evaluations")
    assert set(kept["evaluation_id"]) == {found.evaluation_id}
    assert kept["plan_id"].isna().all()
    ours = found.frame.set_index(["condition", "metric"]).sort_index()
    theirs = kept.set_index(["condition", "metric"]).sort_index()
    assert ours.index.equals(theirs.index)
    assert ours[["value", "low", "high"]].equals(theirs[["value", "low", "high"]])
    details = {row["condition"]: json.loads(row["details"]) for row in kept.to_dict("records")}
    assert {one["method"] for one in details.values()} == {"self-contrast"}
    control = details["control:random-rank:0"]
    assert control["settings"]["rank"] == controls[0].settings["rank"]
    assert control["settings"]["max_new_tokens"] == 2
    assert "rank" not in details["unsteered"]["settings"]


def test_the_command_has_controls_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decode(*words: str) -> str:
        line = ["moescope", "decode", "contrast", "demo", "--prompts", "refusal", "--limit", "2",
                "--max-new-tokens", "2", "--seed", "4", *words]  # fmt: skip
        monkeypatch.setattr(sys, "argv", line)
        try:
            main()
        except SystemExit as end:
            assert not end.code
        return capsys.readouterr().out

    store, out = tmp_path / "s.duckdb", tmp_path / "rates.csv"
    shown = json.loads(decode("--json", "--store", str(store), "--out", str(out)))
    conditions = ["unsteered", "steered", "control:random-rank:4", "control:random-rank:5"]
    assert list(dict.fromkeys(row["condition"] for row in shown["rows"])) == conditions
    kept = Store(store).query("SELECT DISTINCT condition FROM evaluations")
    assert set(kept["condition"]) == set(conditions)
    assert "control:random-rank:5" in out.read_text()
    assert "random-rank" not in decode("--controls", "0")
