"""Record and read the routing of Mixture-of-Experts models.

Names are loaded on first use, so that reading a store or analysing a run imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.probe.models import ModelBundle, load_model
    from moescope.probe.prompts import Prompt, read_prompts
    from moescope.probe.recording import Trace, record
    from moescope.probe.storage.store import Store
    from moescope.probe.trace import trace_prompts

_HOME = {
    "ModelBundle": "models",
    "Prompt": "prompts",
    "Store": "storage.store",
    "Trace": "recording",
    "load_model": "models",
    "read_prompts": "prompts",
    "record": "recording",
    "trace_prompts": "trace",
}

__all__ = [
    "ModelBundle",
    "Prompt",
    "Store",
    "Trace",
    "load_model",
    "read_prompts",
    "record",
    "trace_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
