"""Which family a model belongs to, and families that other packages add.

A package adds a family by an entry point of the group `moescope.families` whose object is a
`RouterSpec`, or a function without arguments that returns one or several:

    [project.entry-points."moescope.families"]
    my_moe = "my_package.moescope:SPEC"

Families of moescope itself come first: an entry point cannot replace one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from moescope.probe.errors import ModelInputError, RecordingError
from moescope.probe.routers.families import FAMILIES
from moescope.probe.routers.spec import RouterSpec

#: The entry point group.
GROUP = "moescope.families"

#: Names under which configurations of transformers state a number of routed experts.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@cache
def added_families() -> dict[str, RouterSpec]:
    """The families that other installed packages add, by name.

    Raises:
        RecordingError: an entry point that cannot be loaded, is no `RouterSpec`, or names a family
            that is there already.
    """
    found: dict[str, RouterSpec] = {}
    for point in entry_points(group=GROUP):
        try:
            value = point.load()
            specs = value() if callable(value) else value
        except Exception as error:
            raise RecordingError(
                f"the model family {point.name!r} of {point.value} cannot be loaded: {error}"
            ) from error
        for spec in specs if isinstance(specs, Iterable) else (specs,):
            if not isinstance(spec, RouterSpec):
                raise RecordingError(
                    f"the model family {point.name!r} of {point.value} is {spec!r}, not a "
                    "RouterSpec"
                )
            if spec.family in FAMILIES or spec.family in found:
                raise RecordingError(
                    f"{point.value} adds the model family {spec.family!r}, which is there already"
                )
            found[spec.family] = spec
    return found


def known_families() -> dict[str, RouterSpec]:
    """All families: those of moescope and those that other packages add."""
    return FAMILIES | added_families()


def text_config(config: Any) -> Any:
    """The configuration of the part that reads text, or the configuration itself."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def family_of(config: Any) -> RouterSpec | None:
    """The entry of a configuration's family; None for families that are not known.

    The text part decides, then the whole: a vision-language model routes as its text model does.
    """
    known = known_families()
    by_type = {name: spec for spec in known.values() for name in spec.model_types} | known
    for part in (text_config(config), config):
        for name in (str(getattr(part, "model_type", "")), _folder(part)):
            if name in by_type:
                return by_type[name]
    return None


def require_moe_family(config: Any, name: str) -> RouterSpec:
    """The family's entry, by a model's configuration alone, before any weight is loaded.

    Raises:
        ModelInputError: a dense model, or a family that is not supported.
    """
    spec = family_of(config)
    text = text_config(config)
    family = str(config.model_type)
    if spec is not None and spec.is_routed(text):
        return spec
    supported = ", ".join(sorted(known_families()))
    if spec is None and any(getattr(text, field, None) for field in _EXPERT_FIELDS):
        raise ModelInputError(
            f"{name} is of the family {family!r}, whose routing moescope does not know yet; "
            f"it knows {supported}"
        )
    raise ModelInputError(
        f"{name} (family {family!r}) is a dense model without routers; moescope needs a "
        f"Mixture-of-Experts model ({supported})"
    )


def _folder(config: Any) -> str:
    """The folder of transformers that a configuration's class comes from, or nothing."""
    found = re.fullmatch(r"transformers\.models\.(\w+)\.\w+", type(config).__module__)
    return "" if found is None else found.group(1)
