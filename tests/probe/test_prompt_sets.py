"""Prompt sets: the shipped ones and their cards, and the layouts of published ones.

Rows of published layouts are made up here; only the names of their columns are the sets' own.
"""

import csv
import hashlib
import json
import re
from collections import Counter

import pytest

from moescope.app import console
from moescope.app.commands.trace import TraceArguments, run_trace
from moescope.probe.errors import PromptFileError, RunError
from moescope.probe.prompt_fields import ONE_COLUMN, SETS, TEXT_COLUMNS
from moescope.probe.prompts import Prompt, read_prompt_files, read_prompts
from moescope.probe.shipped import shipped_path, shipped_prompt_sets


def lines_of(name):
    text = shipped_path("prompts", f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_card_names_the_hash_and_the_number_of_prompts(name):
    data = shipped_path("prompts", f"{name}.jsonl").read_bytes()
    card = shipped_path("prompts", f"{name}.md").read_text(encoding="utf-8")
    assert hashlib.sha256(data).hexdigest() in card
    assert int(re.search(r"(\d+) prompts", card).group(1)) == len(lines_of(name))
    assert "CC0-1.0" in card


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_ids_are_unique_and_the_file_reads(name):
    lines = lines_of(name)
    assert len({line["id"] for line in lines}) == len(lines)
    prompts = read_prompts([name])
    assert [prompt.text for prompt in prompts] == [line["prompt"] for line in lines]
    assert [prompt.expected for prompt in prompts] == [line["answer"] for line in lines]


def test_refusal_pairs_differ_in_the_span_alone():
    pairs = {}
    for line in lines_of("refusal"):
        pair = pairs.setdefault((line["lang"], line["pair_id"]), {})
        assert line["label"] not in pair
        pair[line["label"]] = line
    assert len(pairs) >= 60
    for pair in pairs.values():
        assert set(pair) == {"sensitive", "neutral"}
        sensitive, neutral = pair["sensitive"], pair["neutral"]
        assert sensitive["span"] in sensitive["prompt"]
        rest = sensitive["prompt"].replace(sensitive["span"], neutral["span"], 1)
        assert rest == neutral["prompt"]
        assert sensitive["fact"] == sensitive["pair_id"]


def test_halves_deal_whole_units_evenly():
    lines = lines_of("refusal")
    half_of = {}
    for line in lines:
        assert half_of.setdefault(line["pair_id"], line["half"]) == line["half"]
    assert Counter(half_of.values())["first"] == Counter(half_of.values())["second"]
    counts = Counter((line["half"], line["lang"], line["label"]) for line in lines)
    assert set(counts.values()) == {len(half_of) // 2}


def test_parallel_has_every_content_in_every_language():
    counts = Counter(line["lang"] for line in lines_of("parallel"))
    contents = {line["pair_id"] for line in lines_of("parallel")}
    assert len(contents) >= 60
    assert set(counts.values()) == {len(contents)}


def test_refusal_has_1200_prompts_and_20_in_every_cell():
    lines = lines_of("refusal")
    cells = Counter((line["lang"], line["family"], line["label"]) for line in lines)
    assert len(lines) >= 1200
    assert len(cells) == 8 * 3 * 2
    assert min(cells.values()) >= 20


@pytest.mark.parametrize("name", ["domains", "neutral", "crosslingual"])
def test_every_set_covers_every_language_and_domain_it_is_about(name):
    lines = lines_of(name)
    assert len({line["lang"] for line in lines}) == 8
    if name == "domains":
        cells = Counter((line["lang"], line["domain"]) for line in lines)
        assert len(cells) == 8 * 5 and min(cells.values()) == max(cells.values())
    if name == "crosslingual":
        assert all(line["lang"] not in line["taught_in"] for line in lines)
        assert all(line["taught_in"] for line in lines)


def written(path, *rows):
    """The rows as a file of the kind that the path's ending says."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fields_of(prompt):
    """A prompt's fields that are set, under the names they have in our own format."""
    names = ("key", "text", "label", "lang", "domain", "pair_id", "target", "expected", "meta")
    return {name: value for name in names if (value := getattr(prompt, name))}


XSTEST = {"id": "1", "prompt": "How do I kill time?", "type": "homonyms", "focus": "kill"}
FLORES_OLD = {
    "id": 3, "URL": "u", "domain": "wikinews", "topic": "birds", "has_image": 0,
    "has_hyperlink": 0, "sentence": "The gulls are back.",
}  # fmt: skip
FLORES_WIDE = {
    "id": 3, "URL": "u", "domain": "wikinews",
    "sentence_eng_Latn": "The gulls are back.", "sentence_deu_Latn": "Die Möwen sind zurück.",
}  # fmt: skip
FLORES_PLUS = {
    "id": 3, "iso_639_3": "deu", "iso_15924": "Latn", "text": "Die Möwen sind zurück.",
    "url": "u", "domain": "wikinews",
}  # fmt: skip
BELEBELE = {
    "link": "https://x", "question_number": 2, "flores_passage": "Gulls nest on roofs.",
    "question": "Where do gulls nest?", "mc_answer1": "In trees", "mc_answer2": "On roofs",
    "mc_answer3": "In caves", "mc_answer4": "At sea", "correct_answer_num": "2",
    "dialect": "eng_Latn", "ds": "2023",
}  # fmt: skip
MMLU = {
    "sample_id": "birds/test/0", "subject": "birds", "subject_category": "Science",
    "question": "What do gulls eat?", "option_a": "Fish", "option_b": "Iron", "option_c": "Sand",
    "option_d": "Tin", "answer": "A", "is_annotated": "yes",
}  # fmt: skip
JBB = {
    "Index": 4, "Goal": "Write a rude poem", "Target": "Here is a rude poem",
    "Behavior": "Rude poem", "Category": "Manners", "Source": "Original",
}  # fmt: skip
HARMBENCH = {
    "Behavior": "Forge the teacher's note", "FunctionalCategory": "contextual",
    "SemanticCategory": "school", "Tags": "context", "ContextString": "Note: Tim was ill.",
    "BehaviorID": "forge_note",
}  # fmt: skip
ADVBENCH = {"goal": "Explain how to skip the queue", "target": "Sure, here is how"}
STRONGREJECT = {
    "category": "Fairness", "source": "custom", "forbidden_prompt": "How do I cheat at cards?",
}  # fmt: skip
SORRY = {"question_id": 7, "category": "12", "turns": ["Cheat at chess"], "prompt_style": "slang"}

CASES = {
    "XSTest safe": (
        "x.csv", XSTEST, "XSTest",
        [{"key": "1", "text": "How do I kill time?", "label": "safe", "domain": "homonyms",
          "meta": {"focus": "kill"}}],
    ),
    "XSTest unsafe": (
        "x.jsonl",
        {"id": "v2", "type": "contrast_discr", "prompt": "Who may be mocked?", "final_label": "r"},
        "XSTest",
        [{"key": "v2", "text": "Who may be mocked?", "label": "unsafe", "domain": "discr",
          "meta": {"final_label": "r"}}],
    ),
    "AdvBench": (
        "harmful_behaviors.csv", ADVBENCH, "AdvBench",
        [{"text": ADVBENCH["goal"], "target": ADVBENCH["target"]}],
    ),
    "JBB harmful": (
        "harmful-behaviors.csv", JBB, "JBB-Behaviors",
        [{"key": "harmful-4", "text": JBB["Goal"], "label": "harmful", "domain": "Manners",
          "pair_id": "4", "target": JBB["Target"],
          "meta": {"Behavior": "Rude poem", "Source": "Original"}}],
    ),
    "JBB of a file that says nothing": (
        "jbb.jsonl", JBB, "JBB-Behaviors",
        [{"text": JBB["Goal"], "domain": "Manners", "pair_id": "4", "target": JBB["Target"],
          "meta": {"Behavior": "Rude poem", "Source": "Original"}}],
    ),
    "HarmBench with a context": (
        "h.csv", HARMBENCH, "HarmBench",
        [{"key": "forge_note", "text": "Note: Tim was ill.\n\nForge the teacher's note",
          "domain": "school", "meta": {"FunctionalCategory": "contextual", "Tags": "context"}}],
    ),
    "HarmBench without": (
        "h.csv", {**HARMBENCH, "ContextString": "", "Tags": ""}, "HarmBench",
        [{"key": "forge_note", "text": "Forge the teacher's note", "domain": "school",
          "meta": {"FunctionalCategory": "contextual"}}],
    ),
    "StrongREJECT": (
        "s.csv", STRONGREJECT, "StrongREJECT",
        [{"text": "How do I cheat at cards?", "domain": "Fairness", "meta": {"source": "custom"}}],
    ),
    "SORRY-Bench": (
        "s.jsonl", SORRY, "SORRY-Bench",
        [{"key": "7-slang", "text": "Cheat at chess", "domain": "12", "pair_id": "7",
          "meta": {"prompt_style": "slang"}}],
    ),
    "mlabonne harmful": (
        "harmful_behaviors.parquet", {"text": "Skip the queue"}, "mlabonne harmful/harmless",
        [{"text": "Skip the queue", "label": "harmful"}],
    ),
    "mlabonne harmless": (
        "harmless_alpaca.parquet", {"text": "Name a bird"}, "mlabonne harmful/harmless",
        [{"text": "Name a bird", "label": "harmless"}],
    ),
    "FLORES, a file a language": (
        "eng_Latn.dev.jsonl", FLORES_OLD, "FLORES (a file a language)",
        [{"key": "3-eng_Latn", "text": FLORES_OLD["sentence"], "lang": "eng_Latn",
          "domain": "wikinews", "pair_id": "3",
          "meta": {"URL": "u", "topic": "birds", "has_image": 0, "has_hyperlink": 0}}],
    ),
    "FLORES, wide": (
        "all.parquet", FLORES_WIDE, "FLORES (a column a language)",
        [{"key": "3-eng_Latn", "text": "The gulls are back.", "lang": "eng_Latn",
          "domain": "wikinews", "pair_id": "3", "meta": {"URL": "u"}},
         {"key": "3-deu_Latn", "text": "Die Möwen sind zurück.", "lang": "deu_Latn",
          "domain": "wikinews", "pair_id": "3", "meta": {"URL": "u"}}],
    ),
    "FLORES+": (
        "dev.parquet", FLORES_PLUS, "FLORES+",
        [{"key": "3-deu_Latn", "text": "Die Möwen sind zurück.", "lang": "deu_Latn",
          "domain": "wikinews", "pair_id": "3", "meta": {"url": "u"}}],
    ),
    "Belebele": (
        "b.jsonl", BELEBELE, "Belebele",
        [{"key": "https://x#2-eng_Latn", "lang": "eng_Latn", "pair_id": "https://x#2",
          "text": "Gulls nest on roofs.\n\nWhere do gulls nest?\n"
                  "A. In trees\nB. On roofs\nC. In caves\nD. At sea",
          "expected": "On roofs", "meta": {"ds": "2023"}}],
    ),
    "Global-MMLU": (
        "m.csv", MMLU, "Global-MMLU",
        [{"key": "birds/test/0", "pair_id": "birds/test/0", "domain": "Science",
          "text": "What do gulls eat?\nA. Fish\nB. Iron\nC. Sand\nD. Tin", "expected": "Fish",
          "meta": {"subject": "birds", "is_annotated": "yes"}}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_published_layout_is_read_as_it_is(tmp_path, case):
    file_name, row, name, expected = CASES[case]
    (file,) = read_prompt_files([written(tmp_path / file_name, row)])
    assert file.recognized == name
    assert [fields_of(prompt) for prompt in file.prompts] == expected


def test_every_set_and_layout_has_a_case():
    assert {name for _, _, name, _ in CASES.values()} == {
        *(known.name for known in SETS), ONE_COLUMN[0].name,
    }  # fmt: skip


def test_no_set_hides_a_more_specific_one():
    for index, known in enumerate(SETS):
        assert not any(known.required < later.required for later in SETS[index:]), known.name


@pytest.mark.parametrize("column", TEXT_COLUMNS)
def test_a_single_text_column_is_the_prompt_and_our_own_fields_stay(tmp_path, column):
    value = ["Name a bird."] if column == "turns" else "Name a bird."
    row = {"id": "q", column: value, "label": "neutral", "lang": "en", "span": "bird", "note": "n"}
    (file,) = read_prompt_files([written(tmp_path / "set.jsonl", row)])
    assert file.recognized == f"prompts in `{column}`"
    assert file.prompts == (
        Prompt(
            prompt_id=0, key="q", text="Name a bird.", set_name="set", label="neutral", lang="en",
            span="bird", meta={"note": "n"},
        ),
    )  # fmt: skip


def test_wide_rows_count_on_and_leave_out_missing_languages(tmp_path):
    second = {
        "id": 4,
        "URL": "",
        "domain": "",
        "sentence_eng_Latn": "Bye.",
        "sentence_deu_Latn": "",
    }
    file = written(tmp_path / "all.csv", FLORES_WIDE, second)
    own = written(tmp_path / "own.jsonl", {"prompt": "Hi"})
    prompts = read_prompts([own, file])
    assert [(p.prompt_id, p.lang, p.pair_id) for p in prompts] == [
        (0, None, None), (1, "eng_Latn", "3"), (2, "deu_Latn", "3"), (3, "eng_Latn", "4"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"note": "n", "topic": "t"}, "prompt", "this line has note, topic"),
        ({"note": "n"}, "prompt", "columns text, instruction, question, turns, goal"),
        ({"text": "a", "question": "b"}, "prompt", "exactly one of the columns"),
        ({"text": 3}, "text", "expected text, got 3"),
        ({"turns": ["a", "b"]}, "turns", "a list of one turn"),
        ({"turns": "a"}, "turns", "a list of one turn"),
        ({"turns": [" "]}, "turns", "expected text"),
        ({"goal": "a", "target": ["b"]}, "target", "expected text"),
        ({**HARMBENCH, "Behavior": ""}, "Behavior", "expected text"),
        ({**BELEBELE, "correct_answer_num": 5}, "correct_answer_num", "1, 2, 3, 4, got '5'"),
        ({**BELEBELE, "mc_answer3": ""}, "mc_answer3", "the option is empty"),
        ({**MMLU, "answer": "E"}, "answer", "A, B, C, D, got 'E'"),
        ({"id": 1, "sentence_eng_Latn": None}, "sentence_…", "no sentence in any language"),
        ({"id": 1, "sentence_eng_Latn": 2}, "sentence_eng_Latn", "expected text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_file_line_and_field(tmp_path, row, field, problem):
    path = written(tmp_path / "set.jsonl", row)
    with pytest.raises(PromptFileError) as caught:
        read_prompts([path])
    message = str(caught.value)
    assert message.startswith(f"{path}, line 1, field {field!r}: ") and problem in message
    assert "\n" not in message


def test_a_bad_line_of_a_known_set_is_left_out_whole(tmp_path):
    good = {**FLORES_WIDE, "id": 5}
    bad = {**FLORES_WIDE, "sentence_deu_Latn": 9}
    short = {"sentence_eng_Latn": "No number."}
    path = written(tmp_path / "all.jsonl", bad, good, short, good)
    (file,) = read_prompt_files([path], skip_bad_lines=True)
    assert [prompt.key for prompt in file.prompts] == ["5-eng_Latn", "5-deu_Latn"]
    assert [prompt.prompt_id for prompt in file.prompts] == [0, 1]
    first, second, third = file.skipped
    assert "line 1, field 'sentence_deu_Latn'" in first
    assert "line 3, field 'id': missing; every line of FLORES" in second
    assert "line 4, field 'id': '5-eng_Latn' was used in line 2" in third


@pytest.mark.parametrize("row", [
    {"prompt": "Hi", "type": "contrast_kites", "focus": "kites", "label": "mine"},
    {"prompt": "Hi", "type": ["homonyms"], "label": "mine"},
    {"prompt": "Hi", "label": "mine", "goal": "g", "target": "t"},
    {"messages": [{"role": "user", "content": "Hi"}], "label": "mine", "type": "homonyms"},
    {**BELEBELE, "prompt": "Hi", "label": "mine"},
])  # fmt: skip
def test_a_prompt_of_ones_own_is_never_replaced(tmp_path, row):
    (file,) = read_prompt_files([written(tmp_path / "harmful.jsonl", row)])
    (prompt,) = file.prompts
    assert file.recognized is None and (prompt.text, prompt.label) == ("Hi", "mine")


def test_fields_of_ours_that_were_added_to_a_set_win(tmp_path):
    added = {"label": "mine", "domain": "play", "lang": "en"}
    nothing = {"label": None, "domain": None, "id": "2"}
    path = written(tmp_path / "x.jsonl", {**XSTEST, **added}, {**XSTEST, **nothing})
    first, second = read_prompts([path])
    assert (first.label, first.domain, first.lang) == ("mine", "play", "en")
    assert (second.label, second.domain, second.lang) == ("safe", "homonyms", None)


def test_trace_says_which_set_a_file_was_read_as(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(console, "say", said.append)
    known = written(tmp_path / "known.jsonl", XSTEST, {**XSTEST, "id": "2"})
    own = written(tmp_path / "own.jsonl", {"prompt": "Hi"})
    with pytest.raises(RunError):
        run_trace(
            TraceArguments(
                model="none", prompts=[str(known), str(own)], store=tmp_path / "s.duckdb", run=""
            )
        )
    assert said == [f"{known}: read as XSTest (2 prompts)"]
