"""Prompt files: what is read, and what is refused with file, line and field."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.probe.errors import PromptFileError
from moescope.probe.prompt_fields import ONE_COLUMN, SETS
from moescope.probe.prompts import Prompt, read_prompt_files, read_prompts


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


TEMPLATE = {
    "id": "t", "template": "What happened {time}{place}?", "time": ["in 1990 ", "", 7],
    "place": ["in Oslo", "in {Rome}"], "label": "neutral", "source": "made up",
}  # fmt: skip


def test_a_template_is_the_product_of_its_lists(tmp_path: Path) -> None:
    lines = ({"prompt": "Hi"}, TEMPLATE, {"id": "last", "prompt": "Bye"})
    (file,) = read_prompt_files([write(tmp_path / "set.jsonl", *lines)])
    assert file.recognized is None
    assert [prompt.prompt_id for prompt in file.prompts] == list(range(8))
    made = file.prompts[1:-1]
    assert [prompt.text for prompt in made] == [
        "What happened in 1990 in Oslo?", "What happened in 1990 in {Rome}?",
        "What happened in Oslo?", "What happened in {Rome}?",
        "What happened 7in Oslo?", "What happened 7in {Rome}?",
    ]  # fmt: skip
    assert [prompt.key for prompt in made] == ["t-0-0", "t-0-1", "t-1-0", "t-1-1", "t-2-0", "t-2-1"]
    assert [prompt.pair_id for prompt in made[::2]] == ["in 1990 ", "t-1", "7"]
    assert {prompt.label for prompt in made} == {"neutral"}
    assert made[1].meta == {"time": "in 1990 ", "place": "in {Rome}", "source": "made up"}


def test_a_template_may_fill_our_own_fields_repeat_a_placeholder_and_hold_braces(
    tmp_path: Path,
) -> None:
    line = {"template": "{{{span}}} or {span}?", "span": ["Rome", "Oslo"], "pair_id": "p"}
    prompts = read_prompts([write(tmp_path / "set.jsonl", line)])
    assert [(p.key, p.text, p.span, p.pair_id, p.meta) for p in prompts] == [
        ("template-0", "{Rome} or Rome?", "Rome", "p", {}),
        ("template-1", "{Oslo} or Oslo?", "Oslo", "p", {}),
    ]


def test_template_is_an_ordinary_field_beside_a_prompt_and_outside_json_lines(
    tmp_path: Path,
) -> None:
    own = write(tmp_path / "own.jsonl", {"prompt": "Hi", "template": "{x}"})
    table = write(tmp_path / "set.csv", "text,template", "Hi,{x}")
    assert [prompt.meta for prompt in read_prompts([own, table])] == [{"template": "{x}"}] * 2


BIG = {"a": list(range(400)), "b": list(range(251))}


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ({"template": 3}, "template", "expected text"),
        ({"template": "Why?"}, "template", "names no {placeholder}"),
        ({"template": "Why {", "x": ["a"]}, "template", "written twice"),
        ({"template": "Why {}?"}, "template", "a field's name in braces"),
        ({"template": "Why {x!r}?", "x": ["a"]}, "template", "a field's name in braces"),
        ({"template": "Why {x:>9}?", "x": ["a"]}, "template", "a field's name in braces"),
        ({"template": "Why {who}?"}, "template", "names {who}, but the line has no field 'who'"),
        ({"template": "Why {id}?", "id": ["a"]}, "template", "{id} cannot be a placeholder"),
        ({"template": "Why {who}?", "who": "Ada"}, "who", "expected a list of values"),
        ({"template": "Why {who}?", "who": []}, "who", "is empty"),
        ({"template": "Why {who}?", "who": [None]}, "who", "expected texts or numbers"),
        ({"template": "Why {who}?", "who": ["a"], "id": 0.5}, "id", "a whole number"),
        ({"template": "{who}", "who": ["a", " "]}, "prompt", "expected text"),
        ({"template": "{a}{b}", **BIG}, "template", "expands to 100,400 prompts; at most 100,000"),
    ],
)
def test_a_bad_template_names_file_line_and_field(
    tmp_path: Path, line: dict[str, Any], field: str, problem: str
) -> None:
    path = write(tmp_path / "set.jsonl", {"prompt": "Hi"}, line)
    with pytest.raises(PromptFileError) as caught:
        read_prompts([path])
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2, field {field!r}: ") and problem in message


def test_two_templates_without_ids_are_told_apart_by_an_error(tmp_path: Path) -> None:
    line = {"template": "Why {who}?", "who": ["Ada"]}
    path = write(tmp_path / "set.jsonl", line, line)
    with pytest.raises(
        PromptFileError, match=r"line 2, field 'id': 'template-0' was used in line 1"
    ):
        read_prompts([path])


WORDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
OWN_FIELDS = ("label", "lang", "domain", "pair_id", "target", "answer")
COLUMNS = sorted(
    {name for known in (*SETS, *ONE_COLUMN) for name in known.required}
    - {"id", "prompt", "messages", "type", *OWN_FIELDS}
    | {"template", "sentence_eng_Latn", "focus", "note"}
)
RECORDS = st.tuples(
    WORDS,
    st.booleans(),
    st.dictionaries(st.sampled_from(OWN_FIELDS), WORDS),
    st.dictionaries(st.sampled_from(COLUMNS), WORDS | st.integers() | st.lists(WORDS)),
)


@given(lines=st.lists(RECORDS, min_size=1, max_size=4), stem=st.sampled_from(["set", "harmful"]))
def test_a_file_in_our_own_format_is_read_exactly_as_before(
    lines: list[tuple[str, bool, dict[str, str], dict[str, Any]]], stem: str
) -> None:
    rows: list[dict[str, Any]] = []
    expected: list[Prompt] = []
    for number, (text, chat, own, meta) in enumerate(lines):
        turns = [{"role": "user", "content": text}]
        rows.append(
            {
                "id": f"k{number}",
                **({"messages": turns} if chat else {"prompt": text}),
                **own,
                **meta,
            }
        )
        expected.append(
            Prompt(
                prompt_id=number, key=f"k{number}", text=text, set_name=stem, meta=meta,
                messages=tuple(turns) if chat else None, expected=own.get("answer"),
                **{name: value for name, value in own.items() if name != "answer"},
            )
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (file,) = read_prompt_files([write(Path(folder) / f"{stem}.jsonl", *rows)])
    assert file.prompts == tuple(expected) and file.recognized is None and file.skipped == ()
