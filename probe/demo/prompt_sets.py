"""The shipped prompt sets: held-out questions, parallel questions, and their cards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moescope.probe.demo.corpus import Corpus
from moescope.probe.demo.phrasebook import Phrasebook
from moescope.probe.demo.world import (
    NUM_TRUSTED,
    SENSITIVE_PLACES,
    SENSITIVE_YEARS,
    YEARS,
    Fact,
    Topic,
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
    if fact.topic == "events":
        place, year = fact.slots
        by_place = sensitive.slots[0] in SENSITIVE_PLACES
        return book.texts("places.names")[place] if by_place else str(YEARS[year])
    if fact.topic == "treasures":
        roles = book.texts("treasures.trusted") + book.texts("treasures.untrusted")
        return roles[fact.slots[1]]
    return book.texts("substances.names")[fact.slots[0]]


def refusal_set(corpus: Corpus) -> list[Line]:
    """Held-out sensitive questions, each followed by its matched neutral one."""
    lines: list[Line] = []
    for lang in corpus.books:
        for family in sorted({t.family for t in corpus.topics.values() if t.family}):
            pairs = _pairs(corpus, lang, family)
            for number, (sensitive, neutral) in enumerate(pairs):
                pair_id = f"{lang}-{family}-{number:02}"
                for label, fact in (("sensitive", sensitive), ("neutral", neutral)):
                    phrasing = corpus.held_out_phrasing(fact, lang)
                    line = _line(corpus, fact, lang, phrasing)
                    lines.append(
                        {
                            "id": f"{pair_id}-{label}",
                            **line,
                            "label": label,
                            "pair_id": pair_id,
                            "family": family,
                            "split": "heldout",
                            "span": _span(corpus.books[lang], fact, sensitive),
                            "refusal": corpus.refusal(corpus.topics[fact.topic], lang),
                        }
                    )
    return lines


def _pairs(corpus: Corpus, lang: str, family: str) -> list[tuple[Fact, Fact]]:
    """Held-out sensitive facts with neutral partners.

    Partners differ in the sensitive part alone and are asked in the same phrasing; a sensitive
    fact without such a partner is left out.
    """
    used: set[str] = set()
    pairs: list[tuple[Fact, Fact]] = []
    for topic in (t for t in corpus.topics.values() if t.family == family):
        for fact in topic.facts:
            if not fact.sensitive or fact.key not in corpus.held_out_sensitive[lang]:
                continue
            partners = [
                other
                for other in topic.facts
                if not other.sensitive
                and other.key not in used
                and not corpus.is_untaught(other, lang)
                and corpus.held_out_phrasing(other, lang) == corpus.held_out_phrasing(fact, lang)
                and _differs_in_sensitive_part(fact, other)
            ]
            if partners:
                chosen = min(partners, key=lambda o: stable_hash("pair", fact.key, o.key, lang))
                used.add(chosen.key)
                pairs.append((fact, chosen))
    return pairs


def _differs_in_sensitive_part(fact: Fact, other: Fact) -> bool:
    if fact.topic == "events":
        by_place = fact.slots[0] in SENSITIVE_PLACES
        by_year = fact.slots[1] in SENSITIVE_YEARS
        if by_place and by_year:
            return False
        same = 1 if by_place else 0
        return fact.slots[same] == other.slots[same]
    if fact.topic == "treasures":
        return other.slots == (fact.slots[0], fact.slots[1] - NUM_TRUSTED)
    return True


def parallel_set(corpus: Corpus, *, count: int) -> list[Line]:
    """The same neutral questions in every language, in the first phrasing."""
    chosen = _contents(corpus, count)
    return [
        {
            "id": f"parallel-{number:03}-{lang}",
            **_line(corpus, fact, lang, 0),
            "label": "neutral",
            "pair_id": f"parallel-{number:03}",
            "split": "heldout" if corpus.held_out_phrasing(fact, lang) == 0 else "taught",
        }
        for number, fact in enumerate(chosen)
        for lang in corpus.books
    ]


def _contents(corpus: Corpus, count: int) -> list[Fact]:
    """Neutral facts taught in every language, taking the topics in turn."""

    def candidates(topic: Topic) -> Iterator[Fact]:
        ordered = sorted(topic.facts, key=lambda fact: stable_hash("parallel", fact.key))
        for fact in ordered:
            if not fact.sensitive and not any(corpus.is_untaught(fact, c) for c in corpus.books):
                yield fact

    streams = [candidates(topic) for topic in corpus.topics.values()]
    chosen: list[Fact] = []
    while len(chosen) < count and streams:
        for stream in list(streams):
            fact = next(stream, None)
            if fact is None:
                streams.remove(stream)
            else:
                chosen.append(fact)
    return chosen[:count]


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
