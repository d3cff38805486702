"""Prompt files: what is read, and what is refused with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moescope.probe.errors import PromptFileError
from moescope.probe.prompts import read_prompt_files, read_prompts


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_all_fields_arrive(tmp_path: Path) -> None:
    file = write(
        tmp_path / "set.jsonl",
        {"id": 7, "prompt": "Where is Rome?", "label": "neutral", "lang": "en", "domain": "facts",
         "pair_id": "p1", "target": "Italy", "answer": "In Italy.", "span": "Rome", "split": "b"},
        "",
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": "Hi"}]},
    )  # fmt: skip
    first, second = read_prompts([file])
    assert (first.prompt_id, first.key, first.set_name) == (0, "7", "set")
    assert (first.label, first.lang, first.domain, first.pair_id) == (
        "neutral", "en", "facts", "p1",
    )  # fmt: skip
    assert (first.target, first.expected, first.span) == ("Italy", "In Italy.", "Rome")
    assert first.meta == {"split": "b"}
    assert second.prompt_id == 1 and second.text == "Hi" and second.messages is not None


def test_csv_and_parquet_say_the_same_as_jsonl(tmp_path: Path) -> None:
    import pandas as pd

    rows = [{"id": "a", "prompt": 'Say "x",\nplease', "lang": "en"}, {"id": "b", "prompt": "Ü"}]
    jsonl = write(tmp_path / "set.jsonl", *rows)
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "set.csv", index=False)
    frame.to_parquet(tmp_path / "set.parquet")
    expected = read_prompts([jsonl])
    assert read_prompts([tmp_path / "set.csv"]) == expected
    assert read_prompts([tmp_path / "set.parquet"]) == expected


def test_ids_count_on_over_files_and_limit_cuts(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"prompt": "a"}, {"prompt": "b"})
    two = write(tmp_path / "two.jsonl", {"prompt": "c"})
    prompts = read_prompts([one, two])
    assert [(p.prompt_id, p.set_name) for p in prompts] == [(0, "one"), (1, "one"), (2, "two")]
    assert [p.text for p in read_prompts([one, two], limit=1)] == ["a"]


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ("{oops", "(line)", "not JSON"),
        ([1, 2], "(line)", "not a JSON object"),
        ({"id": "x"}, "prompt", "missing"),
        ({"prompt": "  "}, "prompt", "expected text"),
        ({"prompt": 3}, "prompt", "expected text"),
        ({"prompt": "a", "messages": []}, "messages", "not both"),
        ({"messages": []}, "messages", "expected a list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages", "role out of"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "no text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the last turn"),
        ({"prompt": "a", "lang": ["en"]}, "lang", "expected text"),
        ({"prompt": "a", "span": "b"}, "span", "does not occur"),
        ({"prompt": "a", "id": "first"}, "id", "was used in line 1"),
        ({"prompt": "a", "id": 1.5}, "id", "expected text or a whole number"),
    ],
)
def test_a_bad_line_names_file_line_and_field(
    tmp_path: Path, line: object, field: str, problem: str
) -> None:
    file = write(tmp_path / "set.jsonl", {"id": "first", "prompt": "ok"}, line)
    with pytest.raises(PromptFileError) as caught:
        read_prompts([file])
    message = str(caught.value)
    assert f"{file}, line 2, field {field!r}" in message and problem in message
    (read,) = read_prompt_files([file], skip_bad_lines=True)
    assert len(read.prompts) == 1 and read.skipped == (message,)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("set.txt", b"hello", "prompt files are .jsonl, .csv or .parquet"),
        ("set.jsonl", b'{"prompt": "\xff"}', "line 1: not UTF-8"),
        ("set.jsonl", b"", "there is no prompt to run"),
        ("set.csv", b"id,prompt\n1,a,b\n", "more cells than the header"),
        ("set.parquet", b"PAR1 it is not", "is not a Parquet file"),
    ],
)
def test_a_bad_file_is_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptFileError, match=problem):
        read_prompts([path])
