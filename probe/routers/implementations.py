"""What really computes a routed layer: its own code, or something that has taken its place.

Hooks sit on modules, so code that goes around a module cannot be seen through it. Three things go
around: kernels that replace a module's `forward` (the `kernels` package, `kernelize`), blocks that
a quantiser puts in the family's place, and quantised experts. The first and the last are named, and
the proof (`moescope.probe.routers.contract`) finds out whether routing still passes the modules;
blocks known to select in a kernel of their own are refused before anything runs.

Sources: transformers 5.23, `integrations/hub_kernels.py`, `integrations/mxfp4.py`,
`integrations/finegrained_fp8.py`, `integrations/moe.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moescope.probe.errors import RecordingError

#: Class of a block that selects where no hook reaches -> what to do instead.
_SELECT_ALONE = {
    "Mxfp4GptOssMLP": (
        "MXFP4 experts select in a kernel of their own; load the model with "
        "quantization_config=Mxfp4Config(dequantize=True)"
    ),
}


def require_visible(where: str, block: nn.Module) -> None:
    """Refuse a block that is known to select experts where no hook reaches.

    Raises:
        RecordingError: it is one; the message says what to do instead.
    """
    advice = _SELECT_ALONE.get(type(block).__name__)
    if advice is not None:
        raise RecordingError(
            f"{where}: the block is {type(block).__name__}, around whose router nothing can be "
            f"recorded: {advice}"
        )


def implementation_of(router: nn.Module, block: nn.Module, experts: nn.Module) -> str:
    """What computes a layer's routing and experts, in words.

    `eager`, another implementation of transformers (`grouped_mm`, ...), the class of quantised
    experts with its implementation, or the kernel that has taken a module's place.
    """
    for what, module in (("block", block), ("router", router), ("experts", experts)):
        replaced = _replaced_forward(module)
        if replaced is not None:
            return f"kernel in place of the {what} ({replaced})"
    name = "eager"
    if hasattr(experts, "is_transposed"):  # set by `use_experts_implementation`, with its config
        found = getattr(getattr(experts, "config", None), "_experts_implementation", None)
        name = found if isinstance(found, str) else name
    if not type(experts).__module__.startswith(("transformers.models.", "torch.nn.")):
        return f"{type(experts).__name__}, {name}"
    return name


def is_quantised(config: Any) -> bool:
    """Whether a configuration says that weights are quantised."""
    return getattr(config, "quantization_config", None) is not None


def _replaced_forward(module: nn.Module) -> str | None:
    """Name of the function that was put in the place of a module's own forward, or None."""
    forward: Any = module.__dict__.get("forward")
    if forward is None or hasattr(module, "_hf_hook"):  # accelerate only moves tensors around it
        return None
    function = getattr(forward, "__func__", forward)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '?')}.{name}"
