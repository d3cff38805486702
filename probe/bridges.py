"""Models inside a TransformerLens `TransformerBridge`, without importing TransformerLens.

A bridge keeps the transformers model (`original_model`) and puts a component of its own around
many of its modules, each holding the module it wraps as `original_component`. Here a bridge is
looked through: which model is inside, what its modules are called without the wrappers, and which
wrapper is called in a module's place (only its output is what the model goes on with: a bridge's
hooks may have changed it).

Source: transformer_lens 4.3, `model_bridge/transformer_bridge.py` and
`model_bridge/generalized_components/base.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_WRAPPED = "_original_component"


def underlying(model: Any) -> nn.Module:
    """The transformers model inside a bridge, or the model itself."""
    inner = getattr(model, "original_model", None) if is_bridge(model) else None
    found = model if inner is None else inner
    if not isinstance(found, nn.Module):
        raise TypeError(f"{type(model).__name__} is not a torch module")
    return found


def is_bridge(model: object) -> bool:
    """Whether this is a TransformerBridge."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's own modules by their names without bridge wrappers; see `named_modules`.

    Where a component stands in a module's place, the module is given, not the component.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # Wrappers come before what they wrap, which then takes their place.
        modules[".".join(part for part in name.split(".") if part != _WRAPPED)] = module
    return modules


def called_in_place_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Wrapped module -> the outermost component that the model calls instead of it."""
    wrapper_of: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        inner = module._modules.get(_WRAPPED)
        if inner is not None:
            wrapper_of[inner] = wrapper_of.get(module, module)
    return wrapper_of
