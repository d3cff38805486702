"""Prompt files: JSONL, CSV or Parquet, one prompt a line, checked before any model is loaded.

A line has `prompt` (text) or `messages` (chat turns, the last one the user's) and optionally
`id, label, lang, domain, pair_id, target, answer, span`; other fields are kept in `meta`.
Files of well-known sets are read as they are (`prompt_fields.py`), and a line may be a template for
many prompts (`prompt_templates.py`).
Nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moescope.probe.errors import PromptFileError
from moescope.probe.prompt_fields import FieldError, PromptSet, no_text, recognize
from moescope.probe.prompt_templates import expand_template, is_template
from moescope.probe.shipped import shipped_path, shipped_prompt_sets

_JSON_LINES = (".jsonl", ".ndjson")
ROLES = ("system", "user", "assistant")
_TEXT_FIELDS = ("label", "lang", "domain", "pair_id", "target", "answer", "span")
_KNOWN_FIELDS = frozenset({"id", "prompt", "messages", *_TEXT_FIELDS})


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt_id: order over all files of a run, from 0.
        key: the file's `id`, if it has one.
        text: the user's text: `prompt`, or the content of the last message.
        messages: the chat turns where the file gives them.
        set_name: the file's name without its ending.
        expected: the file's `answer`: the known right answer.
        span: a part of `text`; its tokens are marked `in_span`.
        meta: all further fields.
    """

    prompt_id: int
    text: str
    set_name: str
    key: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    label: str | None = None
    lang: str | None = None
    domain: str | None = None
    pair_id: str | None = None
    target: str | None = None
    span: str | None = None
    expected: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFile:
    """One file as read: its prompts, its hash, and the lines left out.

    `recognized` names the set that it was read as; None is our own format.
    """

    path: Path
    sha256: str
    prompts: tuple[Prompt, ...]
    skipped: tuple[str, ...]
    recognized: str | None = None


def read_prompts(paths: Sequence[str | Path], *, limit: int | None = None) -> list[Prompt]:
    """Read prompt files (or shipped sets by name) into one list.

    Args:
        paths: files, or names of shipped sets such as `refusal`.
        limit: keep only the first so many.

    Raises:
        PromptFileError: naming file, line and field of the first thing that is wrong.
    """
    files = read_prompt_files(paths)
    return [prompt for file in files for prompt in file.prompts][:limit]


def read_prompt_files(
    paths: Sequence[str | Path], *, skip_bad_lines: bool = False
) -> list[PromptFile]:
    """Read prompt files; `skip_bad_lines` lists the bad lines in `PromptFile.skipped` instead."""
    files: list[PromptFile] = []
    next_id = 0
    for given in paths:
        file = _read_file(_find(given), next_id, skip_bad_lines)
        next_id += len(file.prompts)
        files.append(file)
    if next_id == 0:
        named = ", ".join(str(path) for path in paths) or "no file given"
        raise PromptFileError(f"there is no prompt to run in {named}")
    return files


def _find(given: str | Path) -> Path:
    path = Path(given)
    if path.is_file():
        return path
    named = shipped_path("prompts", f"{given}.jsonl")
    if named.parent == shipped_path("prompts") and named.is_file():
        return named
    known = ", ".join(shipped_prompt_sets())
    raise PromptFileError(f"prompt file {given} does not exist (shipped sets: {known})")


def _read_file(path: Path, first_id: int, skip_bad_lines: bool) -> PromptFile:
    prompts: list[Prompt] = []
    skipped: list[str] = []
    seen: dict[str, int] = {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptFileError(f"{path} cannot be read: {error.strerror}") from error
    records = list(_records(path, content))
    known = recognize(_plain_records(path, records), path.stem)
    for line, record in records:
        try:
            made = [
                _prompt(own, first_id + len(prompts) + index, path.stem)
                for index, own in enumerate(_own_records(path, record, known))
            ]
            for key in (prompt.key for prompt in made if prompt.key in seen):
                raise FieldError("id", f"{key!r} was used in line {seen[key]}")
        except FieldError as error:
            problem = f"{path}, line {line}, field {error.name!r}: {error.problem}"
            if not skip_bad_lines:
                raise PromptFileError(problem) from error
            skipped.append(problem)
            continue
        seen.update((prompt.key, line) for prompt in made if prompt.key is not None)
        prompts.extend(made)
    return PromptFile(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        prompts=tuple(prompts),
        skipped=tuple(skipped),
        recognized=None if known is None else known.name,
    )


def _plain_records(
    path: Path, records: Sequence[tuple[int, Mapping[str, Any] | FieldError]]
) -> list[Mapping[str, Any]]:
    """The lines whose columns tell what set the file is."""
    return [
        record
        for _, record in records
        if not isinstance(record, FieldError) and not _is_template(path, record)
    ]


def _is_template(path: Path, record: Mapping[str, Any]) -> bool:
    return path.suffix.lower() in _JSON_LINES and is_template(record)


def _own_records(
    path: Path, record: Mapping[str, Any] | FieldError, known: PromptSet | None
) -> Sequence[Mapping[str, Any]]:
    """A line's prompts as lines of our own format: one, or several of a template or a wide row."""
    if isinstance(record, FieldError):
        raise record
    if _is_template(path, record):
        return expand_template(record)
    return [record] if known is None else known.own_records(record, path.stem)


def _records(path: Path, content: bytes) -> Iterator[tuple[int, Mapping[str, Any] | FieldError]]:
    """Each line's number (from 1, as an editor counts) and its fields, or what is wrong."""
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES:
        yield from _jsonl_records(path, content)
    elif suffix == ".csv":
        yield from _csv_records(path, content)
    elif suffix == ".parquet":
        yield from _parquet_records(path)
    else:
        raise PromptFileError(
            f"{path} ends in {suffix or 'nothing'!r}; prompt files are .jsonl, .csv or .parquet"
        )


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptFileError(f"{path}, line {line}: not UTF-8 text") from error


def _jsonl_records(
    path: Path, content: bytes
) -> Iterator[tuple[int, Mapping[str, Any] | FieldError]]:
    # Not str.splitlines: it also breaks at characters that JSON allows inside a string.
    for number, text in enumerate(_decoded(path, content).split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            yield number, FieldError("(line)", f"not JSON ({error})")
            continue
        if not isinstance(record, dict):
            yield number, FieldError("(line)", "not a JSON object")
            continue
        yield number, record


def _csv_records(path: Path, content: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import csv
    import io

    reader = csv.DictReader(io.StringIO(_decoded(path, content), newline=""))
    for record in reader:
        if None in record:
            raise PromptFileError(f"{path}, line {reader.line_num}: more cells than the header has")
        yield reader.line_num, {name: value for name, value in record.items() if value}


def _parquet_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise PromptFileError(f"{path} is not a Parquet file ({error})") from error
    for number, record in enumerate(rows, 1):
        yield number, {name: value for name, value in record.items() if value is not None}


def _prompt(record: Mapping[str, Any], prompt_id: int, set_name: str) -> Prompt:
    messages = _messages(record)
    text = messages[-1]["content"] if messages else _text(record)
    fields = {name: _optional_text(record, name) for name in _TEXT_FIELDS}
    span = fields["span"]
    if span is not None and span not in text:
        raise FieldError("span", f"{span!r} does not occur in the prompt")
    key = record.get("id")
    if key is not None and not isinstance(key, (str, int)):
        raise FieldError("id", f"expected text or a whole number, got {key!r}")
    return Prompt(
        prompt_id=prompt_id,
        key=None if key is None else str(key),
        text=text,
        messages=messages,
        set_name=set_name,
        expected=fields.pop("answer"),
        meta={name: value for name, value in record.items() if name not in _KNOWN_FIELDS},
        **fields,
    )


def _text(record: Mapping[str, Any]) -> str:
    if "prompt" not in record:
        raise no_text(record)
    text = record["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise FieldError("prompt", f"expected text, got {text!r}")
    return text


def _optional_text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, (str, int)) or value == "":
        raise FieldError(name, f"expected text, got {value!r}")
    return str(value)


def _messages(record: Mapping[str, Any]) -> tuple[Mapping[str, str], ...] | None:
    if "messages" not in record:
        return None
    if "prompt" in record:
        raise FieldError("messages", "a line has `prompt` or `messages`, not both")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise FieldError("messages", "expected a list of {role, content}")
    turns: list[Mapping[str, str]] = []
    for turn in messages:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise FieldError("messages", f"each turn needs a role out of {', '.join(ROLES)}")
        content = turn.get("content")
        if not isinstance(content, str) or not content.strip():
            raise FieldError("messages", f"the {turn['role']} turn has no text in `content`")
        turns.append({"role": str(turn["role"]), "content": content})
    if turns[-1]["role"] != "user":
        raise FieldError("messages", "the last turn must be the user's")
    return tuple(turns)


def prompt_field(prompt: Prompt, name: str) -> str | None:
    """A prompt's field by name: one of its own, or a key of `meta`."""
    value = getattr(prompt, name, None) if name != "meta" else None
    if value is None:
        value = prompt.meta.get(name)
    return None if value is None else str(value)
