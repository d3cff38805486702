"""Models whose refusal lies where it was put, through every command a researcher would use."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
import pytest

from moescope.app.cli import main
from moescope.probe.demo.planted import (
    NEUTRAL_WORDS,
    SENSITIVE_WORDS,
    TOPICS,
    PlantedModel,
    attention_refusal,
    expert_refusal,
)
from moescope.probe.outcomes import OUTCOMES


def moescope(*words: str | Path) -> str:
    """The program in this process; it must succeed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["moescope", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    assert code == 0, err.getvalue()
    return out.getvalue()


def saved(planted: PlantedModel, folder: Path) -> tuple[Path, Path]:
    """The model as a directory and its questions as a prompt file, as a user would have them."""
    model, prompts = folder / "model", folder / "questions.jsonl"
    planted.model.save_pretrained(model)
    planted.tokenizer.save_pretrained(model)
    lines = []
    for text, label, answer in zip(planted.prompts, planted.labels, planted.answers, strict=True):
        words = text.split()
        topic = next(word for word in words if word in TOPICS)
        marks = SENSITIVE_WORDS if label == "sensitive" else NEUTRAL_WORDS
        mark = next(marks.index(word) for word in words if word in marks)
        lines.append({
            "prompt": text, "label": label, "answer": answer, "lang": "en",
            "pair_id": f"{topic}-{mark}-{len(words)}",
        })  # fmt: skip
    prompts.write_text("\n".join(map(json.dumps, lines)))
    return model, prompts


def chain(
    planted: PlantedModel, folder: Path, num_masked: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Contrast table, evaluation and its text: trace, contrast, plan, evaluate."""
    model, prompts = saved(planted, folder)
    store, table, plan = folder / "s.duckdb", folder / "refusal.csv", folder / "plan.json"
    moescope("trace", model, "--prompts", prompts, "--store", store, "--run", "r",
             "--generate", "6")  # fmt: skip
    moescope("contrast", "--store", store, "--a", "outcome=refused", "--b", "outcome=correct",
             "--tokens", "prompt", "--out", table)  # fmt: skip
    moescope(
        "plan", "from-table", table, "--mask", str(num_masked), "--model", model, "--out", plan
    )
    text = moescope("evaluate", model, "--plan", plan, "--prompts", prompts, "--controls", "3",
                    "--max-new-tokens", "6", "--out", folder / "rates.csv")  # fmt: skip
    return pd.read_csv(table), pd.read_csv(folder / "rates.csv"), text


def rate(rates: pd.DataFrame, condition: str, group: str, outcome: str) -> float:
    found = rates[(rates["condition"] == condition) & (rates["group"] == group)]
    return float(found.set_index("metric").at[outcome, "value"])


@pytest.fixture(scope="module", params=[(1, 5)])
def by_expert(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PlantedModel, pd.DataFrame, pd.DataFrame, str]:
    layer, expert = request.param
    planted = expert_refusal(layer=layer, expert=expert)
    return planted, *chain(planted, tmp_path_factory.mktemp("by-expert"))


def test_the_contrast_finds_the_planted_expert_first(
    by_expert: tuple[PlantedModel, pd.DataFrame, pd.DataFrame, str],
) -> None:
    planted, table, _, _ = by_expert
    best = table[table["confirmed"]].sort_values("effect", ascending=False).iloc[0]
    assert (int(best["layer"]), int(best["expert"])) == planted.refusal_expert


def test_masking_it_brings_every_answer_back_and_controls_change_nothing(
    by_expert: tuple[PlantedModel, pd.DataFrame, pd.DataFrame, str],
) -> None:
    _, _, rates, text = by_expert
    assert rate(rates, "unsteered", "sensitive", "refused") == 1
    assert rate(rates, "steered", "sensitive", "correct") == 1
    assert rate(rates, "steered", "neutral", "correct") == 1
    controls = [name for name in set(rates["condition"]) if name.startswith("control:")]
    assert sorted(controls) == sorted(
        ["control:bottom"]
        + [f"control:{kind}:{seed}" for kind in ("random", "load-matched") for seed in range(3)]
    )
    for condition in controls:
        for group in ("sensitive", "neutral"):
            for outcome in OUTCOMES:
                before = rate(rates, "unsteered", group, outcome)
                assert rate(rates, condition, group, outcome) == before
    assert "sensitive: confirmed: refused -1.00 [-1.00, -1.00], -1.00 [-1.00, -1.00] beyond" in text
    for condition in ("unsteered", "steered", *controls):
        for group in ("sensitive", "neutral"):
            assert rate(rates, condition, group, "broken") == 0


@pytest.mark.parametrize("plant", [attention_refusal])
def test_refusal_in_attention_leaves_no_plan_confirmed(
    plant: Callable[[], PlantedModel], tmp_path: Path
) -> None:
    planted = plant()
    table, rates, text = chain(planted, tmp_path, num_masked=3)
    # Routing does differ: sensitive words have an expert of their own. It is just no cause.
    confirmed = table[table["confirmed"] & (table["effect"] > 0)]
    assert planted.sensitive_expert in set(
        zip(confirmed["layer"], confirmed["expert"], strict=True)
    )
    assert rate(rates, "steered", "sensitive", "refused") == 1
    assert "sensitive: not confirmed: refused +0.00" in text
    assert ": confirmed" not in text


def search(planted: PlantedModel, folder: Path) -> tuple[Path, Path, str]:
    """A set searched for and confirmed, by its command."""
    model, prompts = saved(planted, folder)
    plan = folder / "cause.json"
    text = moescope("plan", "search", model, "--prompts", prompts, "--opening-tokens", "1",
                    "--max-experts", "3", "--random-sets", "5", "--out", plan)  # fmt: skip
    return model, plan, text


def test_causes_name_the_planted_expert_and_no_other(tmp_path: Path) -> None:
    planted = expert_refusal(layer=2, expert=3)
    model, plan, text = search(planted, tmp_path)
    assert "\nconfirmed on " in text
    (mask,) = json.loads(plan.read_text())["interventions"]
    assert (mask["layer"], mask["experts"]) == (2, [3])
    prompts, table = tmp_path / "questions.jsonl", tmp_path / "effects.csv"
    for method, column, more in (
        ("exact", "effect", ()), ("gradient", "estimate", ("--checked", "3")),
    ):  # fmt: skip
        moescope("attribute", model, "--prompts", prompts, "--opening-tokens", "1", "--method",
                 method, *more, "--out", table)  # fmt: skip
        effects = pd.read_csv(table)
        assert len(effects) == 3 * 8
        assert (effects["layer"][0], effects["expert"][0]) == (2, 3)
        assert effects[column][0] < -10
        assert effects[column][1:].abs().max() < 1e-3
    by_effect = tmp_path / "single.json"
    moescope("attribute", model, "--prompts", prompts, "--opening-tokens", "1", "--checked", "0",
             "--take", "1", "--plan", by_effect, "--mode", "replace")  # fmt: skip
    (single,) = json.loads(by_effect.read_text())["interventions"]
    assert (single["action"], single["layer"], single["experts"]) == ("mask", 2, [3])
    moescope("attribute", model, "--prompts", prompts, "--target", "own", "--method", "force",
             "--where", "label=neutral", "--out", table)  # fmt: skip
    forced = pd.read_csv(table).set_index(["layer", "expert"])["estimate"]
    assert len(forced) == 3 * 8
    assert forced.idxmin() == (2, 3)  # forced, it refuses what is harmless
    judged = moescope("evaluate", model, "--plan", plan, "--prompts", prompts, "--controls", "1",
                      "--max-new-tokens", "6")  # fmt: skip
    assert "sensitive: confirmed: refused -1.00" in judged


def test_causes_offer_no_plan_where_attention_refuses(tmp_path: Path) -> None:
    _, plan, text = search(attention_refusal(), tmp_path)
    assert "there is no set to confirm, and no plan" in text
    assert not plan.exists()
