"""Change the routing of a model by a plan, and judge what that did.

    SteeringPlan, Intervention   what to change, as data (JSON)
    steer                        apply a plan while a block runs

Names are loaded when first used: making and checking plans needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.steering.apply import steer
    from moescope.steering.plan import Intervention, SteeringPlan

__all__ = ["Intervention", "SteeringPlan", "steer"]

_HOME = {
    "Intervention": "moescope.steering.plan",
    "SteeringPlan": "moescope.steering.plan",
    "steer": "moescope.steering.apply",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted([*globals(), *__all__])
