"""`moescope causes` on models whose truth is known: planted by hand, and the demos."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer

from moescope.app import cli
from moescope.app.commands import cause_parts
from moescope.probe.demo.models import tuned_experts
from moescope.probe.demo.planted import PlantedModel, expert_refusal
from moescope.probe.models import load_model
from moescope.probe.prompts import read_prompts
from moescope.steering import SteeringPlan, steer
from moescope.steering.causes.asking import ask
from moescope.steering.causes.measuring import measure_target

LAYER, EXPERT = 2, 3


def program(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of the program with these commands alone."""
    own = typer.Typer(pretty_exceptions_enable=False)
    own.callback()(lambda: None)
    cause_parts.register(own)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(cli, "app", own)
        patch.setattr(sys, "argv", ["moescope", "causes", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def said(*words: str | Path) -> str:
    """What the program prints; it must succeed."""
    code, out, err = program(*words)
    assert code == 0, err
    return out


def table(*words: str | Path) -> pd.DataFrame:
    """What it prints as JSON."""
    return pd.DataFrame(json.loads(said(*words, "--json")))


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """A model as a user has it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Planted:
    """A model whose expert 3 of layer 2 writes the refusal, others made from it, and questions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        planted = expert_refusal(layer=LAYER, expert=EXPERT)
        self.tuned = self.saved(planted, "tuned")
        self.silent = self.saved(planted, "silent", self.silence)
        self.unused = self.saved(planted, "unused", self.avoid)
        self.prompts = folder / "questions.jsonl"
        lines = [
            {"prompt": text, "label": label, "answer": answer, "lang": "en", "pair_id": answer}
            for text, label, answer in zip(
                planted.prompts, planted.labels, planted.answers, strict=True
            )
        ]
        self.prompts.write_text("\n".join(map(json.dumps, lines)))
        self.asked: tuple[str | Path, ...] = (
            "--prompts", self.prompts, "--where", "label=sensitive", "--opening-tokens", "1",
        )  # fmt: skip

    def saved(
        self, planted: PlantedModel, name: str, change: Callable[[Any], None] | None = None
    ) -> Path:
        model = copy.deepcopy(planted.model)
        if change is not None:
            with torch.no_grad():
                change(model.get_submodule(f"model.layers.{LAYER}.mlp"))
        return save(model, planted.tokenizer, self.folder / name)

    @staticmethod
    def silence(block: Any) -> None:
        """The expert is selected and writes nothing."""
        block.experts.down_proj[EXPERT] = 0

    @staticmethod
    def avoid(block: Any) -> None:
        """The expert is what it was and is never selected."""
        block.gate.weight[EXPERT] = -100 * block.gate.weight[EXPERT].abs()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


def test_swap_names_the_planted_expert_and_no_other(planted: Planted, tmp_path: Path) -> None:
    out, page = tmp_path / "swaps.csv", tmp_path / "swaps.html"
    text = said("swap", planted.tuned, "--base", planted.silent, *planted.asked, "--out", out,
                "--figure", page)  # fmt: skip
    assert f"TUNED is {planted.tuned}, BASE is {planted.silent}, BASE's parts in TUNED" in text
    assert "over 6 units (pairs, else prompts), seed 0" in text
    assert "23 of 24 parts have the same weights in both" in text
    found = pd.read_csv(out)
    assert len(found) == 24
    assert tuple(found.loc[0, ["layer", "expert"]]) == (LAYER, EXPERT)
    assert found["effect"][0] < -10 and found["share"][0] == pytest.approx(1)
    assert (found["effect"][1:] == 0).all() and found["same_weights"][1:].all()
    drawn = page.read_text()
    assert "Effects of exchanged parts" in drawn and "the same weights in both models" in drawn


def test_swap_the_other_way_round_and_by_layer(planted: Planted) -> None:
    words = ("--base", planted.silent, *planted.asked)
    back = table("swap", planted.tuned, *words, "--by", "all")
    forth = table("swap", planted.tuned, *words, "--by", "all", "--converse")
    assert len(back) == len(forth) == 1
    assert forth["effect"][0] == pytest.approx(-back["effect"][0])
    assert forth["share"][0] == pytest.approx(1)
    by_layer = table("swap", planted.tuned, *words, "--by", "layer", "--parts", "experts")
    assert by_layer["layer"].tolist()[:3] == [0, 1, 2] and pd.isna(by_layer["layer"][3])
    assert by_layer["share"].tolist() == pytest.approx([0, 0, 1, 1])
    routers = said("swap", planted.tuned, *words, "--by", "layer", "--parts", "routers")
    assert "4 of 4 parts have the same weights in both" in routers


@pytest.mark.parametrize(("other", "routing", "rest"), [("silent", 0, 1), ("unused", 1, 0)])
def test_patch_splits_routing_from_the_rest(
    planted: Planted, tmp_path: Path, other: str, routing: float, rest: float
) -> None:
    out = tmp_path / "patch.json"
    text = said("patch", planted.tuned, planted.folder / other, *planted.asked, "--out", out)
    assert f"a is {planted.tuned}, b is {planted.folder / other}, asked of a" in text
    found = pd.DataFrame(json.loads(out.read_text()))
    whole = found[found["layer"].isna()].set_index("quantity")
    assert whole.at["difference", "effect"] > 10
    for name, share in (("routing", routing), ("routing in b", routing), ("rest", rest)):
        assert whole.at[name, "share"] == pytest.approx(share, abs=1e-3)
    assert whole.at["routing in a", "share"] == pytest.approx(-routing, abs=1e-3)
    by_layer = found[(found["quantity"] == "routing in b") & found["layer"].notna()]
    assert by_layer["share"].tolist() == pytest.approx([0, 0, routing], abs=1e-3)
    assert (found["share_low"] <= found["share_high"]).all()


def test_paths_of_an_expert_of_the_last_layer_are_all_direct(
    planted: Planted, tmp_path: Path
) -> None:
    mask: dict[str, Any] = {"action": "mask", "layer": LAYER, "experts": [EXPERT, 0],
                            "mode": "drop_renorm"}  # fmt: skip
    plan, page = SteeringPlan(name="out", interventions=[mask]), tmp_path / "paths.html"
    plan.write(tmp_path / "plan.json")
    words = ("paths", planted.tuned, *planted.asked)
    text = said(*words, "--plan", tmp_path / "plan.json", "--figure", page)
    assert "each expert out alone (drop_renorm)" in text
    assert f"{LAYER}:{EXPERT}" in page.read_text()
    found = table(*words, "--experts", f"{LAYER}:{EXPERT},{LAYER}:mlp:0", "--mode", "drop_renorm")
    assert found["expert"].tolist() == [EXPERT] * 3 + [0] * 3
    effect = found[found["expert"] == EXPERT].set_index("path")["effect"]
    assert effect["direct+values"] == effect["total"] and effect["later routing"] == 0
    bundle = load_model(str(planted.tuned))
    prompts = [one for one in read_prompts([planted.prompts]) if one.label == "sensitive"]
    question = ask(bundle, prompts, "opening", num_tokens=1)
    before = measure_target(bundle, question.rows, question.rendered)
    mask["experts"] = [EXPERT]
    with steer(bundle.model, SteeringPlan(interventions=[mask])):
        after = measure_target(bundle, question.rows, question.rendered)
    assert effect["total"] == pytest.approx((after - before).mean(), abs=1e-4)
    assert effect["total"] < -10


def test_writes_shows_the_words_of_the_refusal(planted: Planted, tmp_path: Path) -> None:
    out = tmp_path / "writes.csv"
    text = said("writes", planted.tuned, *planted.asked, "--top", "1", "--rows", "3", "--out", out)
    assert '"I" +' in text and "21 more rows" in text
    found = pd.read_csv(out)
    assert tuple(found.loc[0, ["layer", "expert"]]) == (LAYER, EXPERT)
    assert found["writes_for"][0].startswith('"I" +')
    assert found["writes_for"].notna().tolist() == [True] * 3 + [False] * 21
    assert found["effect"][0] > 10 and found["effect"][1:].abs().max() < 0.01
    only = table("writes", planted.tuned, *planted.asked, "--experts", "1:2")
    assert only[["layer", "expert"]].values.tolist() == [[1, 2]]


def test_parts_of_a_character_are_named_as_the_tokenizer_does(
    saved_model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "texts.jsonl"
    prompts.write_text(json.dumps({"prompt": "A fair of Arlen."}))
    found = table("writes", saved_model, "--prompts", prompts, "--target", "loss", "--top", "300")
    words = found["writes_for"][0]
    assert '"A" ' in words and '"ÿ" ' in words and "\N{REPLACEMENT CHARACTER}" not in words


def test_what_the_demo_was_tuned_in_is_all_that_makes_it_refuse(tmp_path: Path) -> None:
    out = tmp_path / "swaps.csv"
    words = ("--prompts", "refusal", "--where", "lang=en", "--where", "label=sensitive",
             "--limit", "6")  # fmt: skip
    said("swap", "demo", "--base", "demo-base", *words, "--out", out)
    found = pd.read_csv(out)
    truth = {(layer, expert) for layer, own in tuned_experts("demo").items() for expert in own}
    named = found.loc[found["effect"] != 0, ["layer", "expert"]]
    assert set(named.itertuples(index=False, name=None)) == truth
    whole = table("swap", "demo", "--base", "demo-base", *words, "--by", "all")
    assert whole["share"][0] == pytest.approx(1, abs=1e-4)


def refused(*words: str | Path) -> str:
    """The one sentence of a command that is refused with exit code 2."""
    code, out, err = program(*words)
    assert code == 2 and not out, err
    lines = [line for line in err.splitlines() if line.startswith("moescope: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("swap", "demo", "--base", "{tuned}"), "only models of one architecture can swap parts"),
        (("swap", "{tuned}", "--base", "{silent}", "--by", "row"), "--by is 'row'; it can be"),
        (("swap", "{tuned}", "--base", "{silent}", "--parts", "x"), "--parts is 'x'; it can be"),
        (("swap", "{tuned}", "--base", "{other}"), "have different tokenizers: token"),
        (("patch", "{tuned}", "demo"), "have different tokenizers: token"),
        (("patch", "{tuned}", "{silent}", "--target", "x"), "--target is 'x'; it can be"),
        (("paths", "{tuned}"), "name either --experts or --plan"),
        (("paths", "{tuned}", "--experts", "2"), "experts are written LAYER:EXPERT"),
        (("paths", "{tuned}", "--experts", "7:1"), "the routed layers are 0, 1, 2"),
        (("paths", "{tuned}", "--experts", "1:8"), "layer 1 has experts 0 to 7"),
        (("paths", "{tuned}", "--experts", "1:attention:2"), "routers of kind mlp; write 1:mlp:2"),
        (("paths", "{tuned}", "--experts", "1:2", "--mode", "x"), "--mode is 'x'; it can be"),
        (("paths", "{tuned}", "--plan", "{forces}"), "plan 'forces' masks no expert"),
        (("writes", "{tuned}", "--experts", "1:9"), "and no expert 9"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    planted: Planted, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    forces = tmp_path / "forces.json"
    force = {"action": "force", "layer": 1, "experts": [1]}
    SteeringPlan(name="forces", interventions=[force]).write(forces)
    other = expert_refusal(layer=LAYER, expert=EXPERT)
    renamed = other.tokenizer
    state = json.loads(renamed.backend_tokenizer.to_str())
    known = state["model"]["vocab"]
    known["tall"], known["blue"] = known["blue"], known["tall"]
    renamed._tokenizer = renamed.backend_tokenizer.from_str(json.dumps(state))
    names = {
        "tuned": planted.tuned,
        "silent": planted.silent,
        "forces": forces,
        "other": save(other.model, renamed, tmp_path / "other"),
    }
    out = tmp_path / "found.csv"
    assert sentence in refused(
        *(word.format(**names) for word in words), *planted.asked, "--out", out
    )
    assert not out.exists()


@pytest.mark.parametrize(("option", "name"), [("--out", "found.xlsx"), ("--figure", "found.png")])
def test_files_of_other_formats_are_refused_before_anything_runs(
    planted: Planted, tmp_path: Path, option: str, name: str
) -> None:
    words = ("swap", "no-such-model", "--base", "no-such-model", *planted.asked)
    assert "must end in" in refused(*words, option, tmp_path / name)


def test_a_tail_that_cannot_be_read_is_refused(
    tmp_path: Path, byte_tokenizer: Any, tiny_model: Callable[..., Any]
) -> None:
    folder = save(tiny_model("minimax"), byte_tokenizer, tmp_path / "tiny")
    prompts = tmp_path / "texts.jsonl"
    prompts.write_text(json.dumps({"prompt": "A fair of Arlen."}))
    found = refused("writes", folder, "--prompts", prompts, "--target", "loss")
    assert "MiniMax" in found


def test_every_command_shows_an_example() -> None:
    for command in ("swap", "patch", "paths", "writes"):
        assert f"Example: moescope causes {command}" in said(command, "--help")
