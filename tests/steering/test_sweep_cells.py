"""The cells of a sweep and the plans they make."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from moescope.probe.errors import PlanError
from moescope.steering.sweep_cells import LayerWindow, SweepCell, cell_plan, sweep_grid


def contrast() -> pd.DataFrame:
    """All experts of three layers, 0.9 down to 0.67 in effect; all are confirmed."""
    return pd.DataFrame({
        "layer": [at % 3 for at in range(24)],
        "expert": [at // 3 for at in range(24)],
        "effect": [0.9 - at / 100 for at in range(24)],
        "confirmed": True,
    })  # fmt: skip


def test_a_grid_is_the_product_of_its_lists() -> None:
    window = LayerWindow.parse("1-2")
    cells = sweep_grid(
        [1, 2, 2], modes=["replace", "drop"], windows=[None, window], strengths=[None, 0.5]
    )
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * 2
    assert cells[0].title == "1 expert, replace"
    assert cells[-1].title == "2 experts, drop, strength 0.5, layers 1-2"
    assert LayerWindow.parse("3") == LayerWindow(3, 3)
    assert LayerWindow.parse("all") is None


@pytest.mark.parametrize("text", ["", "x", "3-1", "-2", "1-2-3"])
def test_windows_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="window of layers"):
        LayerWindow.parse(text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": 0}, "at least 1 expert"),
        ({"count": 1, "mode": "off"}, "replace, drop_renorm, drop"),
        ({"count": 1, "strength": 0.0}, "over 0"),
        ({"count": 1, "strength": float("nan")}, "over 0"),
        ({"count": 1, "mode": "drop", "strength": 1.5}, "at most 1"),
    ],
)
def test_cells_that_make_no_plan_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        SweepCell(**fields)
    with pytest.raises(PlanError, match="at least one count"):
        sweep_grid([])


def test_a_cell_takes_the_largest_effects_of_its_layers_in_its_mode_and_strength() -> None:
    def made(**fields: Any) -> list[dict[str, Any]]:
        plan = cell_plan(contrast(), SweepCell(**fields), None, name="s")
        return [
            {key: value for key, value in one.items() if key not in ("tokens", "via", "unit", "on")}
            for one in plan.to_dict()["interventions"]
        ]

    def mask(layer: int, mode: str, *experts: int) -> dict[str, Any]:
        return {"action": "mask", "layer": layer, "experts": list(experts), "mode": mode}

    assert made(count=4) == [
        mask(0, "replace", 0, 1), mask(1, "replace", 0), mask(2, "replace", 0),
    ]  # fmt: skip
    assert made(count=3, mode="drop", window=LayerWindow(1, 2)) == [
        mask(1, "drop", 0, 1), mask(2, "drop", 0),
    ]  # fmt: skip
    assert made(count=1, mode="drop_renorm") == [mask(0, "drop_renorm", 0)]
    expert = {"layer": 0, "experts": [0]}
    assert made(count=1, strength=0.5) == [{"action": "bias", "value": -0.5, **expert}]
    scaled = {"action": "scale", "value": 0.75, **expert}
    assert made(count=1, mode="drop", strength=0.25) == [{**scaled, "renormalize": False}]
    assert made(count=1, mode="drop_renorm", strength=0.25) == [{**scaled, "renormalize": True}]
    with pytest.raises(PlanError, match=r"cell '9 experts, replace, layers 1-1'.*at most 8"):
        made(count=9, window=LayerWindow(1, 1))
