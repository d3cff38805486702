"""Figures of two runs: they show what the tables hold and say what they were computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from moescope.probe.analysis.frame import AnalysisTable
from moescope.probe.analysis.two_runs.drift import expert_drift
from moescope.probe.analysis.two_runs.saturation import router_saturation
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures.two_runs import drift_forest, drift_map, saturation_curves
from moescope.probe.storage.store import Store


@pytest.fixture(scope="module")
def store(
    make_store: Callable[..., Store], lab: SimpleNamespace, random_items: list[Any]
) -> Iterator[Store]:
    """A third of the tokens of run `run` go to experts 0 and 1 where those of `base` do not."""
    shapes = lab.RANDOM_SHAPES
    rng = np.random.default_rng(0)
    items = []
    for item in random_items[:36]:
        slots = {layer: [(0, 0.5), (1, 0.25)] for layer in (1, 2, 4)}
        tokens = [
            replace(token, slots=slots, scores={}) if rng.random() < 1 / 3 else token
            for token in item.tokens
        ]
        items.append(replace(item, tokens=tokens))
    made = make_store(shapes, items)
    lab.write_run(made.path, shapes, random_items[:36], run_id="base")
    yield from lab.held_open(made)


@pytest.fixture(scope="module")
def saturation(store: Store) -> AnalysisTable:
    return router_saturation(store, "run", against="base")


@pytest.fixture(scope="module")
def drift(store: Store) -> AnalysisTable:
    return expert_drift(store, "run", against="base")


def named(figure: go.Figure, start: str) -> Any:
    (trace,) = [trace for trace in figure.data if (trace.name or "").startswith(start)]
    return trace


def test_saturation_by_layer(saturation: AnalysisTable) -> None:
    figure = saturation_curves(saturation)
    frame = saturation.frame
    lines = {
        "experts kept (": "saturation",
        "experts kept, chance by": "chance_by_load",
        "first expert the same (": "top1_match",
        "first expert the same, chance": "top1_chance",
        "all experts the same": "identical",
    }
    for start, column in lines.items():
        trace = named(figure, start)
        assert list(trace.x) == [1, 2, 4]
        assert list(trace.y) == frame[column].tolist()
        assert (trace.line.dash is None) == ("chance" not in start)
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    for band, (low, high) in zip(bands, (("low", "high"), ("top1_low", "top1_high")), strict=True):
        assert list(band.y) == [*frame[high], *frame[low][::-1]]
    assert figure.layout.xaxis.title.text == "layer"
    says_what_it_shows(figure, saturation)


def says_what_it_shows(figure: go.Figure, table: AnalysisTable) -> None:
    assert "run against base" in figure.layout.title.text
    context = table.context
    for part in ("planted@r1", "run run", f"{context.num_tokens:,} token", context.selection):
        assert part in figure.layout.title.subtitle.text
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"


def test_lines_without_numbers_are_left_out(saturation: AnalysisTable) -> None:
    names = ["top1_match", "top1_low", "top1_high", "top1_chance"]
    frame = saturation.frame.assign(**dict.fromkeys(names, np.nan))
    figure = saturation_curves(replace(saturation, frame=frame))
    assert not [trace for trace in figure.data if "first" in (trace.name or "")]


def test_drift_map(drift: AnalysisTable) -> None:
    heatmap, moved = drift_map(drift).data
    by_cell = drift.frame.set_index(["layer", "expert"])
    assert heatmap.z.shape == (3, 8)
    assert heatmap.z[2, 1] == pytest.approx(by_cell.at[(4, 1), "shift"])
    assert heatmap.zmax == -heatmap.zmin == pytest.approx(drift.frame["shift"].abs().max())
    shown = set(zip(moved.y.tolist(), moved.x.tolist(), strict=True))
    assert shown == set(by_cell.index[by_cell["moved"]])
    assert {(1, 0), (2, 1), (4, 0)} <= shown
    assert moved.name == f"moved ({len(shown)})"
    says_what_it_shows(drift_map(drift), drift)
    (still,) = drift_map(replace(drift, frame=drift.frame.assign(moved=False))).data
    assert still.type == "heatmap"


def test_drift_forest(drift: AnalysisTable) -> None:
    figure = drift_forest(drift, most=3)
    (trace,) = figure.data
    first = drift.frame[drift.frame["moved"]][:3]
    assert list(trace.x) == first["shift"].tolist()
    assert list(trace.y) == [f"L{row.layer} E{row.expert}" for row in first.itertuples()]
    assert trace.error_x.array + trace.x == pytest.approx(first["high"].to_numpy())
    assert trace.x - trace.error_x.arrayminus == pytest.approx(first["low"].to_numpy())
    number = drift.summary["moved"]
    assert f"the 3 largest shifts of {number} experts that moved" in figure.layout.title.text
    says_what_it_shows(figure, drift)
    assert f"{number} experts moved" in drift_forest(drift).layout.title.text
    still = drift_forest(replace(drift, frame=drift.frame.assign(moved=False)), most=5)
    assert "none moved surely; the 5 largest shifts" in still.layout.title.text
    assert len(still.data[0].x) == 5


def test_a_kind_that_is_not_there(drift: AnalysisTable, saturation: AnalysisTable) -> None:
    for draw, table in ((drift_map, drift), (drift_forest, drift), (saturation_curves, saturation)):
        with pytest.raises(AnalysisInputError, match="no routers of kind 'attention'"):
            draw(table, kind="attention")
