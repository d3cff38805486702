"""The README's Python runs as it stands, and its picture and links are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moescope.probe.demo.models import materialize
from moescope.steering import SteeringPlan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs() -> None:
    names: dict[str, object] = {}
    exec(CODE[0], names)
    trace = names["trace"]
    assert trace[3].expert_ids.shape[1] == 4  # type: ignore[index]


def test_a_plan_is_applied_in_a_script_of_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(CODE) == 2
    materialize("demo", tmp_path / "demo-plain")
    plan = {"action": "mask", "layer": 3, "experts": [1, 2]}
    SteeringPlan(interventions=[plan]).write(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    exec(CODE[1], {})


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`(datasets/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
