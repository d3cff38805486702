"""SGLang's routed experts, as its replies carry them.

Base64 of raw int32, [tokens - 1 - start, hidden layers, k] without a header: the number of layers
and k must be known. Native replies have it in `meta_info.routed_experts`, OpenAI's form in
`sgl_ext.routed_experts` of the reply or of a choice. A file holds one reply as JSON, a list of
them, or one a line.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
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


def read(paths: Sequence[Path], options: ImportOptions) -> Imported:
    """Read replies; `options` must tell k, and the layers where tokens are not counted."""
    report = ImportReport("sglang-reply")
    report.lacks += ["weights", "order", "scores", "token ids"]
    if options.top_k is None:
        raise ImportFileError("replies of SGLang do not say top-k: give --top-k")
    sequences, ids = [], []
    versions = set()
    for path in paths:
        for place, reply in json_records(path):
            for version, where, value, owner in _experts(reply, place):
                versions.add(version)
                sequence, own = _sequence(value, where, reply, owner, options)
                sequences.append(sequence)
                ids.append(SequenceIds(own, where))
    if not ids:
        raise ImportFileError(
            "no reply in it has routed_experts; the server needs --enable-return-routed-experts"
        )
    report.version = " and ".join(sorted(versions))
    if not any(sequence.num_generated for sequence in sequences):
        report.lacks.append("phases")
    if not any(sequence.text for sequence in sequences):
        report.lacks.append("text")
    return Imported(report=report, sequences=sequences, slots=stack_layers(ids, options, report))


def _experts(reply: dict[str, Any], place: str) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Version, place, value and owner of every routed_experts of a reply."""
    meta = reply.get("meta_info")
    if isinstance(meta, dict) and "routed_experts" in meta:
        yield "native", f"{place}, meta_info", meta["routed_experts"], reply
    choices = reply.get("choices")
    owners = (
        [choice for choice in choices if isinstance(choice, dict)]
        if isinstance(choices, list)
        else []
    )
    for number, owner in enumerate(owners):
        extension = owner.get("sgl_ext", reply.get("sgl_ext"))
        if isinstance(extension, dict) and "routed_experts" in extension:
            yield "OpenAI", f"{place}, choice {number}", extension["routed_experts"], owner


def _sequence(
    value: Any, place: str, reply: dict[str, Any], owner: dict[str, Any], options: ImportOptions
) -> tuple[ImportedSequence, Array]:
    flat = _int32(value, place)
    told: dict[str, Any] = next(
        (reply[name] for name in ("meta_info", "usage") if isinstance(reply.get(name), dict)), {}
    )
    counts = [told.get(f"{part}_tokens") for part in ("prompt", "completion")]
    known = [count for count in counts if isinstance(count, int) and count >= 0]
    total = sum(known) if len(known) == 2 else None
    layers = len(options.layers) if options.layers is not None else None
    if layers is None:
        if not total or total < 2 or len(flat) % ((total - 1) * int(options.top_k or 1)):
            raise ImportFileError(
                f"{place}: {len(flat)} ids do not tell how many layers; name them with --layers"
            )
        layers = len(flat) // ((total - 1) * int(options.top_k or 1))
    width = layers * int(options.top_k or 1)
    if not len(flat) or len(flat) % width:
        raise ImportFileError(
            f"{place}: {len(flat)} ids are not {layers} layers x top-{options.top_k} a token"
        )
    ids = flat.reshape(-1, layers, int(options.top_k or 1)).astype(np.int64)
    rows = len(ids) + 1  # the last sampled token has none
    before = total - rows if total is not None and rows <= total < rows + 10_000_000 else 0
    ids = np.pad(ids, ((before, 1), (0, 0), (0, 0)), constant_values=MISSING)
    generated = known[1] if total == len(ids) else 0
    text, answer = texts_of(reply, owner)
    if isinstance(owner.get("text"), str):
        answer = owner["text"]
    return ImportedSequence(
        num_tokens=len(ids), num_generated=generated, key=place, text=text, response=answer
    ), ids


def _int32(value: Any, place: str) -> Array:
    try:
        content = base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ImportFileError(f"{place}: routed_experts is no base64 text") from error
    if len(content) % 4:
        raise ImportFileError(f"{place}: routed_experts is cut short: {len(content)} bytes")
    flat: Array = np.frombuffer(content, "<i4")
    return flat


IMPORTER: Final = Importer(
    name="sglang-reply",
    description="replies of an SGLang server with --enable-return-routed-experts",
    versions=("0.5.23 native (meta_info)", "0.5.23 OpenAI (sgl_ext)"),
    holds="experts of every token; text where the reply has it; no weights, no order",
    read=read,
)
