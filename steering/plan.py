"""Steering plans: what to change in a model's routing, as data.

A plan is a JSON file (version 1) with a list of interventions; each names a layer, experts and the
tokens it acts on. Plans are made by hand, from a table (`moescope.steering.derive`) or in the
dashboard, checked against a model's layers (`moescope.steering.check`) and applied by
`moescope.steering.steer`. This module knows nothing of models and imports no torch.

A new action is one subclass of `Intervention` here, listed in `AnyIntervention`, and one entry in
`moescope.steering.operators`.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from moescope.probe.errors import PlanError
from moescope.steering.messages import error_sentence

#: The version of the plan format that this module reads and writes.
PLAN_VERSION: Final = 1

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
TokenScope: TypeAlias = Annotated[
    Literal["all", "prompt", "generated", "last_prompt"] | FirstGenerated,
    BeforeValidator(_known_scope),
]


class Intervention(BaseModel):
    """One change to one router; `Intervention(action="mask", ...)` makes the class of the action.

    Attributes:
        action: what is done.
        layer: decoder layer index, as in the trace.
        kind: which router of that layer, needed only where there is more than one.
        tokens: the tokens it acts on; `generated` and `first_generated` count input tokens, so
            the first answer token is decided at `last_prompt`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: str
    layer: Index
    kind: str | None = None
    experts: Annotated[
        tuple[Index, ...], Field(json_schema_extra={"minItems": 1, "uniqueItems": True})
    ]
    tokens: TokenScope = "all"

    if TYPE_CHECKING:  # the fields depend on the action

        def __init__(self, **fields: Any) -> None: ...

    def __new__(cls, **fields: Any) -> Intervention:
        """The class of `fields["action"]`, validated; raises PlanError for what it refuses."""
        if cls is not Intervention:
            return super().__new__(cls)
        try:
            return _INTERVENTION.validate_python(fields)
        except ValidationError as error:
            raise PlanError(_sentence(error)) from error

    @field_validator("experts")
    @classmethod
    def _distinct(cls, experts: tuple[int, ...]) -> tuple[int, ...]:
        if not experts:
            raise ValueError("must name at least one expert")
        twice = sorted({expert for expert in experts if experts.count(expert) > 1})
        if twice:
            raise ValueError(f"must name each expert once, and {twice[0]} is there again")
        return experts

    @property
    def setting(self) -> str:
        """The action with what distinguishes it from others of its kind, in a few words."""
        raise NotImplementedError


class Mask(Intervention):
    """The experts cannot be selected; the next best take their slots.

    Attributes:
        mode: `replace` (SteerMoE, arXiv 2509.09660).
        via: what becomes of the masked logit, and so of the other experts' weights: `min`, the
            token's smallest minus 0.01 (SteerMoE); `inf`, minus infinity; `selection`, unchanged.
    """

    action: Literal["mask"]
    mode: Literal["replace"] = "replace"
    via: Literal["min", "inf", "selection"] = "min"

    @property
    def setting(self) -> str:
        """`mask via min`, for example."""
        return f"mask via {self.via}"


class Force(Intervention):
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


AnyIntervention: TypeAlias = Annotated[Mask | Force, Field(discriminator="action")]

_INTERVENTION: TypeAdapter[Intervention] = TypeAdapter(AnyIntervention)


class SteeringPlan(BaseModel):
    """A list of interventions with a name and where they come from.

    Attributes:
        version: of the format.
        name: for people.
        model: the model it was made for.
        provenance: how it was made: run, method, group sizes, caps; any JSON.
        interventions: what is changed; an empty plan changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    version: Literal[1] = PLAN_VERSION
    name: str | None = None
    model: str | None = None
    provenance: dict[str, JsonValue] = {}
    interventions: tuple[AnyIntervention, ...]

    def __init__(
        self,
        *,
        interventions: Iterable[Intervention | dict[str, Any]] = (),
        name: str | None = None,
        model: str | None = None,
        provenance: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Validate; raises PlanError naming intervention and field."""
        fields = {"name": name, "model": model, "interventions": interventions, **others}
        try:
            super().__init__(provenance={} if provenance is None else provenance, **fields)
        except ValidationError as error:
            raise PlanError(_sentence(error)) from error

    @field_validator("interventions", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
            raise ValueError("must be a list of interventions")
        return tuple(value)

    @field_validator("provenance")
    @classmethod
    def _plain_json(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            json.dumps(value, allow_nan=False).encode()
        except ValueError:
            raise ValueError("must be plain JSON, without NaN or infinity") from None
        return value

    @classmethod
    def parse(cls, text: str, *, source: str = "plan") -> SteeringPlan:
        """A plan from JSON text; `source` is what error messages call it."""
        try:
            content = json.loads(
                text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant
            )
        except RecursionError:
            raise PlanError(
                f"{source}: this is not a plan, its JSON is nested too deeply"
            ) from None
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{source}: line {error.lineno}, column {error.colno}: this is not JSON "
                f"({error.msg})"
            ) from error
        except ValueError as error:
            raise PlanError(f"{source}: {error}") from error
        if not isinstance(content, dict):
            raise PlanError(f"{source}: a plan is a JSON object with a list 'interventions'")
        if "interventions" not in content:
            raise PlanError(f"{source}: field 'interventions' is missing; it is a list")
        try:
            return cls(**content)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from error

    @classmethod
    def read(cls, path: str | Path) -> SteeringPlan:
        """The plan in a file; raises PlanError naming file, intervention and field."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise PlanError(
                f"{path}: the plan file cannot be read ({error.strerror or error})"
            ) from error
        except UnicodeDecodeError as error:
            raise PlanError(f"{path}: a plan file is JSON in UTF-8, and this is not") from error
        return cls.parse(text, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON data, defaults written out, absent names left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """The plan as the text of a plan file."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the plan file; raises PlanError when the place cannot be written."""
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise PlanError(
                f"{path}: the plan cannot be written there ({error.strerror or error})"
            ) from error

    @property
    def plan_id(self) -> str:
        """16 hex digits of the SHA-256 of the content.

        Layout, order of keys, order of an intervention's experts and defaults left unsaid make no
        difference; everything else does, name and provenance too.
        """
        content = self.to_dict()
        for intervention in content["interventions"]:
            intervention["experts"].sort()
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """What error messages and figures call it: its name, or else its id."""
        return self.name if self.name else f"plan {self.plan_id}"


def plan_schema() -> dict[str, Any]:
    """The published JSON schema of plan files."""
    return SteeringPlan.model_json_schema(mode="validation") | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moescope steering plan",
    }


def _sentence(error: ValidationError) -> str:
    known = {name: tuple(of.model_fields) for name, of in (("mask", Mask), ("force", Force))}
    return error_sentence(error, known | {"": tuple(SteeringPlan.model_fields)})


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that stands there twice would silently lose its first value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object; keep one")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number; plans hold finite numbers")
