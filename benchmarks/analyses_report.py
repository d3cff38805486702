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
from known_truth import record, save_figures

from moescope.probe import Store
from moescope.probe.analysis import AnalysisTable, Filters, find_analysis
from moescope.probe.demo.models import tuned_experts
from moescope.probe.figures import drawings_of

Sentence = Callable[[AnalysisTable], str]
RUN = "demo"
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


def peak(frame: pd.DataFrame, column: str) -> pd.Series[Any]:
    """The row with the largest value of a column."""
    return frame.loc[frame[column].idxmax()]


def span(frame: pd.DataFrame, column: str, digits: str = ".2f") -> str:
    """Smallest and largest value, in words."""
    return f"{frame[column].min():{digits}} to {frame[column].max():{digits}}"


def of_load(table: AnalysisTable) -> str:
    row = peak(table.frame, "token_share")
    return (
        f"The busiest expert is {row['expert']} of layer {row['layer']}: {row['token_share']:.0%} "
        f"of the tokens select it, {row['token_share'] / row['chance']:.1f} times as many as if "
        "all were used alike."
    )


def of_balance(table: AnalysisTable) -> str:
    frame = table.frame
    return (
        f"No layer leaves experts idle for long ({int(frame['never_used'].sum())} of "
        f"{int(frame['num_experts'].sum())} never used), and loads are uneven but not extreme: "
        f"Gini {span(frame, 'gini')}, where independent tokens without preference would give "
        f"{span(frame, 'gini_chance', '.3f')}."
    )


def of_loss(table: AnalysisTable) -> str:
    frame = table.frame
    row = peak(frame, "gap")
    return (
        f"Single prompts are less balanced than the run as a whole in every layer, most in layer "
        f"{row['layer']}: {row['loss_sequence']:.2f} against {row['loss_corpus']:.2f}, a gap of "
        f"{row['gap']:.2f} [{row['gap_low']:.2f}, {row['gap_high']:.2f}] (alike use: "
        f"{row['loss_balanced']:.0f}); part of it is that prompts are short."
    )


def of_specialization(table: AnalysisTable) -> str:
    frame = table.frame
    sure = frame[(frame["low"] > frame["chance"]) & (frame["lift"] >= 2)]
    row = peak(frame[frame["low"] > 2 * frame["chance"]], "composition")
    by = table.context.parameters["by"]
    return (
        f"{len(sure)} pairs of an expert and a {by} stand out (at least twice the share of the "
        f"other values, interval above chance); the clearest is expert {row['expert']} of layer "
        f"{row['layer']}: {row['composition']:.0%} of its use comes from {by} {row['value']} "
        f"(alike use: {row['composition_chance']:.0%})."
    )


def of_vocabulary(table: AnalysisTable) -> str:
    first, last = table.frame.iloc[0], table.frame.iloc[-1]
    return (
        f"A token seen at least {table.context.parameters['min_count']} times goes to its favorite "
        f"expert in {first['mean_min_count']:.0%} of its occurrences in layer {first['layer']} and "
        f"in {last['mean_min_count']:.0%} in layer {last['layer']}; counted over all ids, "
        f"{first['mean_all']:.0%} in layer {first['layer']}, because ids seen once count as sure."
    )


def of_words(table: AnalysisTable) -> str:
    row = table.frame[table.frame["count"] >= 30].sort_values("lift").iloc[-1]
    return (
        f"The most characteristic word with at least 30 occurrences is {row['token']!r} for expert "
        f"{row['expert']} of layer {row['layer']}: {row['share']:.0%} of its occurrences go there, "
        f"against {row['expert_rate']:.0%} of all tokens."
    )


def of_information(table: AnalysisTable) -> str:
    means = table.frame.groupby("factor")["share"].mean().sort_values(ascending=False)
    listed = ", ".join(f"{name} {value:.1%}" for name, value in means.items())
    return f"Of what could be known about the expert of a slot, mean over layers: {listed}."


def of_coactivation(table: AnalysisTable) -> str:
    sure = table.frame[table.frame["low"] > table.frame["expected"]]
    row = peak(sure[sure["num_both"] >= 50], "lift")
    return (
        f"Experts {row['expert']} and {row['other']} of layer {row['layer']} are selected together "
        f"most beyond their loads: {row['share']:.0%} of the tokens with the one have the other, "
        f"{row['lift']:.1f} times what load alone would give."
    )


def of_partners(table: AnalysisTable) -> str:
    medians = table.frame.groupby("layer")[["effective_partners", "effective_partners_chance"]]
    found = medians.median()
    first, last = found.iloc[0], found.iloc[-1]
    return (
        f"Median number of partners in effect: {first['effective_partners']:.1f} in layer "
        f"{found.index[0]} and {last['effective_partners']:.1f} in layer {found.index[-1]}, where "
        f"load alone would give {first['effective_partners_chance']:.1f} and "
        f"{last['effective_partners_chance']:.1f}; {int(table.frame['mutual'].sum())} of "
        f"{len(table.frame)} experts are their partner's partner."
    )


def of_transitions(table: AnalysisTable) -> str:
    sure = table.frame[(table.frame["low"] > table.frame["base_rate"]) & (
        table.frame["num_pairs"] >= 50)]  # fmt: skip
    row = peak(sure, "share")
    return (
        f"The surest step is from expert {row['expert']} of layer {row['layer']} to expert "
        f"{row['successor']} of layer {row['next_layer']}: {row['share']:.0%} "
        f"[{row['low']:.0%}, {row['high']:.0%}] of its tokens go there, {row['base_rate']:.0%} of "
        "all tokens."
    )


def of_strength(table: AnalysisTable) -> str:
    row = peak(table.frame, "gain")
    return (
        f"Knowing the top expert of layer {row['layer']}, the next one is guessed right in "
        f"{row['best_successor_share']:.0%} of the tokens, against {row['base_rate']:.0%} by "
        f"guessing the busiest; no other pair of layers gains more."
    )


def of_languages(table: AnalysisTable) -> str:
    by_layer = table.frame.groupby("layer")["jsd_excess"].mean()
    by_lang = table.frame.groupby("lang")["jsd_excess"].mean().sort_values()
    return (
        f"Divergence from English above the floor of the same language is largest in layer "
        f"{by_layer.idxmax()} ({by_layer.max():.3f} nats) and smallest in layer "
        f"{by_layer.idxmin()} ({by_layer.min():.3f}); {by_lang.index[0]} is nearest and "
        f"{by_lang.index[-1]} farthest."
    )


def of_pairs(table: AnalysisTable) -> str:
    means = table.frame.groupby(["lang_a", "lang_b"])["jsd"].mean().sort_values()
    near, far = means.index[0], means.index[-1]
    return (
        f"Mean over layers, {near[0]} and {near[1]} are routed most alike ({means.iloc[0]:.3f} "
        f"nats), {far[0]} and {far[1]} least ({means.iloc[-1]:.3f})."
    )


def of_scores(table: AnalysisTable) -> str:
    row = table.frame.loc[table.frame["pearson"].abs().idxmax()]
    verdict = "is" if row["p_max"] <= 0.05 else "is not"
    return (
        f"The strongest correlation over {int(row['num_languages'])} languages is "
        f"{row['pearson']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] in layer {row['layer']}, "
        f"which {verdict} beyond what searching all layers finds by chance (p {row['p_max']:.2f})."
    )


def of_delta(table: AnalysisTable) -> str:
    row = table.frame.iloc[0]
    sure = int(table.frame["surely_above"].sum())
    return (
        f"{sure} pairs of an expert and a language are above tau with their whole interval, first "
        f"expert {row['expert']} of layer {row['layer']} for {row['value']}: {row['rate']:.0%} of "
        f"its tokens against {row['rate_reference']:.0%} in the reference."
    )


def of_contrast(table: AnalysisTable) -> str:
    tuned = {(layer, e) for layer, ids in tuned_experts(RUN).items() for e in ids}
    confirmed = table.frame[table.frame["confirmed"] & (table.frame["effect"] > 0)]
    hits = sum((row.layer, row.expert) in tuned for row in confirmed.itertuples())
    total = int(table.summary["confirmed"])
    return (
        f"{total} experts are confirmed, {len(confirmed)} of them on the side of a; of the "
        f"{len(tuned)} experts that refusal was taught to, {hits} are among these. Confirmed "
        "experts go with the behavior; which of them cause it is another question."
    )


def of_esft(table: AnalysisTable) -> str:
    chosen = table.frame[table.frame["candidate"]]
    again = int(table.summary["confirmed"])
    return (
        f"{len(chosen)} experts carry the first {table.context.parameters['mass']:.0%} of the "
        f"slots of their layers; {again} of them are chosen by each half of the prompts too."
    )


def of_saturation(table: AnalysisTable) -> str:
    low = table.frame.loc[table.frame["saturation"].idxmin()]
    return (
        f"Overlap with `demo-base` on the same tokens is {span(table.frame, 'saturation')} by "
        f"layer, lowest in layer {low['layer']} ({low['saturation']:.2f} "
        f"[{low['low']:.2f}, {low['high']:.2f}], chance {low['chance']:.2f}): tuning a few experts "
        "of every layer moves the routing a little more with every layer."
    )


def of_drift(table: AnalysisTable) -> str:
    tuned = {(layer, e) for layer, ids in tuned_experts(RUN).items() for e in ids}
    moved = table.frame[table.frame["moved"]]
    first = moved.head(len(tuned))
    hits = sum((row.layer, row.expert) in tuned for row in first.itertuples())
    return (
        f"{len(moved)} of {len(table.frame)} experts moved; of the {len(first)} that moved most, "
        f"{hits} are among the {len(tuned)} that were tuned."
    )


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
    Section("contrast", {"a": "domain=DOMAIN", "method": "esft_token"}, of_esft,
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
