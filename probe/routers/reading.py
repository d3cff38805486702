"""Reading single values of a selection rule from live modules; missing ones are named."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moescope.kernels.route import Groups, RoutingRule
from moescope.probe.errors import UnknownRoutingError

_FLOATS: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def value_of(module: nn.Module, name: str) -> Any:
    """An attribute of a live module.

    Raises:
        UnknownRoutingError: it has none of that name.
    """
    found = getattr(module, name, None)
    if found is None:
        raise UnknownRoutingError(
            f"{type(module).__name__} has no `{name}`, so its selection rule is not known; this "
            "release of transformers may have renamed it"
        )
    return found


def whole(module: nn.Module, name: str) -> int:
    """A whole number, such as a number of experts.

    Raises:
        UnknownRoutingError: it is missing, or something else.
    """
    found = value_of(module, name)
    if isinstance(found, bool) or not isinstance(found, int):
        raise UnknownRoutingError(
            f"{type(module).__name__}.{name} is {found!r}, not a whole number, so its selection "
            "rule is not known"
        )
    return found


def number(module: nn.Module, name: str) -> float:
    """A number, such as a scaling factor.

    Raises:
        UnknownRoutingError: it is missing, or something else.
    """
    found = value_of(module, name)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise UnknownRoutingError(
            f"{type(module).__name__}.{name} is {found!r}, not a number, so its selection rule is "
            "not known"
        )
    return float(found)


def flag(module: nn.Module, name: str) -> bool:
    """A yes or no, such as whether weights are renormalized.

    Raises:
        UnknownRoutingError: it is missing.
    """
    return bool(value_of(module, name))


def setting(config: Any, name: str, of: nn.Module) -> Any:
    """A configuration field that the live modules do not keep; `of` is whose rule needs it.

    Raises:
        UnknownRoutingError: the configuration has no such field.
    """
    if not hasattr(config, name):
        raise UnknownRoutingError(
            f"the configuration of {type(of).__name__} has no `{name}`, so its selection rule is "
            "not known"
        )
    return getattr(config, name)


def live_tensor(module: nn.Module | None, name: str) -> Tensor | None:
    """A tensor of a live module as it is now, fetched where accelerate has put it away.

    Offloaded weights are in memory only while their module's forward runs, and hooks run after it:
    then the hook of accelerate (`hooks.AlignDevicesHook`) says where they are. None where the
    module has no such tensor; a tensor without data (on the meta device) where it is nowhere.
    """
    found = getattr(module, name, None)
    if not isinstance(found, Tensor):
        return None
    if found.is_meta:
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights = getattr(one, "weights_map", None)
            if weights is not None and name in weights:
                stored: Tensor = weights[name].to(one.execution_device)
                return stored
    return found


def rule_of(router: nn.Module, *, renormalize: bool, **more: Any) -> RoutingRule:
    """The rule of a router that keeps its sizes as `num_experts` and `top_k`, as most do.

    Args:
        router: the live router.
        renormalize: as in the rule.
        more: what else is not the rule's default.
    """
    return RoutingRule(
        num_experts=whole(router, "num_experts"),
        top_k=whole(router, "top_k"),
        renormalize=renormalize,
        **more,
    )


def groups_of(router: nn.Module, fill: Literal["-inf", "0"]) -> Groups | None:
    """Groups scored by the sum of their two best, from `num_group` and `topk_group`.

    None where the router has no groups (`num_group` is None).

    Raises:
        UnknownRoutingError: one of the two is missing.
    """
    if getattr(router, "num_group", 0) is None:
        return None
    return Groups(
        count=whole(router, "num_group"), kept=whole(router, "topk_group"), score="top2_sum",
        fill=fill,
    )  # fmt: skip


def hidden_dtype(block: nn.Module, config: Any) -> Literal["float32", "bfloat16", "float16"]:
    """Dtype of the hidden states that pass a block: that of its experts, else the configured one.

    Raises:
        UnknownRoutingError: the experts are quantised (their float parameters are scales, which say
            nothing) and no dtype is configured.
    """
    experts = getattr(block, "experts", block)
    found = {_FLOATS.get(parameter.dtype) for parameter in experts.parameters()}
    if len(found) == 1 and (only := found.pop()) is not None:
        return only
    dtype: Any = getattr(config, "dtype", None)
    configured = _FLOATS.get(dtype)
    if configured is None:
        raise UnknownRoutingError(
            f"{type(block).__name__} returns routing weights in the dtype of its hidden states, "
            "which neither its experts nor the configuration tell"
        )
    return configured


def score_of(router: nn.Module) -> Literal["sigmoid", "sqrtsoftplus"]:
    """The score function that a router keeps as `score_fn`.

    Raises:
        UnknownRoutingError: it is one that no known router has.
    """
    function = value_of(router, "score_fn")
    probe = torch.tensor([-1.0, 0.5])
    with torch.no_grad():
        scores = function(probe)
    if torch.equal(scores, torch.sigmoid(probe)):
        return "sigmoid"
    if torch.equal(scores, nn.functional.softplus(probe).sqrt()):
        return "sqrtsoftplus"
    raise UnknownRoutingError(
        f"{type(router).__name__} scores with {function!r}, which is neither a sigmoid nor a "
        "sqrt-softplus"
    )
