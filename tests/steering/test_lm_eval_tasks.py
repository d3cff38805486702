"""Tasks made of prompt sets, and the command `lm-eval` with what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moescope.app.commands import harness
from moescope.probe.errors import InputError
from moescope.probe.prompts import Prompt, read_prompts
from moescope.probe.storage.store import Store
from moescope.steering import SteeringPlan
from moescope.steering.harness_prompts import write_prompt_tasks
from moescope.steering.harness_tasks import load_tasks

pytest.importorskip("lm_eval", reason="needs the extra: pip install 'moescope[lm-eval]'")

PLAN = SteeringPlan(interventions=[{"action": "mask", "layer": 2, "experts": [7, 10, 11]}])


def english(num_pairs: int) -> list[Prompt]:
    found = [one for one in read_prompts(["refusal"]) if one.lang == "en"]
    return found[: 2 * num_pairs]


def test_tasks_of_prompts_hold_the_right_answer_among_others(tmp_path: Path) -> None:
    prompts = english(20)
    names = write_prompt_tasks(prompts, tmp_path, num_choices=3, seed=5)
    assert sorted(names) == [
        "refusal_neutral_answer", "refusal_neutral_choice",
        "refusal_sensitive_answer", "refusal_sensitive_choice",
    ]  # fmt: skip
    first = (tmp_path / "refusal_sensitive.jsonl").read_text()
    documents = [json.loads(line) for line in first.splitlines()]
    answers = {prompt.expected for prompt in prompts}
    by_key = {prompt.key: prompt for prompt in prompts}
    for one in documents:
        assert len({choice.casefold() for choice in one["choices"]}) == 3
        assert one["choices"][one["right"]] == one["answer"] == by_key[one["id"]].expected
        assert set(one["choices"]) <= answers
        assert one["pair_id"] == by_key[one["id"]].pair_id
    assert len({one["right"] for one in documents}) == 3
    write_prompt_tasks(prompts, tmp_path, num_choices=3, seed=5)
    assert (tmp_path / "refusal_sensitive.jsonl").read_text() == first
    write_prompt_tasks(prompts, tmp_path, num_choices=3, seed=6)
    assert (tmp_path / "refusal_sensitive.jsonl").read_text() != first


def test_wrong_choices_come_from_the_same_language_and_domain(tmp_path: Path) -> None:
    def made(number: int, answer: str, lang: str, domain: str) -> Prompt:
        return Prompt(
            prompt_id=number,
            text="?",
            set_name="my set!",
            expected=answer,
            lang=lang,
            domain=domain,
        )

    prompts = [
        made(0, "red", "en", "x"), made(1, "blue", "en", "x"), made(2, "green", "en", "y"),
        made(3, "rot", "de", "x"), made(4, "RED", "en", "x"),
    ]  # fmt: skip
    assert write_prompt_tasks(prompts, tmp_path, num_choices=2) == [
        "my_set_choice", "my_set_answer",
    ]  # fmt: skip
    lines = (tmp_path / "my_set.jsonl").read_text().splitlines()
    choices = [set(json.loads(line)["choices"]) for line in lines]
    assert choices[:2] == [{"red", "blue"}, {"blue", "red"}]  # the same answer is written twice
    assert choices[2] in ({"green", "red"}, {"green", "blue"})
    assert "rot" in choices[3]
    assert choices[4] == {"RED", "blue"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expected": None}, "field 'answer'"),
        ({"expected": "same"}, "same answer 'same'"),
        (
            {"messages": ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})},
            "turns",
        ),
    ],
)
def test_prompts_that_make_no_task_are_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    prompts = [replace(prompt, **change) for prompt in english(2)]
    with pytest.raises(InputError, match=said):
        write_prompt_tasks(prompts, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def run_command(*arguments: str) -> Any:
    app = typer.Typer()
    harness.register(app)
    return CliRunner().invoke(app, ["demo", *arguments])


def test_the_command_runs_a_set_and_writes_what_it_prints(tmp_path: Path) -> None:
    plan, out, store = tmp_path / "p.json", tmp_path / "o.csv", tmp_path / "s.duckdb"
    plan.write_text(PLAN.to_json())
    found = run_command(
        "--plan", str(plan), "--prompts", "refusal", "--where", "lang=en", "--limit", "2",
        "--keep-tasks", str(tmp_path / "kept"), "--out", str(out), "--store", str(store), "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.exception
    content = json.loads(found.stdout)
    assert {row["condition"] for row in content["rows"]} == {
        "unsteered", "steered", "control:random:0",
    }  # fmt: skip
    assert content["achieved"]["steered"]["share"] == 1
    assert content["context"]["limit"] == 2
    assert len(out.read_text().splitlines()) == 1 + len(content["rows"])
    assert len(Store(store).query("SELECT * FROM evaluations WHERE metric = 'acc'")) == 6
    kept = run_command(
        "--tasks", "refusal_neutral_choice", "--include", str(tmp_path / "kept"), "--limit", "2",
        "--chat-template", "off",
    )  # fmt: skip
    assert kept.exit_code == 0, kept.exception
    header, *rows = kept.stdout.splitlines()
    assert header.split()[:4] == ["task", "metric", "condition", "value"]
    assert [row.split()[2] for row in rows] == ["unsteered", "unsteered"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name tasks with --tasks"),
        (["--tasks", "a", "--where", "lang=en"], "--prompts"),
        (["--prompts", "refusal", "--num-fewshot", "2"], "--num-fewshot"),
        (["--tasks", "a", "--out", "x.txt"], ".json or .csv"),
        (["--tasks", "a", "--out", "nowhere/x.csv"], "no folder"),
        (["--tasks", "a", "--include", "nowhere"], "nowhere is no folder"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(arguments: list[str], said: str) -> None:
    found = run_command(*arguments)
    assert isinstance(found.exception, InputError)
    assert said in str(found.exception)


def test_an_unknown_task_is_answered_with_near_names() -> None:
    with pytest.raises(InputError, match=r"no task 'hellaswagg'; near it: .*hellaswag"):
        load_tasks(["hellaswagg"])


def test_without_the_extra_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python does for what is not there
    found = run_command("--tasks", "x")
    assert isinstance(found.exception, InputError)
    assert "pip install 'moescope[lm-eval]'" in str(found.exception)
