"""The names that `moescope.probe` and `moescope.steering` promise are there and documented."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

PROMISED = {
    "moescope.probe": ["ModelBundle", "Prompt", "Store", "Trace", "load_model", "read_prompts",
                       "record", "trace_prompts"],
    "moescope.steering": ["Intervention", "SteeringPlan", "steer"],
}  # fmt: skip


@pytest.mark.parametrize(("package", "names"), PROMISED.items(), ids=list(PROMISED))
def test_promised_names_are_there_and_documented(package: str, names: list[str]) -> None:
    module = import_module(package)
    assert set(names) <= set(module.__all__)
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), f"{package}.{name} has no docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018
