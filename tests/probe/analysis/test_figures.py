"""Figures: they show what the table holds, say what it was computed from, and fix no text color."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from moescope.probe import figures
from moescope.probe.analysis import (
    AnalysisTable,
    Filters,
    expert_contrast,
    expert_load,
    expert_specialization,
    language_divergence,
    load_balance,
    prompt_routing,
    token_routing,
)
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store


@pytest.fixture(scope="module")
def tables(random_store: Store) -> dict[str, AnalysisTable]:
    a, b = {"label": ["a"]}, {"label": ["b"]}
    return {
        "load": expert_load(random_store, "run"),
        "load by lang": expert_load(random_store, "run", by="lang"),
        "balance": load_balance(random_store, "run", by="lang"),
        "specialization": expert_specialization(random_store, "run", by="lang", bootstrap=20),
        "languages": language_divergence(random_store, "run", bootstrap=20),
        "languages without floor": language_divergence(
            random_store, "run", bootstrap=20, floor="none"
        ),
        "contrast": expert_contrast(random_store, "run", a=a, b=b, candidates=6, bootstrap=20),
        "esft": expert_contrast(random_store, "run", a=a, method="esft_gate", bootstrap=20),
        "log odds": expert_contrast(
            random_store, "run", a=a, b=b, candidates=6, bootstrap=20, method="log_odds"
        ),
        "optimistic": expert_contrast(random_store, "run", a=a, b=b, split=False, bootstrap=20),
        "prompt": prompt_routing(random_store, "run", prompt_id=4),
        "token": token_routing(random_store, "run", prompt_id=4, position=2),
    }


FIGURES: dict[str, tuple[str, Callable[[AnalysisTable], go.Figure]]] = {
    "load": ("load", figures.load_heatmap),
    "share of one language": (
        "load by lang",
        lambda t: figures.load_heatmap(t, measure="token_share", value="zh"),
    ),
    "balance": ("balance", figures.balance_curves),
    "specialization of a layer": (
        "specialization",
        lambda t: figures.specialization_by_value(t, layer=2),
    ),
    "specialization of a value": (
        "specialization",
        lambda t: figures.specialization_map(t, value="de", measure="lift"),
    ),
    "specialization of all experts": ("specialization", figures.specialization_leaders),
    "languages": ("languages", figures.language_curves),
    "languages without floor": ("languages without floor", figures.language_curves),
    "contrast": ("contrast", figures.contrast_map),
    "contrast of one group": ("esft", figures.contrast_map),
    "forest of one group": ("esft", figures.contrast_forest),
    "forest of log odds": ("log odds", figures.contrast_forest),
    "forest": ("contrast", figures.contrast_forest),
    "optimistic forest": ("optimistic", figures.contrast_forest),
    "prompt": ("prompt", figures.prompt_heatmap),
    "token": ("token", figures.token_bars),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_shows(name: str, tables: dict[str, AnalysisTable]) -> None:
    source, draw = FIGURES[name]
    figure = draw(tables[source])
    context = tables[source].context
    subtitle = figure.layout.title.subtitle.text
    assert figure.layout.title.text
    for part in (
        "planted@r1",
        "run run",
        f"{context.num_prompts:,} prompt",
        f"{context.num_tokens:,} token",
        context.selection,
    ):
        assert part in subtitle
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    document = figure.to_dict()
    document["layout"].pop("template")
    assert not [path for path in paths(document) if path[-2:] == ("font", "color")]
    for trace in figure.data:
        for key in ("z", "x", "y", "customdata"):
            values = trace.to_plotly_json().get(key)
            # Numbers travel as arrays; only labels may be lists.
            assert not isinstance(values, list) or not any(
                isinstance(value, int | float) for value in values
            )
    assert list(figure.select_xaxes())[-1].title.text


def paths(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """All key paths of nested dictionaries and lists."""
    if isinstance(node, dict):
        return [path, *(found for key in node for found in paths(node[key], (*path, str(key))))]
    if isinstance(node, list):
        return [found for item in node for found in paths(item, path)]
    return [path]


def test_maps_hold_the_measure_at_layer_and_expert(tables: dict[str, AnalysisTable]) -> None:
    (trace,) = figures.load_heatmap(tables["load"], measure="importance").data
    assert trace.z.shape == (3, 8)
    assert list(trace.y) == [1, 2, 4]
    frame = tables["load"].frame.set_index(["layer", "expert"])["importance"]
    assert trace.z[2, 5] == pytest.approx(frame[(4, 5)])
    assert trace.z[0, 0] == pytest.approx(frame[(1, 0)])


def test_maps_of_layers_with_fewer_experts_leave_cells_empty(
    lab: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shapes = [
        lab.Shape(layer=0, num_experts=2, top_k=1),
        lab.Shape(layer=1, num_experts=4, top_k=1),
    ]
    token = lab.Token(slots={0: [(1, 1.0)], 1: [(3, 1.0)]})
    path = tmp_path_factory.mktemp("uneven") / "store.duckdb"
    store = lab.write_run(path, shapes, [lab.Item(tokens=[token])])
    (trace,) = figures.load_heatmap(expert_load(store, "run")).data
    np.testing.assert_array_equal(trace.z, [[0, 1, np.nan, np.nan], [0, 0, 0, 1]])


def test_experts_take_the_color_of_the_value_with_most_of_their_use(
    tables: dict[str, AnalysisTable],
) -> None:
    table = tables["specialization"]
    values = list(dict.fromkeys(table.frame["value"]))
    figure = figures.specialization_leaders(table, least=0.34)
    cells, *legend = figure.data
    frame = table.frame.set_index(["layer", "expert", "value"])["composition"]
    counts = dict.fromkeys(values, 0)
    for row, layer in enumerate(cells.y):
        for expert in cells.x:
            shares = {value: frame[(layer, expert, value)] for value in values}
            best = max(shares, key=lambda value: shares[value])
            shown = cells.z[row][expert]
            if shares[best] >= 0.34:
                assert values[int(shown)] == best
                assert cells.text[row][expert] == f"{best}: {shares[best]:.0%} of its use"
                counts[best] += 1
            else:
                assert np.isnan(shown)
    assert sum(counts.values()) > 0
    for trace, value in zip(legend, values, strict=True):
        assert trace.name.startswith(f"{value} ({counts[value]} expert")


def test_clicks_on_a_prompt_carry_position_and_layer(tables: dict[str, AnalysisTable]) -> None:
    figure = figures.prompt_heatmap(tables["prompt"], color="weight_entropy")
    heatmap, points = figure.data
    assert isinstance(points, go.Scattergl)
    assert points.marker.opacity == 0
    frame = tables["prompt"].frame
    cells = set(zip(points.x, points.y, map(tuple, points.customdata), strict=True))
    layers = [1, 2, 4]
    for row in frame.to_dict("records"):
        x, y = row["position"], layers.index(row["layer"])
        assert (x, y, (row["position"], row["layer"])) in cells
        assert heatmap.text[y][x] == str(row["top_expert"])
        assert heatmap.z[y][x] == pytest.approx(row["weight_entropy"], rel=1e-5)
    assert len(cells) == len(frame)


def test_tokens_are_escaped_on_the_axis(lab: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("markup") / "store.duckdb"
    shapes = [lab.Shape(layer=0, num_experts=2, top_k=1)]
    store = lab.write_run(path, shapes, [lab.Item(tokens=lab.tokens_of([[0]]))])
    table = prompt_routing(store, "run", prompt_id=0)
    table.frame["token"] = " <b>&"
    figure = figures.prompt_heatmap(table)
    assert figure.layout.xaxis.ticktext == ("␣&lt;b&gt;&amp;",)
    assert "<b>" not in figure.data[1].text[0]


def test_forest_shows_intervals_of_the_candidates(tables: dict[str, AnalysisTable]) -> None:
    table = tables["contrast"]
    assert not table.frame["confirmed"].any()
    figure = figures.contrast_forest(table, most=4)
    assert "none confirmed; the 4 strongest candidates" in figure.layout.title.text
    discovery, effects = figure.data
    chosen = table.frame[table.frame["candidate"]]
    chosen = chosen.reindex(chosen["effect"].abs().sort_values(ascending=False).index)[:4]
    np.testing.assert_allclose(effects.x, chosen["effect"])
    np.testing.assert_allclose(effects.x + effects.error_x.array, chosen["high"])
    np.testing.assert_allclose(effects.x - effects.error_x.arrayminus, chosen["low"])
    np.testing.assert_allclose(discovery.x, chosen["score"])
    assert list(effects.y) == [
        f"L{row['layer']} E{row['expert']}" for row in chosen.to_dict("records")
    ]


def test_confirmed_experts_are_marked_on_the_map(tables: dict[str, AnalysisTable]) -> None:
    table = tables["contrast"]
    marked = table.frame.assign(confirmed=table.frame.index < 2)
    changed = AnalysisTable(name=table.name, title=table.title, frame=marked,
                            columns=table.columns, context=table.context)  # fmt: skip
    heatmap, stars = figures.contrast_map(changed).data
    assert heatmap.zmin == -heatmap.zmax
    assert list(zip(stars.y, stars.x, strict=True)) == [
        (row["layer"], row["expert"]) for row in marked[:2].to_dict("records")
    ]
    assert "2 confirmed" in figures.contrast_forest(changed).layout.title.text


def test_language_panels_show_curves_bands_and_floor(tables: dict[str, AnalysisTable]) -> None:
    frame = tables["languages"].frame
    figure = figures.language_curves(tables["languages"])
    german = [trace for trace in figure.data if trace.name == "de"]
    own = frame[frame["lang"] == "de"]
    assert [list(trace.y) for trace in german] == [
        own[name].tolist() for name in ("jsd", "d_hjs", "jsd_excess")
    ]
    bands = [trace for trace in figure.data if trace.legendgroup == "de" and trace.fill]
    assert list(bands[2].y) == [*own["excess_high"], *own["excess_low"][::-1]]
    (floor,) = (trace for trace in figure.data if trace.name and "floor" in trace.name)
    assert list(floor.y) == [0, 0, 0]
    assert floor.line.dash == "dash"
    without = figures.language_curves(tables["languages without floor"])
    assert not [trace for trace in without.data if trace.name and "floor" in trace.name]


def test_what_a_table_does_not_hold_is_refused(tables: dict[str, AnalysisTable]) -> None:
    with pytest.raises(AnalysisInputError, match="split by lang: name one value of de, en, zh"):
        figures.load_heatmap(tables["load by lang"])
    with pytest.raises(AnalysisInputError, match="no value 'fr' of de, en, zh"):
        figures.load_heatmap(tables["load by lang"], value="fr")
    with pytest.raises(AnalysisInputError, match="no layer 3; it has 1, 2, 4"):
        figures.specialization_by_value(tables["specialization"], layer=3)
    with pytest.raises(AnalysisInputError, match="no routers of kind 'encoder'; it has mlp"):
        figures.contrast_map(tables["contrast"], kind="encoder")


def test_long_prompts_keep_their_labels_readable(lab: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("long") / "store.duckdb"
    shapes = [lab.Shape(layer=0, num_experts=2, top_k=1)]
    store = lab.write_run(path, shapes, [lab.Item(tokens=lab.tokens_of([[0]] * 150))])
    filters = Filters(layers=(0,))
    figure = figures.prompt_heatmap(prompt_routing(store, "run", prompt_id=0, filters=filters))
    assert list(figure.layout.xaxis.tickvals) == list(range(0, 150, 3))
    assert figure.data[0].texttemplate == ""
    assert len(figure.data[1].x) == 150
