"""Where a model's routers sit, by which rule they select, and the proof that we read them right."""

from moescope.probe.routers.contract import verify_routers
from moescope.probe.routers.discovery import find_routers
from moescope.probe.routers.forms import TupleForm
from moescope.probe.routers.registry import known_families, require_moe_family
from moescope.probe.routers.spec import (
    LayerInfo,
    RouterForm,
    RouterOutput,
    RouterSite,
    RouterSpec,
)

__all__ = [
    "LayerInfo",
    "RouterForm",
    "RouterOutput",
    "RouterSite",
    "RouterSpec",
    "TupleForm",
    "find_routers",
    "known_families",
    "require_moe_family",
    "verify_routers",
]
