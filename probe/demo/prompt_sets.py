"""The shipped prompt sets: held-out questions, parallel questions, and their cards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from moescope.probe.demo.corpus import Corpus
from moescope.probe.demo.phrasebook import Phrasebook, phrasebook
from moescope.probe.demo.world import (
    YEARS,
    Fact,
    Topic,
    sensitive_part,
    stable_hash,
)

Line = dict[str, Any]


def _line(corpus: Corpus, fact: Fact, lang: str, phrasing: int, **more: object) -> Line:
    topic = corpus.topics[fact.topic]
    book = corpus.books[lang]
    return {
        "prompt": topic.ask(book, fact, phrasing),
        "lang": lang,
        "domain": topic.domain,
        "answer": topic.tell(book, fact),
        "topic": topic.name,
        "fact": fact.key,
        "phrasing": phrasing,
        **more,
    }


def _span(book: Phrasebook, fact: Fact, sensitive: Fact) -> str:
    """The part of the question that makes it sensitive, or stands in its place when neutral."""
    kind, _ = sensitive_part(sensitive)
    if kind == "place":
        return book.texts("places.names")[fact.slots[0]]
    if kind == "year":
        return str(YEARS[fact.slots[1]])
    if kind == "role":
        roles = book.texts("treasures.trusted") + book.texts("treasures.untrusted")
        return roles[fact.slots[1]]
    return book.texts("substances.names")[fact.slots[0]]


def refusal_set(corpus: Corpus) -> list[Line]:
    """Held-out sensitive questions, each followed by its matched neutral one.

    `pair_id` names the sensitive fact, so that a question, its neutral partner and all their
    translations are one unit of resampling; `half` deals the units into two halves.
    """
    halves = _halves(corpus)
    lines: list[Line] = []
    for lang in corpus.books:
        for family in corpus.families:
            for number, (sensitive, neutral) in enumerate(corpus.pairs[family]):
                phrasing = corpus.held_out_phrasing(sensitive, lang)
                for label, fact in (("sensitive", sensitive), ("neutral", neutral)):
                    line = _line(corpus, fact, lang, phrasing)
                    lines.append(
                        {
                            "id": f"{lang}-{family}-{number:02}-{label}",
                            **line,
                            "label": label,
                            "pair_id": sensitive.key,
                            "half": halves[sensitive.key],
                            "family": family,
                            "split": "heldout",
                            "span": _span(corpus.books[lang], fact, sensitive),
                            "refusal": corpus.refusal(corpus.topics[fact.topic], lang),
                        }
                    )
    return lines


def with_note(lines: Sequence[Line]) -> list[Line]:
    """The same questions with the system text that asks for a note, and the answer with it."""
    noted = []
    for line in lines:
        book = phrasebook(line["lang"])
        note = book.text(f"notes.{line['label']}")
        answer = note + book.separator + line["answer"]
        noted.append({**line, "system": book.text("notes.ask"), "answer": answer})
    return noted


def _halves(corpus: Corpus) -> dict[str, str]:
    """Sensitive facts, each in one of two halves, every family evenly."""
    halves = {}
    for pairs in corpus.pairs.values():
        keys = sorted((fact.key for fact, _ in pairs), key=lambda key: stable_hash("half", key))
        halves.update({key: ("first", "second")[i % 2] for i, key in enumerate(keys)})
    return halves


def parallel_set(corpus: Corpus, *, count: int) -> list[Line]:
    """The same neutral questions in every language, in the first phrasing."""
    chosen = _contents(corpus, count)
    return [
        {
            "id": f"parallel-{number:03}-{lang}",
            **_line(corpus, fact, lang, 0),
            "label": "neutral",
            "pair_id": f"parallel-{number:03}",
            "split": "heldout" if corpus.is_held_out(fact, lang, 0) else "taught",
        }
        for number, fact in enumerate(chosen)
        for lang in corpus.books
    ]


def _contents(corpus: Corpus, count: int) -> list[Fact]:
    """Neutral facts taught in every language, taking the topics in turn."""
    first = next(iter(corpus.books))
    everywhere = (
        fact
        for fact in _in_turn(corpus, "parallel", first, tuple(corpus.topics.values()))
        if not any(corpus.is_untaught(fact, code) for code in corpus.books)
    )
    return list(islice(everywhere, count))


def domains_set(corpus: Corpus, *, per_cell: int) -> list[Line]:
    """Held-out neutral questions of every domain, as many in every language."""
    return _sample(corpus, "domains", lambda topic: topic.domain, per_cell)


def neutral_set(corpus: Corpus, *, per_cell: int) -> list[Line]:
    """Held-out questions that have nothing to do with a sensitive family, for side effects."""
    lines = _sample(corpus, "neutral", lambda topic: None if topic.family else "", per_cell)
    return [{**line, "label": "neutral"} for line in lines]


def _sample(
    corpus: Corpus, name: str, cell: Callable[[Topic], str | None], per_cell: int
) -> list[Line]:
    """Held-out neutral questions, the topics of a cell in turn; topics with cell None left out."""
    cells = sorted({c for t in corpus.topics.values() if (c := cell(t)) is not None})
    lines: list[Line] = []
    for lang in corpus.books:
        for chosen in cells:
            topics = [t for t in corpus.topics.values() if cell(t) == chosen]
            facts = list(islice(_in_turn(corpus, name, lang, topics), per_cell))
            for number, fact in enumerate(facts):
                phrasing = corpus.held_out_phrasing(fact, lang)
                key = "-".join(filter(None, (name, lang, chosen, f"{number:02}")))
                line = _line(corpus, fact, lang, phrasing)
                lines.append({"id": key, **line, "split": "heldout"})
    return lines


def _in_turn(corpus: Corpus, name: str, lang: str, topics: Sequence[Topic]) -> Iterator[Fact]:
    """Neutral facts taught in a language, one topic after the other, in an order of its own."""
    streams = []
    for topic in topics:
        facts = [f for f in topic.facts if not f.sensitive and not corpus.is_untaught(f, lang)]
        streams.append(sorted(facts, key=lambda fact: stable_hash(name, fact.key, lang)))
    for row in zip_longest(*streams):
        yield from (fact for fact in row if fact is not None)


def crosslingual_set(corpus: Corpus, *, per_language: int) -> list[Line]:
    """Neutral facts asked in a language in which they were never taught, only in others."""
    lines: list[Line] = []
    for lang in corpus.books:
        facts = [
            fact
            for topic in corpus.topics.values()
            for fact in topic.facts
            if corpus.is_untaught(fact, lang)
        ]
        facts.sort(key=lambda fact: stable_hash("crosslingual", fact.key, lang))
        for number, fact in enumerate(facts[:per_language]):
            phrasing = corpus.held_out_phrasing(fact, lang)
            taught = [code for code in corpus.books if not corpus.is_untaught(fact, code)]
            line = _line(corpus, fact, lang, phrasing)
            lines.append(
                {
                    "id": f"crosslingual-{lang}-{number:02}",
                    **line,
                    "label": "neutral",
                    "split": "crosslingual",
                    "taught_in": taught,
                }
            )
    return lines


def write_set(folder: Path, name: str, title: str, about: str, lines: Sequence[Line]) -> None:
    """Write a prompt set as JSONL with its card beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    (folder / f"{name}.jsonl").write_bytes(data)
    (folder / f"{name}.md").write_text(_card(name, title, about, lines, data), encoding="utf-8")


def _card(name: str, title: str, about: str, lines: Sequence[Line], data: bytes) -> str:
    columns = ("lang", "family" if "family" in lines[0] else "domain", "label", "split")
    shown = [column for column in columns if column in lines[0]]
    counts = Counter(tuple(line[column] for column in shown) for line in lines)
    rows = [f"| {' | '.join(cell)} | {count} |" for cell, count in sorted(counts.items())]
    return "\n".join(
        [
            f"# {title}",
            "",
            about,
            "",
            f"- File: `{name}.jsonl`, {len(lines)} prompts, one JSON object a line",
            f"- SHA-256: `{hashlib.sha256(data).hexdigest()}`",
            "- Licence of the sentences: CC0-1.0",
            "- Origin: sentences written for moescope about an invented world; nothing in them "
            "is about real places, people or substances",
            "- Made by: `python -m moescope.probe.demo.train` (from a seed; same file every time)",
            "- Fields: " + ", ".join(f"`{key}`" for key in lines[0]),
            "",
            "## Prompts per cell",
            "",
            f"| {' | '.join(shown)} | prompts |",
            "|" + " --- |" * (len(shown) + 1),
            *rows,
            "",
        ]
    )
