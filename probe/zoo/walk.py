"""Finding the families with routed experts in the installed transformers.

Nothing is imported: the walk reads the modeling files of all families and keeps those whose code
holds experts or reads a number of them. So a family that a new release adds shows up on its own,
with a recipe or without.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from moescope.probe.errors import ModelInputError
from moescope.probe.zoo.build import variants_of
from moescope.probe.zoo.recipes import RECIPES

#: In the code of every family with routed experts, and of few others.
_EXPERTS = re.compile(
    r"\bself\.experts\b|\bnum_experts\b|\bn_routed_experts\b|\bnum_local_experts\b"
)

#: Families that the walk finds although no router of theirs selects experts for text tokens.
NOT_ROUTED = {
    "bamba": "its configuration has a number of experts, but its code has no experts and no router",
    "vitpose_backbone": (
        "a vision model without a router: the caller names one expert for each image"
    ),
}


@dataclass(frozen=True)
class Family:
    """A family found in the installed transformers.

    Attributes:
        name: its folder under `transformers/models`.
        variants: names of the second ways in which its tiny model can be built.
        reason: why there is no tiny model of it; None where there is one.
    """

    name: str
    variants: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        """What `tiny_model` takes: the family and its variants; empty without a tiny model."""
        if self.reason is not None:
            return ()
        return (self.name, *(f"{self.name}+{variant}" for variant in self.variants))


def families() -> list[Family]:
    """Every family with routed experts that the installed transformers holds, by name.

    Raises:
        ModelInputError: transformers is not installed as files that can be read.
    """
    return [_family(name) for name in _names()]


def _family(name: str) -> Family:
    if name in RECIPES:
        return Family(name, variants_of(name))
    return Family(name, reason=NOT_ROUTED.get(name, "no tiny configuration of it is known yet"))


def _names() -> list[str]:
    return sorted(
        path.parent.name
        for path in _models_folder().glob("*/modeling_*.py")
        if path.stem == f"modeling_{path.parent.name}" and _EXPERTS.search(path.read_text("utf-8"))
    )


def _models_folder() -> Path:
    found = importlib.util.find_spec("transformers")
    for location in (found.submodule_search_locations or []) if found is not None else []:
        folder = Path(location) / "models"
        if folder.is_dir():
            return folder
    raise ModelInputError("transformers is not installed as a folder, so its families are unknown")
