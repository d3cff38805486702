"""Steering plans: what to change in a model's routing, as data.

A plan is a JSON file (version 1) with a list of interventions; each names a layer, experts and the
tokens it acts on. Plans are made by hand, from a table (`moescope.steering.derive`) or in the
dashboard, checked against a model's layers (`moescope.steering.check`) and applied by
`moescope.steering.steer`. This module knows nothing of models and imports no torch.

The actions are in `moescope.steering.interventions`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from moescope.probe.errors import PlanError
from moescope.steering.interventions import (
    AnyIntervention,
    Bias,
    FirstGenerated,
    Force,
    Intervention,
    Mask,
    Replay,
    Scale,
    TokenScope,
    TopK,
    TopP,
    known_fields,
)
from moescope.steering.messages import error_sentence

__all__ = [
    "PLAN_VERSION",
    "Bias",
    "FirstGenerated",
    "Force",
    "Intervention",
    "Mask",
    "Replay",
    "Scale",
    "SteeringPlan",
    "TokenScope",
    "TopK",
    "TopP",
    "plan_schema",
]

#: The version of the plan format that this module reads and writes.
PLAN_VERSION: Final = 1


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

        Layout, order of keys, order of an intervention's experts, layers and prompts, and defaults
        left unsaid make no difference; everything else does, name and provenance too.
        """
        content = self.to_dict()
        for intervention in content["interventions"]:
            for field in ("experts", "layers", "prompt_ids"):
                if field in intervention:
                    intervention[field].sort()
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
    return error_sentence(error, known_fields() | {"": tuple(SteeringPlan.model_fields)})


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
