"""Figures of pairs: they show the numbers of their tables, chance beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.pairs.coactivation import expert_coactivation
from moescope.probe.analysis.pairs.partners import expert_partners
from moescope.probe.analysis.pairs.transition_strength import transition_strength
from moescope.probe.analysis.pairs.transitions import expert_transitions
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.coactivation import coactivation_heatmap, partner_overview
from moescope.probe.figures.transitions import (
    transition_heatmap,
    transition_paths,
    transition_strength_curves,
)
from moescope.probe.storage.store import Store


@pytest.fixture(scope="module")
def tables(random_store: Store) -> dict[str, AnalysisTable]:
    return {
        "coactivation": expert_coactivation(random_store, "run"),
        "adjacent": expert_coactivation(random_store, "run", pairs="adjacent"),
        "partners": expert_partners(random_store, "run"),
        "transitions": expert_transitions(random_store, "run", slots="topk"),
        "top1": expert_transitions(random_store, "run"),
        "strength": transition_strength(random_store, "run"),
    }


FIGURES: dict[str, tuple[str, Callable[[AnalysisTable], go.Figure]]] = {
    "lift": ("coactivation", lambda t: coactivation_heatmap(t, layer=2)),
    "share": (
        "coactivation",
        lambda t: coactivation_heatmap(t, layer=1, measure="share", order="expert"),
    ),
    "adjacent": ("adjacent", lambda t: coactivation_heatmap(t, layer=1)),
    "partners": ("partners", partner_overview),
    "transitions": ("transitions", lambda t: transition_heatmap(t, layer=2)),
    "top1": ("top1", lambda t: transition_heatmap(t, layer=2, measure="lift")),
    "paths": ("top1", transition_paths),
    "strength": ("strength", transition_strength_curves),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_shows(name: str, tables: dict[str, AnalysisTable]) -> None:
    source, draw = FIGURES[name]
    figure = draw(tables[source])
    context = tables[source].context
    subtitle = figure.layout.title.subtitle.text
    for part in ("planted@r1", "run run", f"{context.num_tokens:,} token", context.selection):
        assert part in subtitle
    assert figure.layout.title.text
    assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert list(figure.select_xaxes())[-1].title.text
    assert list(figure.select_yaxes())[-1].title.text
    for trace in figure.data:
        if isinstance(trace, go.Heatmap):
            assert trace.colorbar.title.text
        for key in ("z", "x", "y", "customdata"):
            assert not isinstance(trace.to_plotly_json().get(key), list)


@pytest.mark.parametrize("order", ["expert", "cluster"])
def test_coactivation_cells_are_those_of_the_table(
    tables: dict[str, AnalysisTable], order: str
) -> None:
    table = tables["coactivation"]
    frame = table.frame[table.frame["layer"] == 2].set_index(["expert", "other"])
    (share,) = coactivation_heatmap(table, layer=2, measure="share", order=order).data
    (lift,) = coactivation_heatmap(table, layer=2, order=order).data
    places = share.customdata[:, 0, 1].astype(int)
    assert sorted(places) == list(range(8))
    assert order == "cluster" or list(places) == list(range(8))
    for row, expert in enumerate(places):
        for column, other in enumerate(places):
            assert tuple(lift.customdata[row, column, 1:]) == (expert, other)
            if expert == other:
                assert np.isnan(share.z[row, column])
                assert np.isnan(lift.z[row, column])
                continue
            value = frame.loc[(expert, other)]
            assert share.z[row, column] == pytest.approx(value["share"])
            assert lift.customdata[row, column, 0] == pytest.approx(value["lift"])
            assert 2 ** lift.z[row, column] == pytest.approx(value["lift"])


def test_groups_stand_together(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    """Even experts go together and odd ones do; pairs that never occur are at the cold end."""
    rng = np.random.default_rng(1)
    tokens = [(2 * rng.permutation(4)[:2] + rng.integers(2)).tolist() for _ in range(200)]
    items = [lab.Item(tokens=lab.tokens_of(tokens))]
    store = make_store([lab.Shape(layer=0, num_experts=9, top_k=2)], items)
    (trace,) = coactivation_heatmap(expert_coactivation(store, "run"), layer=0).data
    places = [int(place) for place in trace.customdata[:, 0, 1] if place != 8]
    parities = [place % 2 for place in places]
    assert sum(a != b for a, b in itertools.pairwise(parities)) == 1
    assert np.nanmin(trace.z) == trace.zmin == -3


def test_partner_overview_shows_every_expert(tables: dict[str, AnalysisTable]) -> None:
    frame = tables["partners"].frame
    boxes, chance = partner_overview(tables["partners"]).data
    assert boxes.y.tolist() == frame["effective_partners"].tolist()
    assert boxes.x.tolist() == frame["layer"].tolist()
    assert chance.line.dash == "dash"
    medians = [np.median(part) for _, part in frame.groupby("layer")["effective_partners_chance"]]
    assert chance.y.tolist() == pytest.approx(medians)


def test_transition_cells_are_those_of_the_table(tables: dict[str, AnalysisTable]) -> None:
    table = tables["transitions"]
    frame = table.frame[table.frame["layer"] == 2].set_index(["expert", "successor"])
    figure = transition_heatmap(table, layer=2)
    (trace,) = figure.data
    assert "layer 2 to 4" in figure.layout.title.text
    assert trace.z[3, 5] == pytest.approx(frame.at[(3, 5), "hit_rate"])
    (lift,) = transition_heatmap(table, layer=2, measure="lift").data
    assert lift.customdata[3, 5] == pytest.approx(frame.at[(3, 5), "lift"])


def test_paths_are_the_most_frequent_transitions(tables: dict[str, AnalysisTable]) -> None:
    frame = tables["top1"].frame
    drawn: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    steps = (0.0, 0.25, 0.5, 0.75, 1.01)
    for trace, low, high in zip(
        transition_paths(tables["top1"], strongest=4).data, steps, steps[1:], strict=False
    ):
        for x, y in zip(trace.x.reshape(-1, 3), trace.y.reshape(-1, 3), strict=True):
            assert np.isnan(x[2])
            drawn[int(x[0])].append((int(y[0]), int(y[1])))
            row = frame[(frame["layer"] == x[0]) & (frame["next_layer"] == x[1])
                        & (frame["expert"] == y[0]) & (frame["successor"] == y[1])]  # fmt: skip
            assert low <= row["hit_rate"].item() < high
    for layer, pairs in drawn.items():
        own = frame[frame["layer"] == layer].set_index(["expert", "successor"])["num_pairs"]
        assert len(pairs) == 4
        assert own[pairs].min() >= own.drop(pairs).max()


def test_strength_stands_beside_its_chance(tables: dict[str, AnalysisTable]) -> None:
    frame = tables["strength"].frame
    figure = transition_strength_curves(tables["strength"])
    observed = [trace.y.tolist() for trace in figure.data if trace.name == "observed"]
    assert observed == [
        frame[name].tolist() for name in ("best_successor_share", "gain", "information_share")
    ]
    chance = [trace for trace in figure.data if trace.line.dash == "dash"]
    assert [trace.y.tolist() for trace in chance] == [
        frame["base_rate"].tolist(), frame["gain_chance"].tolist(), [0.0] * len(frame),
    ]  # fmt: skip
    bands = [trace for trace in figure.data if trace.fill]
    assert bands[0].y.tolist() == [*frame["gain_high"], *frame["gain_low"][::-1]]


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda t: coactivation_heatmap(t["coactivation"], layer=3), "no layer 3; it has 1, 2, 4"),
        (lambda t: coactivation_heatmap(t["coactivation"], layer=1, measure="n"), "share, lift"),
        (lambda t: coactivation_heatmap(t["coactivation"], layer=1, order="n"), "expert, cluster"),
        (lambda t: transition_heatmap(t["top1"], layer=4), "no layer 4; it has 1, 2"),
        (lambda t: transition_heatmap(t["top1"], layer=1, measure="n"), "measure is 'n'"),
        (lambda t: transition_paths(t["top1"], strongest=0), "strongest is 0"),
        (lambda t: partner_overview(t["partners"], kind="mtp"), "no routers of kind 'mtp'"),
    ],
)
def test_what_a_table_does_not_have_is_refused(
    tables: dict[str, AnalysisTable], draw: Any, words: str
) -> None:
    with pytest.raises(AnalysisInputError, match=words):
        draw(tables)
