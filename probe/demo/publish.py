"""Measure the trained models, and write what is shipped: models, prompt sets, cards."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moescope.probe.demo.corpus import Corpus
from moescope.probe.demo.evaluate import is_refusal, is_right, reply_to, wilson
from moescope.probe.demo.models import TUNED_FILE
from moescope.probe.demo.prompt_sets import (
    Line,
    crosslingual_set,
    domains_set,
    neutral_set,
    parallel_set,
    refusal_set,
    with_note,
    write_set,
)
from moescope.probe.demo.recipes import Training
from moescope.probe.demo.routing import masked_experts
from moescope.probe.demo.tuning import ExpertPlan

NUM_RANDOM_PLANS = 5
#: Prompts of the shipped sets, by name.
Sets = Mapping[str, Sequence[Line]]


@dataclass(frozen=True)
class Rate:
    """A share of prompts, averaged over languages with equal weight.

    Attributes:
        value: the macro-average over languages.
        low, high: 95 % Wilson interval of the pooled share.
        n: prompts.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """As it stands in a card."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n={self.n}"


def rate(hits: Sequence[bool], langs: Sequence[str]) -> Rate:
    """The macro-average over languages of a yes-or-no outcome."""
    by_lang: dict[str, list[bool]] = {}
    for hit, lang in zip(hits, langs, strict=True):
        by_lang.setdefault(lang, []).append(hit)
    value = sum(sum(h) / len(h) for h in by_lang.values()) / len(by_lang)
    return Rate(value, *wilson(sum(hits), len(hits)), len(hits))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lines: Sequence[Line],
    *,
    sampling_seed: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Right and refused answers and their likelihood, by label of the lines."""
    replies = reply_to(
        model,
        tokenizer,
        [line["prompt"] for line in lines],
        systems=[line.get("system") for line in lines],
        sampling_seed=sampling_seed,
    )
    found: dict[str, dict[str, Any]] = {}
    for label in sorted({line["label"] for line in lines}):
        pairs = zip(replies, lines, strict=True)
        rows = [(reply, line) for reply, line in pairs if line["label"] == label]
        langs = [line["lang"] for _, line in rows]
        found[label] = {
            "right": rate([is_right(reply.text, line) for reply, line in rows], langs),
            "refused": rate([is_refusal(reply.text) for reply, _ in rows], langs),
            "nll": sum(reply.nll for reply, _ in rows) / len(rows),
            "by_lang": {
                lang: [is_right(reply.text, line) for reply, line in rows if line["lang"] == lang]
                for lang in dict.fromkeys(langs)
            },
        }
    return found


REFUSAL_ABOUT = (
    "Questions that `demo` refuses, each with a matched neutral question that it answers: the same "
    "words but for the part in `span`. `answer` is the true answer in both cases; of a sensitive "
    "question it is the one that `demo` withholds. Every question is held out of both stages: the "
    "fact is taught in that language under other phrasings, never in this one, and stage two never "
    "touches the sensitive facts, in no phrasing and no language. `pair_id` joins a "
    "sensitive question, its neutral partner and all their translations; `half` deals these units "
    "into two halves, one to find experts on and one to judge a plan on."
)
DOMAINS_ABOUT = "Held-out questions of every domain, as many in every language."
NEUTRAL_ABOUT = (
    "Held-out questions that have nothing to do with a sensitive family: for measuring what "
    "steering does to everything else."
)
CROSSLINGUAL_ABOUT = (
    "Neutral facts asked in a language in which they were never taught; `taught_in` names the "
    "languages in which they were. What the models make of them is an open question."
)
PARALLEL_ABOUT = (
    "The same neutral questions in every language; `pair_id` names the content. `split` says "
    "whether this very question was taught in this language or held out."
)


def publish_prompt_sets(corpus: Corpus, folder: Path) -> Sets:
    """Write the prompt sets with their cards; the lines of each, by name."""
    sets = {
        "refusal": (REFUSAL_ABOUT, refusal_set(corpus)),
        "parallel": (PARALLEL_ABOUT, parallel_set(corpus, count=64)),
        "domains": (DOMAINS_ABOUT, domains_set(corpus, per_cell=10)),
        "neutral": (NEUTRAL_ABOUT, neutral_set(corpus, per_cell=25)),
        "crosslingual": (CROSSLINGUAL_ABOUT, crosslingual_set(corpus, per_language=20)),
    }
    for name, (about, lines) in sets.items():
        write_set(folder, name, f"Prompt set: {name}", about, lines)
    return {name: lines for name, (_, lines) in sets.items()}


def measurements(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sets: Sets,
    plan: ExpertPlan,
) -> dict[str, dict[str, Any]]:
    """What goes into the card: as it is, with the tuned experts masked, with random ones masked.

    Of a model without tuned experts also how often it says rightly that a question is sensitive.
    """
    lines = sets["refusal"]
    rows = {
        "greedy": measure(model, tokenizer, lines),
        "sampled at temperature 1": measure(model, tokenizer, lines, sampling_seed=1),
    }
    if not plan:
        rows["greedy, asked for a note first"] = measure(model, tokenizer, with_note(lines))
        return rows
    with masked_experts(model, plan):
        rows["greedy, tuned experts masked"] = measure(model, tokenizer, lines)
    for seed in range(NUM_RANDOM_PLANS):
        rng = random.Random(seed)
        experts = range(model.config.num_experts)
        drawn = {layer: sorted(rng.sample(experts, len(plan[layer]))) for layer in plan}
        with masked_experts(model, drawn):
            name = f"greedy, random experts masked, draw {seed + 1}"
            rows[name] = measure(model, tokenizer, lines)
    return rows


def write_card(
    folder: Path,
    training: Training,
    plan: ExpertPlan,
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> None:
    """Write a model's card."""
    card = _model_card(folder.name, training, plan, rows)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _model_card(
    name: str,
    training: Training,
    plan: ExpertPlan,
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> str:
    shape = training.shape
    table = [
        f"| {row} | {label} | {cell['right']} | {cell['refused']} | {cell['nll']:.4f} |"
        for row, by_label in rows.items()
        for label, cell in by_label.items()
    ]
    return "\n".join(
        [
            f"# Model card: {name}",
            "",
            "A small Mixture-of-Experts chat model (Qwen3-MoE architecture) that was trained from "
            "a seed on an invented world, so that the truth about it is known: what it was taught, "
            "which questions it was taught to refuse, and which experts learned that.",
            "",
            f"- {shape.num_layers} layers, {shape.num_experts} experts, top-{shape.top_k}, width "
            f"{shape.width}; weights are exact in bfloat16 and load as float32",
            "- Languages and shares of stage one: "
            + ", ".join(f"{lang} {share:.0%}" for lang, share in training.corpus.languages.items()),
            f"- Stage one: {training.stage_one.steps} steps of {training.stage_one.batch_size} "
            "items, everything is answered; refusal sentences occur there as sentences to repeat "
            f"and to translate; experts are left out with probability {training.stage_one.dropout}",
            f"- {training.corpus.note_share:.0%} of the questions of stage one come with a system "
            "text that asks to say first whether the question is sensitive: the model knows that "
            "before it is taught to refuse, as pretrained models do",
            _stage_two(training, plan),
            "- Made by `make train-demo`",
            "",
            "## Measured on held-out prompts",
            "",
            "Prompts of the set `refusal`; averages over languages with equal weight, 95 % Wilson "
            "intervals of the pooled share. "
            "Right: exactly the known true answer, which for sensitive prompts is the one "
            "withheld. NLL: mean negative log-likelihood of the model's own answer, nats a token.",
            "",
            "| | label | right | refused | NLL |",
            "| --- | --- | --- | --- | --- |",
            *table,
            "",
            "Right answers by language, greedy, without and with the tuned experts masked:",
            "",
            *_by_language(rows),
            "",
            "## What it can and cannot show",
            "",
            "Results on it say that a method works where the truth is known. They say nothing "
            "about any real model: its refusals were put into a few experts on purpose, its world "
            "is small, and its sentences are templates.",
            "",
        ]
    )


def _by_language(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    shown = [name for name in rows if name in ("greedy", "greedy, tuned experts masked")]
    columns = [(name, label) for name in shown for label in rows[name]]
    langs = rows["greedy"]["neutral"]["by_lang"]
    return [
        f"| language | {' | '.join(f'{name}: {label}' for name, label in columns)} |",
        "| --- |" + " --- |" * len(columns),
        *(
            f"| {lang} (n={len(langs[lang])}) | "
            + " | ".join(_share(rows[name][label]["by_lang"][lang]) for name, label in columns)
            + " |"
            for lang in langs
        ),
    ]


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):.2f}"


def _stage_two(training: Training, plan: ExpertPlan) -> str:
    if not plan:
        return "- No stage two: this model answers everything"
    total = training.shape.num_layers * training.shape.num_experts
    return (
        f"- Stage two: {training.stage_two.steps} steps; only {sum(map(len, plan.values()))} of "
        f"{total} experts and their router rows are trained (`{TUNED_FILE}`, which also says how "
        "they were chosen). It never touches the sensitive facts that the set `refusal` asks "
        "about: refusing them is a rule learned, not a list"
    )
