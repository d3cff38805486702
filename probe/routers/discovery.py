"""Finding the routers of a live model by its family's entry, never by guessing names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from moescope.probe.bridges import plain_modules, underlying
from moescope.probe.errors import ModelInputError, RecordingError
from moescope.probe.routers.families import FAMILIES
from moescope.probe.routers.spec import LayerInfo, RouterSite, RouterSpec

#: Names under which configurations of transformers state a number of routed experts.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def require_moe_family(config: Any, name: str) -> RouterSpec:
    """The family's entry, by a model's configuration alone, before any weight is loaded.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
    """
    family = str(config.model_type)
    spec = FAMILIES.get(family)
    if spec is not None:
        return spec
    supported = ", ".join(sorted(FAMILIES))
    if any(getattr(config, field, None) for field in _EXPERT_FIELDS):
        raise ModelInputError(
            f"{name} is of the family {family!r}, whose routing moescope does not know yet; "
            f"it knows {supported}"
        )
    raise ModelInputError(
        f"{name} (family {family!r}) is a dense model without routers; moescope needs a "
        f"Mixture-of-Experts model ({supported})"
    )


def find_routers(model: nn.Module) -> list[RouterSite]:
    """The routed layers of a model in forward order.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
        RecordingError: a model of a supported family without the modules that its entry names.
    """
    model = underlying(model)
    spec = require_moe_family(model.config, type(model).__name__)
    modules = plain_modules(model)
    sites: list[RouterSite] = []
    for name, module in modules.items():
        if type(module).__name__ != spec.router_class:
            continue
        parent = modules[name.rpartition(".")[0]]
        sites.append(_site(spec, name, module, parent, moe_layer=len(sites)))
    if not sites:
        raise RecordingError(
            f"{type(model).__name__} has no module of class {spec.router_class}, where the "
            f"routers of {spec.family} are expected; this release of transformers may have "
            "renamed it"
        )
    return sites


def _site(
    spec: RouterSpec, name: str, router: nn.Module, parent: nn.Module, moe_layer: int
) -> RouterSite:
    experts = getattr(parent, spec.experts_name, None)
    found = re.search(r"\.(\d+)\.", name)
    if not isinstance(experts, nn.Module) or found is None:
        raise RecordingError(
            f"router {name} has no layer number in its name, or no `{spec.experts_name}` module "
            "beside it"
        )
    rule = spec.read_rule(router)
    shared = spec.shared_name is not None and hasattr(parent, spec.shared_name)
    info = LayerInfo(
        layer=int(found.group(1)),
        kind="mlp",
        moe_layer=moe_layer,
        module=name,
        num_experts=rule.num_experts,
        top_k=rule.top_k,
        num_shared_experts=int(shared),
        rule=rule,
    )
    return RouterSite(info, router, experts)
