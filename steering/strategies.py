"""All ways to make a plan from findings, by name.

    make_plan("steermoe", table, layers=layers, num_mask=10)

A strategy takes a table of experts; a control (`random`, `load-matched`, `bottom`) takes a plan and
gives the same plan on other experts. Each plan's provenance says which strategy made it, from which
column, and which experts were asked for and left out, why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import pandas as pd

from moescope.probe.analysis.frame import Parameter
from moescope.probe.errors import AnalysisInputError, PlanError
from moescope.steering.check import RoutedLayer
from moescope.steering.controls import (
    NUM_NEAREST,
    bottom_control,
    load_matched_control,
    random_control,
)
from moescope.steering.draft import CommonOptions
from moescope.steering.keeping import ESFT, KEEP, esft, keep
from moescope.steering.plan import SteeringPlan
from moescope.steering.published import (
    BANDARKAR,
    MOTE,
    RICE,
    STEERMOE,
    bandarkar_hard,
    bandarkar_soft,
    mote_stimulate,
    mote_suppress,
    rice,
    steermoe,
)

OUR_CONTROLS: Final = "moescope: controls of every plan; random and bottom experts as in SteerMoE"


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to make a plan.

    Attributes:
        name: as the user types it.
        description: what the plan does, in one sentence.
        source: the paper that it follows.
        parameters: of its own, beside those of `CommonOptions`; controls have their own alone.
        function: makes the plan.
        takes: a table of experts, or a plan of which it makes a control.
        table: what the table must hold; `none` where the strategy needs none.
    """

    name: str
    description: str
    source: str
    parameters: tuple[Parameter, ...]
    function: Callable[..., SteeringPlan]
    takes: Literal["table", "plan"] = "table"
    table: Literal["ranking", "load", "none"] = "ranking"


def make_plan(
    strategy: str,
    frame: pd.DataFrame | None = None,
    *,
    layers: Sequence[RoutedLayer] | None = None,
    of: SteeringPlan | None = None,
    **parameters: Any,
) -> SteeringPlan:
    """A plan by the name of its strategy.

    Args:
        strategy: a name of `STRATEGIES`.
        frame: the table of experts; for `load-matched` that of loads.
        layers: the model's routed layers; controls and `keep` need them.
        of: the plan that a control is for.
        **parameters: of the strategy, and the common ones.

    Raises:
        PlanError: no such strategy or parameter, something it needs is missing, or it cannot make
            the plan.
    """
    known = find_strategy(strategy)
    _check_parameters(known, parameters)
    if known.table != "none" and frame is None:
        raise PlanError(f"strategy {strategy!r} needs a table: a {known.table} of experts")
    if known.takes == "table":
        if of is not None:
            raise PlanError(f"strategy {strategy!r} makes a plan from a table, not from a plan")
        return known.function(frame, layers=layers, **parameters)
    if of is None:
        raise PlanError(f"strategy {strategy!r} is a control; name the plan that it is for")
    if layers is None:
        raise PlanError(f"strategy {strategy!r} needs the model's layers: it takes other experts")
    tables = () if known.table == "none" else (frame,)
    return known.function(of, layers, parameters.pop("seed", 0), *tables, **parameters)


def find_strategy(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        PlanError: there is none.
    """
    if name not in STRATEGIES:
        raise PlanError(f"strategy {name!r} is not available; available: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def parse_settings(strategy: str, settings: Sequence[str]) -> dict[str, Any]:
    """What the user typed as `NAME=VALUE` (dashes in names are fine), for `make_plan`.

    Raises:
        PlanError: no such strategy or parameter, or a value of another type.
    """
    known = {one.name: one for one in find_strategy(strategy).parameters}
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise PlanError(
                f"{setting!r} is no setting of strategy {strategy!r}; its settings are NAME=VALUE "
                f"with NAME one of {', '.join(known)}"
            )
        if name in found:
            raise PlanError(f"{name} is set twice; keep one")
        try:
            found[name] = known[name].parse(value.strip())
        except AnalysisInputError as error:
            raise PlanError(f"strategy {strategy!r}: {error}") from None
    return found


def common_names(strategy: Strategy) -> tuple[str, ...]:
    """The parameters that a strategy takes beside its own."""
    return tuple(CommonOptions.__annotations__) if strategy.takes == "table" else ()


def _check_parameters(strategy: Strategy, given: Mapping[str, Any]) -> None:
    own = {one.name: one for one in strategy.parameters}
    known = (*own, *common_names(strategy))
    for name, value in given.items():
        if name not in known:
            raise PlanError(
                f"strategy {strategy.name!r} has no parameter {name!r}; it has {', '.join(known)}"
            )
        choices = own[name].choices if name in own else ()
        if choices and value not in choices:
            raise PlanError(f"{name} {value!r} is not available; available: {', '.join(choices)}")
    for one in strategy.parameters:
        if one.required and given.get(one.name) is None:
            raise PlanError(f"strategy {strategy.name!r} needs {one.name}: {one.help}")


def _number_of(what: str, default: int, name: str = "num_experts") -> Parameter:
    return Parameter(name=name, type="integer", default=default, help=f"experts to {what}")


_TAU = Parameter(
    name="tau", type="number", default=None,
    help="take experts with a larger number; by default the rows that the table has as above",
)  # fmt: skip
_SUPPRESS = Parameter(
    name="suppress", type="flag", default=False, help="also push down the experts below -tau"
)
_BETA = "factor of the routing weight, over 0"
_VIA = Parameter(
    name="via", type="choice", default="inf", help="what becomes of masked logits",
    choices=("min", "inf", "selection"),
)  # fmt: skip
_SEED = Parameter(name="seed", type="integer", default=0, help="of the draws")
_VALUE = Parameter(
    name="value", type="text", default=None, help="of a table split by a field, the rows to take"
)

STRATEGIES: Final[Mapping[str, Strategy]] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            name="steermoe",
            description="Forces the experts that set 1 uses more and masks those that set 2 uses "
            "more, by |risk difference|.",
            source=STEERMOE,
            function=steermoe,
            parameters=(
                _number_of("force, of those that set 1 uses more", 0, "num_force"),
                _number_of("mask, of those that set 2 uses more", 0, "num_mask"),
                Parameter(name="reverse", type="flag", default=False, help="flip all signs"),
            ),
        ),
        Strategy(
            name="bandarkar-soft",
            description="Adds a share of the token's standard deviation to the logits of experts "
            "above tau.",
            source=BANDARKAR,
            function=bandarkar_soft,
            parameters=(
                _TAU,
                Parameter(
                    name="strength", type="number", default=0.5,
                    help="lambda, in standard deviations of the token's logits",
                ),
                _SUPPRESS,
                Parameter(
                    name="on", type="choice", default="logit", choices=("logit", "selection"),
                    help="selection: for routers that select by another score than they weight by",
                ),
            ),
        ),
        Strategy(
            name="bandarkar-hard",
            description="Forces the experts above tau to the top.",
            source=BANDARKAR,
            function=bandarkar_hard,
            parameters=(_TAU, _SUPPRESS),
        ),
        Strategy(
            name="mote-suppress",
            description="Switches off the experts with the largest scores; slots are not refilled.",
            source=MOTE,
            function=mote_suppress,
            parameters=(_number_of("switch off", 10),),
        ),
        Strategy(
            name="mote-stimulate",
            description="Forces the experts with the largest scores into every selection.",
            source=MOTE,
            function=mote_stimulate,
            parameters=(
                _number_of("force", 10),
                Parameter(
                    name="force", type="choice", default="natural", choices=("natural", "max"),
                    help="natural: the weight of their own score; max: the largest",
                ),
            ),
        ),
        Strategy(
            name="rice",
            description="Multiplies the routing weights of the experts with the highest scores.",
            source=RICE,
            function=rice,
            parameters=(
                Parameter(
                    name="beta", type="number", default=None, required=True,
                    help=f"{_BETA}; the authors tried 2 to 512",
                ),
                _number_of("scale", 2),
                Parameter(
                    name="renormalize", type="flag", default=False,
                    help="a token's weights sum to what they did before",
                ),
            ),
        ),
        Strategy(
            name="esft",
            description="Acts on the experts that ESFT chose: scales or forces them, or masks all "
            "others.",
            source=ESFT,
            function=esft,
            parameters=(
                Parameter(
                    name="use", type="choice", default="scale", choices=("scale", "force", "keep"),
                    help="what is done with them",
                ),
                Parameter(name="beta", type="number", default=2.0, help=f"with scale: {_BETA}"),
                _VIA,
            ),
        ),
        Strategy(
            name="keep",
            description="Masks all experts of a layer but the best, or but the candidates.",
            source=KEEP,
            function=keep,
            parameters=(
                Parameter(
                    name="per_layer", type="integer", default=None,
                    help="experts that each layer keeps; by default the table's candidates",
                ),
                _VIA,
            ),
        ),
        Strategy(
            name="random",
            description="The same plan on other experts of the same layers, drawn at random.",
            source=OUR_CONTROLS,
            function=random_control,
            parameters=(_SEED,),
            takes="plan",
            table="none",
        ),
        Strategy(
            name="load-matched",
            description="The same plan on other experts of the same layers of similar load.",
            source=OUR_CONTROLS,
            function=load_matched_control,
            parameters=(
                _SEED,
                Parameter(
                    name="num_nearest", type="integer", default=NUM_NEAREST,
                    help="one is drawn of so many experts of nearest load",
                ),
                _VALUE,
            ),
            takes="plan",
            table="load",
        ),
        Strategy(
            name="bottom",
            description="The same plan on the experts of the same layers with the smallest "
            "|score|.",
            source=OUR_CONTROLS,
            function=bottom_control,
            parameters=(
                _SEED,
                Parameter(
                    name="rank_by", type="text", default=None, help="the table's column to rank by"
                ),
                _VALUE,
            ),
            takes="plan",
        ),
    )
}  # fmt: skip
"""Name -> strategy, in the order in which they are listed."""
