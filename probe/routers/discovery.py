"""Finding the routers of a live model by its family's entry, never by guessing names."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

from torch import Tensor, nn

from moescope.probe.bridges import plain_modules, underlying
from moescope.probe.errors import RecordingError, UnknownRoutingError
from moescope.probe.routers.implementations import (
    implementation_of,
    is_quantised,
    require_visible,
)
from moescope.probe.routers.registry import require_moe_family, text_config
from moescope.probe.routers.spec import LayerInfo, RouterSite, RouterSpec

#: The first number in a module's name is its layer.
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def find_routers(model: nn.Module) -> list[RouterSite]:
    """The routed layers of a model in forward order.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
        RecordingError: a model of a supported family without the modules that its entry names.
        UnknownRoutingError: a part of a router's rule cannot be read.
    """
    model = underlying(model)
    spec = require_moe_family(model.config, type(model).__name__)
    config = text_config(model.config)
    classes = {one.router_class: one for one in (spec, *spec.variants)}
    modules = plain_modules(model)
    seen: Counter[str] = Counter()
    sites: list[RouterSite] = []
    for name, module in modules.items():
        own = classes.get(type(module).__name__)
        if own is None or not own.covers(name):
            continue
        kind = own.kind(name)
        sites.append(_site(own, name, modules, config, kind, moe_layer=seen[kind]))
        seen[kind] += 1
    if not sites:
        cause = (
            "quantisation may have put another in its place: leave the routers out of it"
            if is_quantised(model.config)
            else "this release of transformers may have renamed it"
        )
        raise RecordingError(
            f"{type(model).__name__} has no module of class {spec.router_class}, where the "
            f"routers of {spec.family} are expected; {cause}"
        )
    return _in_forward_order(sites)


def _in_forward_order(sites: list[RouterSite]) -> list[RouterSite]:
    """Layer by layer, attention before what follows it; modules are listed as they were made."""
    stacks: dict[str, int] = {}

    def key(site: RouterSite) -> tuple[int, int, bool]:
        stack = _LAYER.split(site.info.module, maxsplit=1)[0]
        order = stacks.setdefault(stack, len(stacks))
        return order, site.info.layer, site.info.kind != "attention"

    return sorted(sites, key=key)


def _site(
    spec: RouterSpec,
    name: str,
    modules: dict[str, nn.Module],
    config: Any,
    kind: str,
    moe_layer: int,
) -> RouterSite:
    router, block_name = modules[name], name.rpartition(".")[0]
    block, around = modules[block_name], modules[block_name.rpartition(".")[0]]
    experts = getattr(block, spec.experts_name, None)
    found = _LAYER.search(name)
    if not isinstance(experts, nn.Module) or found is None:
        raise RecordingError(
            f"router {name} has no layer number in its name, or no `{spec.experts_name}` module "
            "beside it"
        )
    experts = modules[f"{block_name}.{spec.experts_name}".lstrip(".")]
    where = f"layer {found.group(1)} ({name})"
    require_visible(where, block)
    try:
        rule = spec.read_rule(router, block, config)
    except (UnknownRoutingError, ValueError) as error:  # the latter: no router has such a rule
        raise UnknownRoutingError(f"{where}: {error}") from error
    info = LayerInfo(
        layer=int(found.group(1)),
        kind=kind,
        moe_layer=moe_layer,
        module=name,
        num_experts=rule.num_experts,
        top_k=rule.top_k,
        num_shared_experts=_num_shared(spec, around if spec.shared_beside else block, config),
        rule=rule,
        implementation=implementation_of(router, block, experts),
    )
    find_bias = _no_bias if spec.bias is None else partial(spec.bias, router, block)
    return RouterSite(
        info=info,
        router=router,
        experts=experts,
        block=block,
        form=spec.form,
        find_bias=find_bias,
        record_only=spec.record_only,
        more_experts=tuple(modules[f"{block_name}.{other}"] for other in spec.more_experts),
    )


def _no_bias() -> Tensor | None:
    """What families without a selection bias have."""
    return None


def _num_shared(spec: RouterSpec, holder: nn.Module, config: Any) -> int:
    """Shared experts beside the routed ones; one where no number is configured."""
    if spec.shared_name is None:
        return 0
    if not isinstance(getattr(holder, spec.shared_name, None), nn.Module):
        return 0
    count = None if spec.shared_count is None else getattr(config, spec.shared_count, None)
    return count if isinstance(count, int) else 1
