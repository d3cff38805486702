"""What is planted in a run is found by every analysis that looks for it, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from moescope.probe.analysis import delta_experts, expert_specialization, language_divergence
from moescope.probe.demo.planted_routing import DOMAINS, LANGUAGES, PlantedRouting
from moescope.probe.storage.store import Store


def own_experts(truth: PlantedRouting, langs: Iterable[str]) -> set[tuple[str, int, int]]:
    """(language, layer, expert) of the experts that only these languages use."""
    return {
        (lang, layer, expert)
        for layer, experts in truth.language_experts.items()
        for lang in langs
        for expert in experts[lang]
    }


def test_specialists_of_domains(planted_store: Store, planted_truth: PlantedRouting) -> None:
    frame = expert_specialization(planted_store, "run", by="domain", bootstrap=0).frame
    specialists = {
        (domain, layer, expert)
        for layer, experts in planted_truth.specialists.items()
        for expert, domain in experts.items()
    }
    assert sorted(domain for domain, *_ in specialists) == sorted(DOMAINS)
    exclusive = frame[frame["composition"] == 1]
    keys = ["value", "layer", "expert"]
    assert set(exclusive[keys].itertuples(index=False, name=None)) == specialists
    shares = frame.set_index(keys)["token_share"]
    for domain, layer, expert in specialists:
        for other in DOMAINS:
            assert shares[(other, layer, expert)] == (other == domain)


def test_experts_of_languages(planted_store: Store, planted_truth: PlantedRouting) -> None:
    frame = expert_specialization(planted_store, "run", by="lang", bootstrap=0).frame
    assert set(planted_truth.language_experts) == {0, 4}
    exclusive = frame[frame["composition"] == 1]
    found = set(exclusive[["value", "layer", "expert"]].itertuples(index=False, name=None))
    assert found == own_experts(planted_truth, LANGUAGES)


def test_languages_part_in_their_layers_only(
    planted_store: Store, planted_truth: PlantedRouting
) -> None:
    frame = language_divergence(planted_store, "run").frame.set_index(["layer", "lang"])
    assert len(frame) == 5 * 3
    apart = frame.index.get_level_values("layer").isin(planted_truth.language_experts)
    assert (frame.loc[apart, "excess_low"] > 0).all()
    assert (frame["num_passages"] == 18).all()
    least = frame.loc[apart, "jsd_excess"].min()
    for row in frame[~apart].to_dict("records"):
        holds_zero = row["excess_low"] <= 0 <= row["excess_high"]
        assert holds_zero or abs(row["jsd_excess"]) < least / 10


def test_experts_more_used_than_in_english(
    planted_store: Store, planted_truth: PlantedRouting
) -> None:
    """Experts of a language are 0.5 above English, all others 0; tau stands halfway between."""
    frame = delta_experts(planted_store, "run", by="lang", reference="en", tau=0.25).frame
    keys = ["value", "layer", "expert"]
    surely = frame[frame["surely_above"]]
    others = own_experts(planted_truth, set(LANGUAGES) - {"en"})
    assert set(surely[keys].itertuples(index=False, name=None)) == others
    # Two of a language's four at every token: on average exactly a half.
    means = surely.groupby(["value", "layer"])["delta"].mean()
    assert means.to_numpy() == pytest.approx(0.5)
    # English has experts of its own, too: the others use them that much less.
    least = frame.nsmallest(len(others), "delta")
    assert set(least[["layer", "expert"]].itertuples(index=False, name=None)) == {
        (layer, expert) for _, layer, expert in own_experts(planted_truth, {"en"})
    }
