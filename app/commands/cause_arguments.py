"""What the commands on causes are given: a question, experts by name, and a second model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moescope.app import console
from moescope.app.commands.steer import select_prompts
from moescope.probe.errors import InputError

if TYPE_CHECKING:
    from moescope.probe.models import ModelBundle
    from moescope.probe.prompts import Prompt
    from moescope.steering.causes.asking import Question
    from moescope.steering.plan import SteeringPlan

_Word = TypeVar("_Word", bound=str)

#: Layer, kind of router, expert.
Place = tuple[int, str, int]


def begin(
    prompts: Sequence[str],
    where: Sequence[str] | None,
    target: str,
    out: Path | None,
    figure: Path | None = None,
) -> list[Prompt]:
    """The prompts, after everything that can be refused without a model."""
    from moescope.probe.analysis.export import check_suffix
    from moescope.steering.causes.asking import TARGETS
    from moescope.steering.figure_page import check_figure_target

    one_of("--target", target, TARGETS)
    if out is not None:
        check_suffix(out)
    if figure is not None:
        check_figure_target(figure)
    return select_prompts(prompts, where)


def ask_of(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    target: Any,
    num_tokens: int,
    limit: int | None,
    seed: int,
    other: ModelBundle | None = None,
) -> Question:
    """The target of a model; another that runs the same rows must know their tokens alike."""
    from moescope.steering.causes.asking import ask

    with console.progress("answering", "prompts") as update:
        question = ask(
            bundle, prompts, target, num_tokens=num_tokens, most=limit, seed=seed, progress=update
        )
    if other is not None:
        own, theirs = (
            {number: token for token, number in one.tokenizer.get_vocab().items()}
            for one in (bundle, other)
        )
        fed = {token for row in question.rows for token in row.token_ids}
        read = {one.token for row in question.rows for one in row.reads}
        for token in sorted(fed | read):
            if own.get(token) != theirs.get(token):
                raise InputError(
                    f"{bundle.name} and {other.name} have different tokenizers: token {token} is "
                    f"{own.get(token)!r} in one and {theirs.get(token)!r} in the other"
                )
    return question


def one_of(option: str, value: str, choices: Sequence[_Word]) -> _Word:
    """The value of an option that takes some words only; InputError for others."""
    for choice in choices:
        if choice == value:
            return choice
    raise InputError(f"{option} is {value!r}; it can be {', '.join(choices)}")


def named_experts(bundle: ModelBundle, text: str) -> list[Place]:
    """Experts from `2:7,3:mlp:10`, each of which the model must have."""
    from moescope.probe.routers import find_routers

    sizes = {(one.info.layer, one.info.kind): one.info.num_experts
             for one in find_routers(bundle.model)}  # fmt: skip
    found: list[Place] = []
    for word in text.split(","):
        parts = [part.strip() for part in word.split(":")]
        if len(parts) not in (2, 3) or not (parts[0].isdecimal() and parts[-1].isdecimal()):
            raise InputError(f"--experts has {word!r}; experts are written LAYER:EXPERT, as 2:7")
        layer, expert = int(parts[0]), int(parts[-1])
        kinds = [kind for at, kind in sizes if at == layer]
        if not kinds:
            known = ", ".join(str(at) for at in dict.fromkeys(at for at, _ in sizes))
            raise InputError(f"layer {layer} has no router; the routed layers are {known}")
        kind = parts[1] if len(parts) == 3 else kinds[0]
        if kind not in kinds or (len(parts) == 2 and len(kinds) > 1):
            raise InputError(
                f"layer {layer} has routers of kind {', '.join(kinds)}; write "
                f"{layer}:{kinds[0]}:{expert}"
            )
        if expert >= sizes[layer, kind]:
            raise InputError(
                f"layer {layer} has experts 0 to {sizes[layer, kind] - 1}, and no expert {expert}"
            )
        found.append((layer, kind, expert))
    return list(dict.fromkeys(found))


def masked_experts(
    bundle: ModelBundle, plan: SteeringPlan, mode: str | None = None
) -> tuple[list[Place], str]:
    """The experts that a plan masks, and the mode that it masks them in."""
    from moescope.probe.routers import find_routers
    from moescope.steering.check import check_shape, layers_of
    from moescope.steering.interventions import Mask

    infos = [one.info for one in find_routers(bundle.model)]
    check_shape(plan, infos)
    masks = [(at, one) for at, one in enumerate(plan.interventions, 1) if isinstance(one, Mask)]
    modes = list(dict.fromkeys(one.mode for _, one in masks))
    if not masks:
        raise InputError(f"plan {plan.title!r} masks no expert, so there is none to take out")
    if mode is None and len(modes) > 1:
        raise InputError(f"plan {plan.title!r} masks by modes {' and '.join(modes)}; name --mode")
    found = [
        (info.layer, info.kind, expert)
        for number, mask in masks
        for info in layers_of(plan, number, infos)
        for expert in mask.experts
    ]
    return list(dict.fromkeys(found)), mode or modes[0]
