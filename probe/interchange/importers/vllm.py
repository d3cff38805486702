"""vLLM's routed experts, as its replies carry them.

- 0.33: every choice has `routed_experts`, base64 of a `.npy` [tokens - 1, layers, k]; the last
  sampled token has no row; dense layers are rows of zeros; what `routed_experts_prompt_start` left
  out is told by `usage.total_tokens`.
- 0.21: `prompt_routed_experts` [prompt, moe layers, k] on the response and `routed_experts`
  [generated, moe layers, k] on the choice, as nested lists; -1 where a prefix was cached.
- before: one nested list [tokens, layers, k] as `routed_experts` on the choice.

A file holds one reply as JSON, a list of them, or one a line. Ids are logical. NeMo-RL's -1 for a
missing route is understood.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from moescope.probe.errors import ImportFileError
from moescope.probe.interchange.files import json_records
from moescope.probe.interchange.imported import (
    MISSING,
    Array,
    Imported,
    ImportedSequence,
    ImportOptions,
)
from moescope.probe.interchange.registry import Importer
from moescope.probe.interchange.replies import SequenceIds, stack_layers, texts_of
from moescope.probe.interchange.report import ImportReport

_LONGEST: Final = 10_000_000


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read replies, every choice of which becomes a sequence."""
    report = ImportReport("vllm")
    report.lacks += ["weights", "order", "scores", "token ids"]
    found: list[_Choice] = []
    for path in paths:
        for place, reply in json_records(path):
            found += _choices(reply, place)
    if not found:
        raise ImportFileError("no choice in it has routed_experts; ask the server for them")
    versions = sorted({choice.version for choice in found})
    if len(versions) > 1:
        raise ImportFileError(f"it mixes replies of {' and '.join(versions)}; import each apart")
    report.version = versions[0]
    if not all(choice.knows_phases for choice in found):
        report.lacks.append("phases")
    if not any(choice.sequence.text for choice in found):
        report.lacks.append("text")
    ids = [SequenceIds(choice.ids, choice.place) for choice in found]
    return Imported(
        report=report,
        sequences=[choice.sequence for choice in found],
        slots=stack_layers(ids, options, report),
        model=found[0].model,
    )


@dataclass(frozen=True)
class _Choice:
    """One choice of a reply: ids [tokens, layers, k] and the sequence they are of."""

    version: str
    place: str
    ids: Array
    sequence: ImportedSequence
    knows_phases: bool
    model: str | None


def _choices(reply: dict[str, Any], place: str) -> list[_Choice]:
    choices = reply.get("choices")
    if not isinstance(choices, list):
        raise ImportFileError(f"{place}, field 'choices': expected a list; this is no vLLM reply")
    prompt_ids = reply.get("prompt_routed_experts")
    prompt = None if prompt_ids is None else _nested(prompt_ids, f"{place}, prompt_routed_experts")
    usage: dict[str, Any] = reply["usage"] if isinstance(reply.get("usage"), dict) else {}
    told = usage.get("prompt_tokens")
    model = reply.get("model") if isinstance(reply.get("model"), str) else None
    found = []
    for number, choice in enumerate(choices):
        where = f"{place}, choice {number}"
        if not isinstance(choice, dict):
            raise ImportFileError(f"{where}: not a JSON object")
        value = choice.get("routed_experts")
        if value is None:
            continue
        if isinstance(value, str):
            version, ids = "0.33", _npy(value, where)
            ids = _padded(ids, usage.get("total_tokens"))
            prompt_tokens = told if isinstance(told, int) and 0 < told < len(ids) else None
        else:
            version, ids = "before 0.21", _nested(value, f"{where}, routed_experts")
            prompt_tokens = told if isinstance(told, int) and 0 < told <= len(ids) else None
        if prompt is not None:
            if ids.shape[1:] != prompt.shape[1:]:
                raise ImportFileError(
                    f"{where}: prompt and answer have other layers or another k: "
                    f"{list(prompt.shape)} and {list(ids.shape)}"
                )
            version, prompt_tokens = "0.21", len(prompt)
            ids = np.concatenate([prompt, ids])
        generated = 0 if prompt_tokens is None else len(ids) - prompt_tokens
        text, answer = texts_of(reply, choice)
        sequence = ImportedSequence(
            num_tokens=len(ids), num_generated=generated,
            key=f"{reply.get('id') or place}-{number}", text=text, response=answer,
        )  # fmt: skip
        found.append(_Choice(version, where, ids, sequence, prompt_tokens is not None, model))
    return found


def _padded(ids: Array, total: Any) -> Array:
    """Rows for the tokens that have none: the last one, and those before the asked start."""
    before = 0
    if isinstance(total, int) and len(ids) + 1 < total <= _LONGEST:
        before = total - 1 - len(ids)
    return np.pad(ids, ((before, 1), (0, 0), (0, 0)), constant_values=MISSING)


def _npy(text: str, place: str) -> Array:
    try:
        content = base64.b64decode(text, validate=True)
        header = io.BytesIO(content)
        version = np.lib.format.read_magic(header)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(header)
        if dtype.hasobject or dtype.kind not in "iu" or len(shape) != 3:
            raise ImportFileError(
                f"{place}: routed_experts is {dtype} {list(shape)}, not whole numbers "
                "[tokens, layers, k]"
            )
        if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(content) - header.tell():
            raise ImportFileError(f"{place}: routed_experts is cut short")
        flat = np.frombuffer(content, dtype, offset=header.tell())
    except ImportFileError:
        raise
    except Exception as error:  # the header is a Python literal, which fails in many ways
        raise ImportFileError(f"{place}: routed_experts is no base64 of a .npy file") from error
    ids: Array = flat.reshape(shape, order="F" if fortran else "C").astype(np.int64)
    return ids


def _nested(value: Any, place: str) -> Array:
    try:
        ids: Array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise ImportFileError(f"{place}: the rows are not all as long as each other") from error
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise ImportFileError(f"{place}: expected whole numbers as [tokens, layers, k]")
    return ids.astype(np.int64)


IMPORTER: Final = Importer(
    name="vllm",
    description="replies of a vLLM server that returns routed experts, JSON or JSON lines",
    versions=("0.33 (base64 of .npy)", "0.21 (prompt and answer as lists)", "before (one list)"),
    holds="experts of every token; text where the reply has it; no weights, no order",
    read=read,
)
