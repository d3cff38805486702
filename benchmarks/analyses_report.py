"""What every analysis says about the shipped demo models: table, figure and one sentence each.

    python benchmarks/analyses_report.py [--out docs/analyses] [--store out/known-truth.duckdb]

Uses the runs of `known_truth.py` (made when they are not there) and asks each question as the
command line would. Sentences are made from the numbers of the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from analyses_sentences import (
    RUN,
    of_balance,
    of_coactivation,
    of_contrast,
    of_delta,
    of_drift,
    of_esft,
    of_information,
    of_languages,
    of_load,
    of_loss,
    of_pairs,
    of_partners,
    of_saturation,
    of_scores,
    of_specialization,
    of_strength,
    of_transitions,
    of_vocabulary,
    of_words,
)
from known_truth import record, save_figures

from moescope.probe import Store
from moescope.probe.analysis import AnalysisTable, Filters, find_analysis
from moescope.probe.figures import drawings_of

Sentence = Callable[[AnalysisTable], str]
PARALLEL, DOMAINS = {"set_name": ("parallel",)}, {"set_name": ("domains",)}
REFUSAL = {"set_name": ("refusal",)}
MOST_ROWS, MOST_COLUMNS = 6, 9


@dataclass(frozen=True)
class Section:
    """One question of the report.

    Attributes:
        analysis: its name.
        typed: parameters as typed on the command line.
        says: the sentence, from the table.
        columns: those of the table that are shown.
        fields: prompts kept.
        tokens: scope; the analysis' own without it.
        drawing: which of its drawings, and the choices it is given.
        heading: where one analysis is asked twice.
        order: column by which rows are shown, largest first; in the table's order without it.
    """

    analysis: str
    typed: Mapping[str, Any]
    says: Sentence
    columns: tuple[str, ...]
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: str | None = None
    drawing: int = 0
    choices: Mapping[str, Any] = field(default_factory=dict)
    heading: str = ""
    order: str | None = None

    @property
    def title(self) -> str:
        """The heading of the section."""
        return self.heading or find_analysis(self.analysis).title

    @property
    def stem(self) -> str:
        """The name of its figure."""
        kept = "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())
        return "-".join(part for part in kept.split("-") if part)

    def filters(self) -> Filters:
        """Which prompts and tokens count."""
        base = find_analysis(self.analysis).filters
        scope = base.tokens if self.tokens is None else self.tokens
        return Filters(tokens=scope, fields=dict(self.fields))

    def table(self, store: Store) -> AnalysisTable:
        """The answer."""
        analysis = find_analysis(self.analysis)
        arguments = analysis.parse(self.typed)
        return analysis.function(store, RUN, filters=self.filters(), **arguments)

    def command(self) -> str:
        """The same question on the command line."""
        words = [f"moescope analyze {self.analysis} --store STORE --run {RUN}"]
        for name, value in self.typed.items():
            for text in [value] if isinstance(value, str) else value:
                words.append(f"--{name.replace('_', '-')} {text}")
        words += [f"--where {name}={','.join(values)}" for name, values in self.fields.items()]
        words += [] if self.tokens is None else [f"--tokens {self.tokens}"]
        return " ".join(words)


def main() -> None:
    """Ask, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/analyses"))
    parser.add_argument("--store", type=Path, default=Path("out/known-truth.duckdb"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    store = Store(options.store) if options.store.is_file() else record(options.store)[0]
    options.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, go.Figure] = {}
    parts = [HEAD]
    for section in SECTIONS:
        table = section.table(store)
        drawing = drawings_of(table)[section.drawing]
        figures[section.stem] = drawing(table, **section.choices)
        parts.append(text_of(section, table))
        print(section.title, flush=True)
    save_figures(figures, options.out, options.chromium)
    (options.out / "README.md").write_text("\n".join(parts), encoding="utf-8")
    print(f"written: {options.out}")


HEAD = """# What the analyses say about the demo model

Every question of `moescope analyze`, asked of the shipped model `demo` on the shipped prompt sets.
Made by `python benchmarks/analyses_report.py`; sentences are made from the numbers, and each
command gives the whole table (`--out`) and its figures (`--figure`). Intervals are 95 %, over
units: a question with all its translations and phrasings is one unit. What is known about the
model is in [its card](../../datasets/models/demo/README.md); results on it say that a method works
where the truth is known, and nothing about any other model.
"""


def text_of(section: Section, table: AnalysisTable) -> str:
    """Heading, question, sentence, figure, first rows, command."""
    context = table.context
    question = find_analysis(section.analysis).question
    return (
        f"## {section.title}\n\n*{question}*\n\n{section.says(table)}\n\n"
        f"![{section.title}]({section.stem}.png)\n\n{rows_of(section, table)}\n\n"
        f"{len(table.frame):,} rows; {context.num_prompts:,} prompts, {context.num_tokens:,} "
        f"tokens; {context.selection}.\n\n```\n{section.command()}\n```\n"
    )


def rows_of(section: Section, table: AnalysisTable) -> str:
    """The first rows as a table of text."""
    frame = table.frame
    if section.order is not None:
        frame = frame.sort_values(section.order, ascending=False, kind="stable")
    frame = frame[list(section.columns)].head(MOST_ROWS)
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    lines += [
        "| " + " | ".join(cell(value) for value in row) + " |" for row in frame.to_numpy(object)
    ]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as text."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"`{value}`" if isinstance(value, str) and value.strip() != value else str(value)


BASE = ("layer", "expert")
SECTIONS = (
    Section("load", {}, of_load,
            (*BASE, "load", "token_share", "chance", "importance", "num_tokens"),
            order="token_share"),
    Section("balance", {}, of_balance,
            ("layer", "usage_entropy", "gini", "gini_chance", "imbalance", "never_used",
             "top_expert", "num_tokens")),
    Section("balance-loss", {}, of_loss,
            ("layer", "loss_sequence", "loss_batch", "loss_corpus", "loss_balanced", "gap",
             "gap_low", "gap_high", "num_units")),
    Section("specialization", {"by": "domain"}, of_specialization,
            ("value", *BASE, "token_share", "low", "high", "chance", "composition", "lift"),
            fields=DOMAINS, drawing=2, heading="Specialization by domain", order="composition"),
    Section("specialization", {"by": "lang"}, of_specialization,
            ("value", *BASE, "token_share", "low", "high", "chance", "composition", "lift"),
            fields=PARALLEL, drawing=2, heading="Specialization by language", order="composition"),
    Section("vocabulary", {}, of_vocabulary,
            ("layer", "mean_all", "mean_min_count", "weighted", "num_tokens")),
    Section("expert-tokens", {}, of_words,
            (*BASE, "token", "num_slots", "count", "share", "expert_rate", "lift")),
    Section("information", {}, of_information,
            ("factor", "layer", "share", "low", "high", "p", "num_values", "num_tokens")),
    Section("coactivation", {}, of_coactivation,
            (*BASE, "other", "num_both", "share", "low", "high", "expected", "lift"),
            order="lift"),
    Section("partners", {}, of_partners,
            (*BASE, "partner", "share", "expected", "mutual", "effective_partners",
             "effective_partners_chance")),
    Section("transitions", {}, of_transitions,
            (*BASE, "next_layer", "successor", "share", "low", "high", "base_rate", "lift"),
            order="share"),
    Section("transition-strength", {}, of_strength,
            ("layer", "next_layer", "best_successor_share", "base_rate", "gain")),
    Section("languages", {}, of_languages,
            ("lang", "layer", "jsd", "jsd_floor", "jsd_excess", "excess_low", "excess_high",
             "d_hjs", "num_passages"), fields=PARALLEL),
    Section("language-pairs", {}, of_pairs,
            ("layer", "lang_a", "lang_b", "jsd", "jsd_excess", "d_hjs"), fields=PARALLEL),
    Section("language-scores", {}, of_scores,
            ("layer", "pearson", "low", "high", "spearman", "p", "p_max", "num_languages")),
    Section("delta-experts", {"reference": "en"}, of_delta,
            ("value", *BASE, "rate", "rate_reference", "delta", "low", "high", "surely_above"),
            fields=PARALLEL),
    Section("contrast", {"a": "outcome=refused", "b": "outcome=correct"}, of_contrast,
            (*BASE, "score", "effect", "low", "high", "q", "confirmed", "rate_a", "rate_b"),
            fields=REFUSAL, drawing=1, heading="Refusal experts by risk difference"),
    Section("contrast", {"a": "outcome=refused", "method": "ftri"}, of_contrast,
            (*BASE, "score", "effect", "low", "high", "q", "confirmed", "rate_a", "rate_b"),
            fields=REFUSAL, heading="Refusal experts by fTRI on observed outcomes"),
    Section("contrast", {"a": "domain=code", "method": "esft_token"}, of_esft,
            (*BASE, "score", "score_chance", "low", "high", "confirmed"),
            fields=DOMAINS, heading="Experts of one domain by ESFT's token score"),
    Section("saturation", {"against": "demo-base"}, of_saturation,
            ("layer", "saturation", "low", "high", "chance", "top1_match", "jsd", "num_tokens")),
    Section("drift", {"against": "demo-base"}, of_drift,
            (*BASE, "token_share", "token_share_against", "shift", "low", "high", "p", "moved"),
            drawing=1),
)  # fmt: skip


if __name__ == "__main__":
    main()
