"""The actions of a steering plan, as data: one class each.

A new action is one subclass of `Intervention` here, listed in `AnyIntervention`, and one entry in
`moescope.steering.operators`. This module knows nothing of models and imports no torch.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from moescope.probe.errors import PlanError
from moescope.steering.messages import error_sentence

_NAMED_SCOPES = ("all", "prompt", "generated", "last_prompt")


class FirstGenerated(BaseModel):
    """The first N generated tokens of each sequence, as a token scope."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_generated: Annotated[int, Field(ge=1)]


def _as_index(value: object) -> object:
    """Any whole number (numpy's too) as an int; never a bool, a float or a digit string."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError("must be an integer")
    return operator.index(value)


def _as_number(value: object) -> object:
    """Any real number (numpy's too) as a float; never a bool or a string."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError("must be a number")
    return float(value)


def _known_scope(value: object) -> object:
    """Refuse what is no token scope with one sentence instead of one for each alternative."""
    if isinstance(value, FirstGenerated) or value in _NAMED_SCOPES:
        return value
    if isinstance(value, dict) and list(value) == ["first_generated"]:
        count = value["first_generated"]
        if isinstance(count, int) and not isinstance(count, bool) and count >= 1:
            return value
    raise ValueError(
        f'must be {", ".join(_NAMED_SCOPES)} or {{"first_generated": N}} with N at least 1'
    )


Index: TypeAlias = Annotated[int, Field(ge=0), BeforeValidator(_as_index)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_as_number)]
Indices: TypeAlias = Annotated[
    tuple[Index, ...], Field(json_schema_extra={"minItems": 1, "uniqueItems": True})
]
TokenScope: TypeAlias = Annotated[
    Literal["all", "prompt", "generated", "last_prompt"] | FirstGenerated,
    BeforeValidator(_known_scope),
]


def _distinct(values: tuple[int, ...] | None, what: str) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not values:
        raise ValueError(f"must name at least one {what}")
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"must name each {what} once, and {twice[0]} is there again")
    return values


class Intervention(BaseModel):
    """One change to the routers of one or more layers.

    `Intervention(action="mask", ...)` makes the class of the action.

    Attributes:
        action: what is done.
        layer: decoder layer index, as in the trace; or
        layers: several of them.
        kind: which router of a layer, needed only where there is more than one.
        tokens: the tokens it acts on; `generated` and `first_generated` count input tokens, so
            the first answer token is decided at `last_prompt`.
        prompt_ids: the prompts it acts on; all of them without it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"oneOf": [{"required": ["layer"]}, {"required": ["layers"]}]},
    )

    action: str
    layer: Index | None = None
    layers: Indices | None = None
    kind: str | None = None
    tokens: TokenScope = "all"
    prompt_ids: Indices | None = None

    if TYPE_CHECKING:  # the fields depend on the action

        def __init__(self, **fields: Any) -> None: ...

        @property
        def experts(self) -> tuple[int, ...]:
            """The experts it acts on; none where it acts on all of a layer."""

    def __new__(cls, **fields: Any) -> Intervention:
        """The class of `fields["action"]`, validated; raises PlanError for what it refuses."""
        if cls is not Intervention:
            return super().__new__(cls)
        try:
            return _INTERVENTION.validate_python(fields)
        except ValidationError as error:
            raise PlanError(error_sentence(error, known_fields())) from error

    @field_validator("layers")
    @classmethod
    def _distinct_layers(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return _distinct(layers, "layer")

    @field_validator("prompt_ids")
    @classmethod
    def _distinct_prompts(cls, prompts: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return _distinct(prompts, "prompt")

    @model_validator(mode="after")
    def _somewhere(self) -> Intervention:
        if self.layer is None and self.layers is None:
            raise ValueError("field 'layer' is missing")
        if self.layer is not None and self.layers is not None:
            raise ValueError("fields 'layer' and 'layers' exclude each other; keep one")
        return self

    @property
    def on_layers(self) -> tuple[int, ...]:
        """The decoder layers it acts on."""
        return (self.layer,) if self.layer is not None else self.layers or ()

    @property
    def setting(self) -> str:
        """The action with what distinguishes it from others of its kind, in a few words."""
        raise NotImplementedError


class ExpertIntervention(Intervention):
    """A change to single experts."""

    experts: Indices

    @field_validator("experts")
    @classmethod
    def _distinct_experts(cls, experts: tuple[int, ...]) -> tuple[int, ...]:
        _distinct(experts, "expert")
        return experts


class RouterIntervention(Intervention):
    """A change to a router as a whole."""

    @property
    def experts(self) -> tuple[int, ...]:
        """None: it acts on all experts of its layers."""
        return ()


class Mask(ExpertIntervention):
    """The experts do no work.

    Attributes:
        mode: `replace`: they cannot be selected, the next best take their slots (SteerMoE, arXiv
            2509.09660); `drop_renorm`: selected, their weight becomes 0 and the others are
            normalized again, the slot is not refilled (MoTE); `drop`: their weight becomes 0 and
            nothing else changes.
        via: with `replace`, what becomes of the masked logit, and so of the other experts'
            weights: `min`, the token's smallest minus 0.01 (SteerMoE); `inf`, minus infinity;
            `selection`, unchanged.
        fill_up: only with `replace` via `min`: the logit alone is edited, as SteerMoE's code does,
            so that masked experts still take the slots that too few others are left for. Routers
            that select by more than the logits (a selection bias, groups, a table) may then select
            a masked expert before others. Unsaid where it is false, so that such plans keep their
            ids.
    """

    action: Literal["mask"]
    mode: Literal["replace", "drop_renorm", "drop"] = "replace"
    via: Literal["min", "inf", "selection"] = "min"
    fill_up: Annotated[bool, Field(exclude_if=operator.not_)] = False

    @model_validator(mode="after")
    def _via_of_replace(self) -> Mask:
        if self.mode != "replace" and self.via != "min":
            raise ValueError(
                f"via {self.via!r} says how slots are refilled, and mode {self.mode!r} refills "
                "none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fill_up_of_min(self) -> Mask:
        if self.fill_up and (self.mode != "replace" or self.via != "min"):
            raise ValueError(
                "fill_up says that masked experts of the smallest logits may still be selected, "
                "which only mode 'replace' via 'min' can mean; leave it out"
            )
        return self

    @property
    def setting(self) -> str:
        """`mask via min`, for example."""
        if self.mode != "replace":
            return f"mask {self.mode}"
        return f"mask via {self.via}" + (" filling up" if self.fill_up else "")


class Force(ExpertIntervention):
    """The experts are always selected.

    Attributes:
        strength: `max`, the logit becomes the token's largest plus 0.01 (SteerMoE); `natural`,
            the weight stays what the expert's own score gives.
    """

    action: Literal["force"]
    strength: Literal["max", "natural"] = "max"

    @property
    def setting(self) -> str:
        """`force max`, for example."""
        return f"force {self.strength}"


class Bias(ExpertIntervention):
    """Something is added to the experts' logits.

    Attributes:
        value: how much.
        unit: `logit`, or `std`: standard deviations of the token's logits (soft steering of
            Bandarkar et al., arXiv 2510.04694).
        on: `logit`: selection and weights follow; `selection`: it is added to the selection score
            only, and the weights stay those of the unchanged logits. Where experts come from a
            table by token id there is no selection score: only weights follow.
    """

    action: Literal["bias"]
    value: Number
    unit: Literal["logit", "std"] = "logit"
    on: Literal["logit", "selection"] = "logit"

    @property
    def setting(self) -> str:
        """`bias +0.5 std`, for example."""
        where = " on selection" if self.on == "selection" else ""
        return f"bias {self.value:+g} {self.unit}{where}"


class Scale(ExpertIntervention):
    """The experts' routing weights are multiplied where they are selected (RICE).

    Attributes:
        value: the factor, at least 0.
        renormalize: whether a token's weights then sum to what they did before.
    """

    action: Literal["scale"]
    value: Annotated[Number, Field(ge=0)]
    renormalize: bool = False

    @property
    def setting(self) -> str:
        """`scale x4`, for example."""
        return f"scale x{self.value:g}" + (" renormalized" if self.renormalize else "")


class Replay(RouterIntervention):
    """Routes exactly as a recorded run did.

    Attributes:
        run: name of that run; whoever steers hands over its routing under this name.
    """

    action: Literal["replay"]
    run: Annotated[str, Field(min_length=1)]

    @property
    def setting(self) -> str:
        """`replay of base`, for example."""
        return f"replay of {self.run}"


class TopK(RouterIntervention):
    """Another number of experts per token.

    Attributes:
        value: that number.
    """

    action: Literal["top_k"]
    value: Annotated[Index, Field(ge=1)]

    @property
    def setting(self) -> str:
        """`top_k 4`, for example."""
        return f"top_k {self.value}"


class TopP(RouterIntervention):
    """As few experts per token as exceed a probability (arXiv 2403.07652).

    Attributes:
        value: that probability, over 0 and at most 1; the best experts are taken until theirs add
            up to more.
    """

    action: Literal["top_p"]
    value: Annotated[Number, Field(gt=0, le=1)]

    @property
    def setting(self) -> str:
        """`top_p 0.4`, for example."""
        return f"top_p {self.value:g}"


AnyIntervention: TypeAlias = Annotated[
    Mask | Force | Bias | Scale | Replay | TopK | TopP, Field(discriminator="action")
]

_CLASSES: dict[str, type[Intervention]] = {
    "mask": Mask, "force": Force, "bias": Bias, "scale": Scale, "replay": Replay, "top_k": TopK,
    "top_p": TopP,
}  # fmt: skip
_INTERVENTION: TypeAdapter[Intervention] = TypeAdapter(AnyIntervention)


def known_fields() -> dict[str, tuple[str, ...]]:
    """The fields of each action."""
    return {name: tuple(of.model_fields) for name, of in _CLASSES.items()}
