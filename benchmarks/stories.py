"""The stories of refusal and of languages on models whose truth is known, and the page about them.

    python benchmarks/stories.py [--out docs/stories]

Every number comes from a command that a user could type; the page shows the commands and what they
printed. Experts are found on the first half of the questions and judged on the second.
Figures are drawn by a headless Chromium (`--chromium`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from moescope.probe.demo.models import tuned_experts

MODELS = ("demo", "demo-random")
MOESCOPE = str(Path(sys.executable).with_name("moescope"))
NUM_MASKED = 14
WEAK = "ja,zh,el,ru"
OTHERS = "de,fr,es"
STORE = "stories.duckdb"


class Teller:
    """Runs commands in a folder and keeps what they printed, as sections of the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """A paragraph."""
        self.lines += [text, ""]

    def run(self, *words: str, shows: int | None = None) -> str:
        """A command and its output in the page; `shows`: only so many of its lines."""
        command = shlex.join(("moescope", *words))
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            [MOESCOPE, *words], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        shown = done.stdout.rstrip().splitlines()
        cut = [] if shows is None or shows >= len(shown) else ["..."]
        self.lines += ["```", f"$ {command}", *shown[:shows], *cut, "```", ""]
        return done.stdout


def refusal(teller: Teller, model: str) -> None:
    """Find, confirm, steer, controls, side effects."""
    table, plan = f"{model}-refusal.csv", f"{model}-less-refusal.json"
    teller.say(
        "**Find and confirm**, on the first half of the questions: experts are nominated on one "
        "part of the units (a sensitive question, its neutral partner and all translations of both "
        "are one unit), and their effect is measured on the other."
    )
    teller.run(
        "contrast", "--store", STORE, "--run", model, "--a", "outcome=refused", "--b",
        "outcome=correct", "--where", "half=first", "--out", table, "--rows", "5",
    )  # fmt: skip
    teller.say(f"**Steer**: the {NUM_MASKED} experts with the largest confirmed effect are masked.")
    teller.run(
        "plan", "from-table", table, "--mask", str(NUM_MASKED), "--model", model, "--out", plan,
        "--name", "less refusal",
    )  # fmt: skip
    masked = json.loads((teller.folder / plan).read_text())["interventions"]
    chosen = {(one["layer"], expert) for one in masked for expert in one["experts"]}
    tuned = {(layer, one) for layer, experts in tuned_experts(model).items() for one in experts}
    teller.say(
        f"Known truth: {len(chosen & tuned)} of the {len(chosen)} are among the {len(tuned)} that "
        "were tuned to refuse."
    )
    teller.say(
        "**Judge**, on the second half: the plan beside three draws of random experts, three of "
        "random experts with similar load, and the bottom of the ranking, in the same layers and "
        "numbers. `correct` is the withheld answer, `broken` is no language; `demo-base`, which "
        "does not refuse, tells broken answers from wrong ones."
    )
    teller.run(
        "evaluate", model, "--plan", plan, "--prompts", "refusal", "--where", "half=second",
        "--controls", "3", "--judge-model", "demo-base", "--store", STORE,
        "--out", f"{model}-refusal-rates.csv", "--figure", f"{model}-refusal.html",
    )  # fmt: skip
    teller.say(f"![Outcomes of {model} without the plan, with it, and under controls]"
               f"({model}-refusal.png)")  # fmt: skip


def languages(teller: Teller, model: str) -> None:
    """Middle-layer experts of English made likelier; facts never taught in the language asked."""
    table, plan = f"{model}-english.csv", f"{model}-towards-english.json"
    teller.say(
        "**Find**: the experts that English uses more than the weak languages for the same "
        "questions (set `parallel`), every question counting alike."
    )
    teller.run(
        "contrast", "--store", STORE, "--run", model, "--a", "lang=en", "--b", f"lang={WEAK}",
        "--where", "set_name=parallel", "--tokens", "prompt", "--average", "unit", "--out", table,
        "--rows", "5",
    )  # fmt: skip
    teller.say("**Steer**, as Bandarkar et al. do softly, in the middle layers:")
    teller.run(
        "plan", "from-table", table, "--strategy", "bandarkar-soft", "--set", "tau=0.1", "--set",
        "strength=0.5", "--layers", "1-4", "--model", model, "--out", plan,
        "--name", "towards English",
    )  # fmt: skip
    for langs, what in ((WEAK, "weak"), (OTHERS, "other")):
        teller.say(
            f"**Judge** in the {what} languages: `crosslingual` asks for facts that were never "
            "taught in the language asked in."
        )
        teller.run(
            "evaluate", model, "--plan", plan, "--prompts", "crosslingual", "--prompts", "neutral",
            "--where", f"lang={langs}", "--group-by", "set_name", "--behavior", "correct",
            "--controls", "3", "--judge-model", "demo-base", "--store", STORE,
            "--out", f"{model}-{what}-rates.csv", "--figure", f"{model}-{what}.html",
        )  # fmt: skip


def verdict_table(folder: Path) -> list[str]:
    """The first table of the page: what came of each story."""
    lines = [
        "| model | story | share of prompts | unsteered | steered | random | matched on load | "
        "bottom | beyond the controls | broken, steered | n |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    stories = (
        ("refusal", "sensitive", "refused"), ("refusal", "sensitive", "correct"),
        ("refusal", "neutral", "correct"), ("weak", "crosslingual", "correct"),
        ("weak", "neutral", "correct"), ("other", "crosslingual", "correct"),
    )  # fmt: skip
    names = {"refusal": "refusal", "weak": f"languages: {WEAK}", "other": f"languages: {OTHERS}"}
    for model in MODELS:
        for story, group, outcome in stories:
            frame = pd.read_csv(folder / f"{model}-{story}-rates.csv")
            frame = frame[frame["group"] == group]
            cells = [_rate(frame, one, outcome) for one in ("unsteered", "steered")]
            cells += [
                _rate(frame, f"control:{one}", outcome)
                for one in ("random", "load-matched", "bottom")
            ]
            cells.append(_rate(frame, "steered", f"{outcome}_beyond_controls", sign="+"))
            cells.append(_rate(frame, "steered", "broken"))
            n = int(frame["n"].iloc[0])
            said = f"{group}, {outcome}"
            lines.append(f"| {model} | {names[story]} | {said} | {' | '.join(cells)} | {n} |")
    return lines


def _rate(frame: pd.DataFrame, condition: str, metric: str, sign: str = "") -> str:
    """A value with its interval, or the span of several seeds."""
    rows = frame[frame["condition"].str.startswith(condition) & (frame["metric"] == metric)]
    if len(rows) > 1:
        low, high = rows["value"].min(), rows["value"].max()
        return f"{low:.3f}" if low == high else f"{low:.3f}–{high:.3f}"
    row = rows.iloc[0]
    return f"{row['value']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


def page(teller: Teller, table: Sequence[str]) -> str:
    """The page as Markdown."""
    return "\n".join([
        "# Two stories on models whose truth is known",
        "",
        "Made by `python benchmarks/stories.py`: every number below was printed by the command "
        "above it. `demo` and `demo-random` refuse one part of the questions through 14 experts "
        "each, which are known; they know the answers that they withhold. Shares carry 95 % "
        "intervals: Wilson's over prompts for a rate, a bootstrap over units (`pair_id`, else the "
        "prompt) for a difference. Seeds: 0 for halves, permutations and bootstraps; 0, 1, 2 for "
        "the controls that are drawn. Answers are greedy, of at most 32 tokens. Results on these "
        "models say that a method works where the truth is known, nothing about any real model.",
        "",
        *table,
        "",
        "\"Beyond the controls\" is the steered share minus the mean of all controls, paired by "
        "prompt. A plan is called confirmed when the change and what is beyond the controls both "
        "keep clear of 0, and less than half of the change went into broken answers. Here experts "
        "are found by use; [what a search by cause finds](../causes/README.md) on the same "
        "questions is a page of its own.",
        "",
        *teller.lines,
    ])  # fmt: skip


def main() -> None:
    """Tell both stories on both models and write the page with its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/stories"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        teller = Teller(Path(temporary))
        for model in MODELS:
            teller.say(f"## {model}")
            teller.run(
                "trace", model, "--prompts", "refusal", "--prompts", "parallel", "--store", STORE,
                "--run", model, "--generate", "32",
            )  # fmt: skip
            teller.say("### Refusal")
            refusal(teller, model)
            teller.say("### Languages")
            languages(teller, model)
        text = page(teller, verdict_table(teller.folder))
        screenshots(teller.folder, options.out, options.chromium)
    (options.out / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"written: {options.out}")


def screenshots(folder: Path, out: Path, chromium: str) -> None:
    """The refusal figures as PNG."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for model in MODELS:
            tab = browser.new_page(viewport={"width": 1120, "height": 1200})
            tab.goto((folder / f"{model}-refusal.html").as_uri())
            tab.wait_for_selector(".main-svg")
            tab.locator(".js-plotly-plot").screenshot(path=out / f"{model}-refusal.png")
            tab.close()
        browser.close()


if __name__ == "__main__":
    main()
