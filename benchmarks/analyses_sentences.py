"""What the tables of the demo model say, each in a sentence made from its numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moescope.probe.analysis import AnalysisTable
from moescope.probe.demo.models import tuned_experts

RUN = "demo"


def peak(frame: pd.DataFrame, column: str) -> pd.Series[Any]:
    """The row with the largest value of a column."""
    return frame.loc[frame[column].idxmax()]


def span(frame: pd.DataFrame, column: str, digits: str = ".2f") -> str:
    """Smallest and largest value, in words."""
    return f"{frame[column].min():{digits}} to {frame[column].max():{digits}}"


def of_load(table: AnalysisTable) -> str:
    """The busiest expert."""
    row = peak(table.frame, "token_share")
    return (
        f"The busiest expert is {row['expert']} of layer {row['layer']}: {row['token_share']:.0%} "
        f"of the tokens select it, {row['token_share'] / row['chance']:.1f} times as many as if "
        "all were used alike."
    )


def of_balance(table: AnalysisTable) -> str:
    """Idle experts and the range of Gini."""
    frame = table.frame
    return (
        f"No layer leaves experts idle for long ({int(frame['never_used'].sum())} of "
        f"{int(frame['num_experts'].sum())} never used), and loads are uneven but not extreme: "
        f"Gini {span(frame, 'gini')}, where independent tokens without preference would give "
        f"{span(frame, 'gini_chance', '.3f')}."
    )


def of_loss(table: AnalysisTable) -> str:
    """The largest gap."""
    frame = table.frame
    row = peak(frame, "gap")
    return (
        f"Single prompts are less balanced than the run as a whole in every layer, most in layer "
        f"{row['layer']}: {row['loss_sequence']:.2f} against {row['loss_corpus']:.2f}, a gap of "
        f"{row['gap']:.2f} [{row['gap_low']:.2f}, {row['gap_high']:.2f}] (alike use: "
        f"{row['loss_balanced']:.0f}); part of it is that prompts are short."
    )


def of_specialization(table: AnalysisTable) -> str:
    """How many stand out, and the clearest."""
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
    """First and last layer."""
    first, last = table.frame.iloc[0], table.frame.iloc[-1]
    return (
        f"A token seen at least {table.context.parameters['min_count']} times goes to its favorite "
        f"expert in {first['mean_min_count']:.0%} of its occurrences in layer {first['layer']} and "
        f"in {last['mean_min_count']:.0%} in layer {last['layer']}; counted over all ids, "
        f"{first['mean_all']:.0%} in layer {first['layer']}, because ids seen once count as sure."
    )


def of_words(table: AnalysisTable) -> str:
    """The most characteristic word."""
    row = table.frame[table.frame["count"] >= 30].sort_values("lift").iloc[-1]
    return (
        f"The most characteristic word with at least 30 occurrences is {row['token']!r} for expert "
        f"{row['expert']} of layer {row['layer']}: {row['share']:.0%} of its occurrences go there, "
        f"against {row['expert_rate']:.0%} of all tokens."
    )


def of_information(table: AnalysisTable) -> str:
    """Every factor, mean over layers."""
    means = table.frame.groupby("factor")["share"].mean().sort_values(ascending=False)
    listed = ", ".join(f"{name} {value:.1%}" for name, value in means.items())
    return f"Of what could be known about the expert of a slot, mean over layers: {listed}."


def of_coactivation(table: AnalysisTable) -> str:
    """The pair most beyond its loads."""
    sure = table.frame[table.frame["low"] > table.frame["expected"]]
    row = peak(sure[sure["num_both"] >= 50], "lift")
    return (
        f"Experts {row['expert']} and {row['other']} of layer {row['layer']} are selected together "
        f"most beyond their loads: {row['share']:.0%} of the tokens with the one have the other, "
        f"{row['lift']:.1f} times what load alone would give."
    )


def of_partners(table: AnalysisTable) -> str:
    """Partners in effect in the first and last layer."""
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
    """The surest step."""
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
    """The pair of layers with the largest gain."""
    row = peak(table.frame, "gain")
    return (
        f"Knowing the top expert of layer {row['layer']}, the next one is guessed right in "
        f"{row['best_successor_share']:.0%} of the tokens, against {row['base_rate']:.0%} by "
        f"guessing the busiest; no other pair of layers gains more."
    )


def of_languages(table: AnalysisTable) -> str:
    """Where and who diverges most and least."""
    by_layer = table.frame.groupby("layer")["jsd_excess"].mean()
    by_lang = table.frame.groupby("lang")["jsd_excess"].mean().sort_values()
    return (
        f"Divergence from English above the floor of the same language is largest in layer "
        f"{by_layer.idxmax()} ({by_layer.max():.3f} nats) and smallest in layer "
        f"{by_layer.idxmin()} ({by_layer.min():.3f}); {by_lang.index[0]} is nearest and "
        f"{by_lang.index[-1]} farthest."
    )


def of_pairs(table: AnalysisTable) -> str:
    """The nearest and the farthest two."""
    means = table.frame.groupby(["lang_a", "lang_b"])["jsd"].mean().sort_values()
    near, far = means.index[0], means.index[-1]
    return (
        f"Mean over layers, {near[0]} and {near[1]} are routed most alike ({means.iloc[0]:.3f} "
        f"nats), {far[0]} and {far[1]} least ({means.iloc[-1]:.3f})."
    )


def of_scores(table: AnalysisTable) -> str:
    """The strongest correlation, and whether the search alone finds as much."""
    row = table.frame.loc[table.frame["pearson"].abs().idxmax()]
    verdict = "is" if row["p_max"] <= 0.05 else "is not"
    return (
        f"The strongest correlation over {int(row['num_languages'])} languages is "
        f"{row['pearson']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] in layer {row['layer']}, "
        f"which {verdict} beyond what searching all layers finds by chance (p {row['p_max']:.2f})."
    )


def of_delta(table: AnalysisTable) -> str:
    """How many are surely above, and the first."""
    row = table.frame.iloc[0]
    sure = int(table.frame["surely_above"].sum())
    return (
        f"{sure} pairs of an expert and a language are above tau with their whole interval, first "
        f"expert {row['expert']} of layer {row['layer']} for {row['value']}: {row['rate']:.0%} of "
        f"its tokens against {row['rate_reference']:.0%} in the reference."
    )


def of_contrast(table: AnalysisTable) -> str:
    """How many are confirmed, and how many of them were tuned."""
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
    """How many are chosen, and chosen again."""
    chosen = table.frame[table.frame["candidate"]]
    again = int(table.summary["confirmed"])
    return (
        f"{len(chosen)} experts carry the first {table.context.parameters['mass']:.0%} of the "
        f"slots of their layers; {again} of them are chosen by each half of the prompts too."
    )


def of_saturation(table: AnalysisTable) -> str:
    """The range, and the lowest layer."""
    low = table.frame.loc[table.frame["saturation"].idxmin()]
    return (
        f"Overlap with `demo-base` on the same tokens is {span(table.frame, 'saturation')} by "
        f"layer, lowest in layer {low['layer']} ({low['saturation']:.2f} "
        f"[{low['low']:.2f}, {low['high']:.2f}], chance {low['chance']:.2f}): tuning a few experts "
        "of every layer moves the routing a little more with every layer."
    )


def of_drift(table: AnalysisTable) -> str:
    """How many moved, and how many of the first were tuned."""
    tuned = {(layer, e) for layer, ids in tuned_experts(RUN).items() for e in ids}
    moved = table.frame[table.frame["moved"]]
    first = moved.head(len(tuned))
    hits = sum((row.layer, row.expert) in tuned for row in first.itertuples())
    return (
        f"{len(moved)} of {len(table.frame)} experts moved; of the {len(first)} that moved most, "
        f"{hits} are among the {len(tuned)} that were tuned."
    )
