"""Figures of vocabulary and information show the numbers of their tables, and where from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.tokens.entries import VOCABULARY_ANALYSES
from moescope.probe.analysis.tokens.expert_tokens import expert_tokens
from moescope.probe.analysis.tokens.information import routing_information
from moescope.probe.analysis.tokens.vocabulary import vocabulary_specialization
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.information import information_curves, information_map
from moescope.probe.figures.vocabulary import expert_words, vocabulary_curves
from moescope.probe.storage.store import Store


@pytest.fixture(scope="module")
def tables(random_store: Store) -> dict[str, AnalysisTable]:
    """Every position has its own id here."""
    return {
        "vocabulary": vocabulary_specialization(random_store, "run"),
        "words": expert_tokens(random_store, "run", min_count=5, top=4),
        "information": routing_information(random_store, "run", factor="token,lang"),
        "per expert": routing_information(random_store, "run", factor="lang", per_expert=True),
    }


FIGURES: dict[str, tuple[str, Callable[[AnalysisTable], go.Figure]]] = {
    "vocabulary": ("vocabulary", vocabulary_curves),
    "words": ("words", lambda t: expert_words(t, layer=2, expert=1)),
    "information": ("information", information_curves),
    "map": ("per expert", lambda t: information_map(t, factor="lang")),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_shows(name: str, tables: dict[str, AnalysisTable]) -> None:
    source, draw = FIGURES[name]
    figure = draw(tables[source])
    context = tables[source].context
    subtitle = figure.layout.title.subtitle.text
    for part in ("planted@r1", "run run", f"{context.num_tokens:,} tokens", context.selection):
        assert part in subtitle
    assert figure.layout.xaxis.title.text
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"


def traces(figure: go.Figure, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.legendgroup == name]


def test_readings_stand_beside_their_chance(tables: dict[str, AnalysisTable]) -> None:
    frame = tables["vocabulary"].frame
    figure = vocabulary_curves(tables["vocabulary"])
    for name in ("mean_all", "mean_min_count", "weighted"):
        *band, curve, chance = traces(figure, name)
        np.testing.assert_array_equal(curve.x, frame["layer"])
        np.testing.assert_array_equal(curve.y, frame[name])
        np.testing.assert_array_equal(chance.y, frame[f"{name}_chance"])
        assert chance.line.dash == "dash"
        if name == "mean_all":
            assert not band
        else:
            np.testing.assert_array_equal(
                band[0].y, [*frame[f"{name}_high"], *frame[f"{name}_low"][::-1]]
            )


def test_words_are_bars_with_intervals_and_chance(tables: dict[str, AnalysisTable]) -> None:
    frame = tables["words"].frame
    own = frame[(frame["layer"] == 2) & (frame["expert"] == 1)]
    figure = expert_words(tables["words"], layer=2, expert=1)
    (bars,) = figure.data
    np.testing.assert_array_equal(bars.x, own["share"])
    np.testing.assert_allclose(bars.x + bars.error_x.array, own["high"])
    np.testing.assert_allclose(bars.x - bars.error_x.arrayminus, own["low"])
    assert list(figure.layout.yaxis.ticktext) == own["token"].tolist()
    assert figure.layout.shapes[0].x0 == own["expert_rate"].iloc[0]
    assert f"chance {own['expert_rate'].iloc[0]:.1%}" in figure.layout.title.text


def test_words_with_markup_and_blanks_are_shown_as_they_are(
    tables: dict[str, AnalysisTable],
) -> None:
    table = tables["words"]
    changed = AnalysisTable(
        name=table.name, title=table.title, frame=table.frame.assign(token=" <b>\n" + "x" * 40),
        columns=table.columns, context=table.context,
    )  # fmt: skip
    shown = expert_words(changed, layer=2, expert=1).layout.yaxis.ticktext[0]
    assert shown.startswith("␣&lt;b&gt;↵xx")
    assert shown.endswith("x…")


def test_information_shows_a_line_and_a_band_per_factor(tables: dict[str, AnalysisTable]) -> None:
    frame = tables["information"].frame
    figure = information_curves(tables["information"])
    for name in ("token", "lang"):
        own = frame[frame["factor"] == name]
        band, curve = traces(figure, name)
        np.testing.assert_array_equal(curve.y, own["share"])
        np.testing.assert_array_equal(band.y, [*own["high"], *own["low"][::-1]])
        assert curve.name == name
    chance = figure.data[-1]
    assert (chance.name, chance.line.dash, list(chance.y)) == ("chance", "dash", [0, 0, 0])


def test_the_map_holds_the_share_of_each_expert(tables: dict[str, AnalysisTable]) -> None:
    (trace,) = information_map(tables["per expert"], factor="lang").data
    frame = tables["per expert"].frame.set_index(["layer", "expert"])["share"]
    assert trace.z.shape == (3, 8)
    assert trace.z[2, 5] == pytest.approx(frame[(4, 5)], rel=1e-5)


def test_what_a_table_does_not_hold_is_refused(tables: dict[str, AnalysisTable]) -> None:
    with pytest.raises(AnalysisInputError, match="no word of expert 1 in layer 3"):
        expert_words(tables["words"], layer=3, expert=1)
    with pytest.raises(AnalysisInputError, match="the table is per expert"):
        information_curves(tables["per expert"])
    with pytest.raises(AnalysisInputError, match="of 'token' per expert; it has lang"):
        information_map(tables["per expert"], factor="token")
    with pytest.raises(AnalysisInputError, match="token, lang, not per expert"):
        information_map(tables["information"], factor="lang")
    with pytest.raises(AnalysisInputError, match="no routers of kind 'mtp'; it has mlp"):
        vocabulary_curves(tables["vocabulary"], kind="mtp")


def test_the_registry_parses_what_the_functions_take(random_store: Store) -> None:
    for analysis in VOCABULARY_ANALYSES:
        table = analysis.function(random_store, "run", **analysis.parse({}))
        assert table.name == analysis.name
        assert len(table.frame)
        assert set(analysis.parse({})) <= {*table.context.parameters}
