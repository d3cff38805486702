"""Controls of decoding methods: the same method with something arbitrary where it chooses.

- `random-rank:SEED`: self-contrast whose weak forward uses another unchosen rank.
- `random-references:SEED`: re-mixing with references drawn at random instead of the nearest.

Everything else is equal: prompts, batches, sampling, and all other settings. If a control changes
answers as the method does, then not the choice did it but that something was changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from random import Random
from typing import Any, Final

from torch import nn

from moescope.probe.routers import RouterSite
from moescope.steering.computed_routing import routed_layers
from moescope.steering.contrast_decoding import SelfContrast, contrasting
from moescope.steering.decoding import DecodingControl
from moescope.steering.remix import Remix, remix
from moescope.steering.remix_store import References

RANDOM_RANK: Final = "random-rank"
RANDOM_REFERENCES: Final = "random-references"


def contrast_controls(
    model: nn.Module, contrast: SelfContrast, *, number: int, seed: int = 0
) -> tuple[list[DecodingControl], list[str]]:
    """Self-contrast by other ranks.

    A rank is drawn with each of the seeds `seed`, `seed + 1`, ... among those that no layer
    chooses (rank K and beyond, as the method's own by default), without that of the method and
    those drawn before; the same in all layers. Chosen ranks are left out: a weak forward by one of
    them is near the strong one, so that nearly nothing would be contrasted.

    Args:
        model: a transformers decoder, or a TransformerLens bridge around one.
        contrast: the method's settings.
        number: of controls.
        seed: of the first.

    Returns:
        The controls, and a note where there are fewer than asked for.

    Raises:
        PlanError: a family whose routing cannot be steered.
    """
    infos = [site.info for site in routed_layers(model, "self-contrast")]
    used = {info.top_k if contrast.rank is None else contrast.rank for info in infos}
    unchosen = range(max(info.top_k for info in infos), min(info.num_experts for info in infos))
    free = [rank for rank in unchosen if rank not in used]
    controls: list[DecodingControl] = []
    for control_seed in range(seed, seed + min(number, len(free))):
        rank = Random(control_seed).choice(free)
        free.remove(rank)
        other = replace(contrast, rank=rank)

        def decoding(
            _: Sequence[RouterSite], other: SelfContrast = other
        ) -> AbstractContextManager[Any]:
            return contrasting(model, other)

        controls.append(DecodingControl(
            name=f"{RANDOM_RANK}:{control_seed}", decoding=decoding, settings=asdict(other),
        ))  # fmt: skip
    notes = [f"control {one.name}: the weak forward by rank {one.settings['rank']}"
             for one in controls]  # fmt: skip
    if len(controls) < number:
        notes.append(
            f"{len(controls)} of {number} controls: there are no more unchosen ranks beside the "
            "method's"
        )
    return controls, notes


def remix_controls(
    model: nn.Module,
    references: References,
    texts: Mapping[int, str],
    settings: Remix,
    *,
    number: int,
    seed: int = 0,
) -> tuple[list[DecodingControl], list[str]]:
    """Re-mixing by references that have nothing to do with the prompt.

    With each of the seeds `seed`, `seed + 1`, ... every prompt gets as many references drawn at
    random, without replacement, among those that are not its nearest ones; they take the nearest
    ones' kernel weights in the order drawn.

    Args:
        model: a transformers model, or a TransformerLens bridge around one.
        references: the samples that the method chooses from.
        texts: of the prompts that will run, by prompt id.
        settings: the method's.
        number: of controls.
        seed: of the first.

    Returns:
        The controls, and a note: what they are, or why there are none.
    """
    least = 2 * settings.num_neighbours
    if len(references) < least:
        told = [
            f"no control: {len(references)} references, and {least} are needed so that others than "
            f"the {settings.num_neighbours} nearest can be drawn"
        ]
        return [], told if number else []
    controls = []
    for control_seed in range(seed, seed + number):
        drawn = replace(settings, drawn_by=control_seed)

        def decoding(
            sites: Sequence[RouterSite], drawn: Remix = drawn
        ) -> AbstractContextManager[Any]:
            return remix(model, references, texts, drawn, sites=sites)

        controls.append(DecodingControl(
            name=f"{RANDOM_REFERENCES}:{control_seed}", decoding=decoding,
            settings={**asdict(drawn), "references": list(references.keys)},
        ))  # fmt: skip
    told = ["controls: references drawn at random instead of the nearest, with the same weights"]
    return controls, told if controls else []
