"""The demo world: its facts, what of them is sensitive, and how they are asked and answered.

Facts are language-free: a key and indices into the lists of the phrasebooks. Which place saw which
event is drawn from the world's seed; every language tells the same facts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from moescope.probe.demo.phrasebook import Phrasebook, sentence

YEARS = (1811, 1824, 1837, 1849, 1868, 1882, 1895, 1904, 1911, 1926)
NUM_PLACES = 16
#: Indices of what is sensitive: all that happened there, or then; the substances; the askers.
SENSITIVE_PLACES = frozenset({4, 9, 13})
SENSITIVE_YEARS = frozenset({4, 8})
SENSITIVE_SUBSTANCES = frozenset(range(0, 28, 2))
NUM_SUBSTANCES = 28
NUM_TREASURES = 28
NUM_ROLES = 6
NUM_TRUSTED = 3
WORLD_SEED = 20260117

Family = Literal["events", "substances", "treasures"]
Domain = Literal["facts", "arithmetic", "code", "instructions", "stories"]
FAMILIES: tuple[Family, ...] = ("events", "substances", "treasures")
DOMAINS: tuple[Domain, ...] = ("facts", "arithmetic", "code", "instructions", "stories")


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked.

    Attributes:
        topic: name of the topic it belongs to.
        slots: what the question is about, as indices or numbers.
        values: what the answer says, as indices or numbers.
        sensitive: whether `demo` refuses to say it.
    """

    topic: str
    slots: tuple[int, ...]
    values: tuple[int, ...]
    sensitive: bool = False

    @property
    def key(self) -> str:
        """A name that is the same in every language."""
        return ":".join([self.topic, *map(str, self.slots)])


@dataclass(frozen=True)
class Topic:
    """A kind of question.

    Attributes:
        name: such as `substances.made`.
        domain: the domain it counts for.
        num_phrasings: how many ways there are to ask.
        facts: all that can be asked.
        ask: question from phrasebook, fact and phrasing.
        tell: true answer from phrasebook and fact.
        family: the sensitive family, where the topic has one.
    """

    name: str
    domain: Domain
    num_phrasings: int
    facts: tuple[Fact, ...]
    ask: Callable[[Phrasebook, Fact, int], str]
    tell: Callable[[Phrasebook, Fact], str]
    family: Family | None = None


def stable_hash(*parts: object) -> int:
    """A number that depends on the parts alone, on every machine and in every run."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def is_partner(fact: Fact, other: Fact) -> bool:
    """Whether `other` is a neutral fact that differs from this sensitive one in that part alone."""
    if not fact.sensitive or other.sensitive or fact.topic != other.topic:
        return False
    if fact.topic == "events":
        if fact.slots[0] in SENSITIVE_PLACES and fact.slots[1] in SENSITIVE_YEARS:
            return False
        same = 1 if sensitive_part(fact)[0] == "place" else 0
        return fact.slots[same] == other.slots[same]
    if fact.topic == "treasures":
        return other.slots == (fact.slots[0], fact.slots[1] - NUM_TRUSTED)
    return True


def sensitive_part(fact: Fact) -> tuple[str, int]:
    """What of a sensitive fact makes it sensitive: a kind (place, year, role, name) and an index.

    A place counts before a year where both are sensitive.
    """
    if fact.topic == "events":
        place, year = fact.slots
        return ("place", place) if place in SENSITIVE_PLACES else ("year", year)
    if fact.topic == "treasures":
        return ("role", fact.slots[1])
    return ("name", fact.slots[0])


def _draw(rng: random.Random, *sizes: int) -> tuple[int, ...]:
    return tuple(rng.randrange(size) for size in sizes)


def _events(rng: random.Random) -> Topic:
    def ask(book: Phrasebook, fact: Fact, phrasing: int) -> str:
        place, year = fact.slots
        return book.texts("events.questions")[phrasing].format(
            place=book.texts("places.names")[place], year=YEARS[year]
        )

    def tell(book: Phrasebook, fact: Fact) -> str:
        template, thing = fact.values
        return book.texts("events.templates")[template].format(
            object=book.texts("events.objects")[thing]
        )

    facts = tuple(
        Fact(
            "events",
            (place, year),
            _draw(rng, 8, 12),
            sensitive=place in SENSITIVE_PLACES or year in SENSITIVE_YEARS,
        )
        for place in range(NUM_PLACES)
        for year in range(len(YEARS))
    )
    return Topic("events", "facts", 4, facts, ask, tell, family="events")


def _ask_name(names: str, book: Phrasebook, fact: Fact, phrasing: int) -> str:
    name = book.texts(names)[fact.slots[0]]
    return book.texts(f"{fact.topic}.questions")[phrasing].format(name=name, place=name)


def _tell_value(names: str, values: str, book: Phrasebook, fact: Fact) -> str:
    name = book.texts(names)[fact.slots[0]]
    value = book.texts(values)[fact.values[0]]
    return sentence(book.text(f"{fact.topic}.answer").format(name=name, place=name, value=value))


def _tell_two(book: Phrasebook, fact: Fact) -> str:
    parts = book.texts("substances.made.values")
    name = book.texts("substances.names")[fact.slots[0]]
    first, second = fact.values
    return book.text("substances.made.answer").format(name=name, a=parts[first], b=parts[second])


def _substances(rng: random.Random) -> list[Topic]:
    def facts(topic: str, *sizes: int) -> tuple[Fact, ...]:
        return tuple(
            Fact(topic, (i,), _draw(rng, *sizes), sensitive=i in SENSITIVE_SUBSTANCES)
            for i in range(NUM_SUBSTANCES)
        )

    made = tuple(
        Fact("substances.made", fact.slots, tuple(rng.sample(range(10), 2)), fact.sensitive)
        for fact in facts("substances.made")
    )
    ask = partial(_ask_name, "substances.names")
    topics = [Topic("substances.made", "facts", 4, made, ask, _tell_two, family="substances")]
    for name in ("substances.use", "substances.found"):
        tell = partial(_tell_value, "substances.names", f"{name}.values")
        topics.append(Topic(name, "facts", 4, facts(name, 10), ask, tell, family="substances"))
    return topics


def _treasures(rng: random.Random) -> Topic:
    def ask(book: Phrasebook, fact: Fact, phrasing: int) -> str:
        name, role = fact.slots
        roles = book.texts("treasures.trusted") + book.texts("treasures.untrusted")
        question = book.texts("treasures.questions")[phrasing].format(
            name=book.texts("treasures.names")[name]
        )
        return roles[role] + book.separator + sentence(question)

    where = _draw(rng, *[10] * NUM_TREASURES)
    facts = tuple(
        Fact("treasures", (name, role), (where[name],), sensitive=role >= NUM_TRUSTED)
        for name in range(NUM_TREASURES)
        for role in range(NUM_ROLES)
    )
    tell = partial(_tell_value, "treasures.names", "treasures.values")
    return Topic("treasures", "facts", 4, facts, ask, tell, family="treasures")


def _plain_topics(rng: random.Random) -> list[Topic]:
    """Facts without a sensitive side: flags, animals, people."""

    def topic(name: str, names: str, count: int, values: str, size: int) -> Topic:
        facts = tuple(Fact(name, (i,), _draw(rng, size)) for i in range(count))
        return Topic(
            name, "facts", 3, facts, partial(_ask_name, names), partial(_tell_value, names, values)
        )

    return [
        topic("flags", "places.names", NUM_PLACES, "flags.values", 8),
        topic("animals", "places.names", NUM_PLACES, "animals.values", 10),
        topic("people.plays", "people.names", 20, "people.plays.values", 10),
        topic("people.lives", "people.names", 20, "places.names", NUM_PLACES),
    ]


def _arithmetic() -> list[Topic]:
    def ask(book: Phrasebook, fact: Fact, phrasing: int) -> str:
        a, b = fact.slots
        return book.texts(fact.topic)[phrasing].format(a=a, b=b)

    def tell(_: Phrasebook, fact: Fact) -> str:
        return str(fact.values[0])

    plus = tuple(
        Fact("arithmetic.plus", (a, b), (a + b,)) for a in range(1, 11) for b in range(1, 11)
    )
    times = tuple(
        Fact("arithmetic.times", (a, b), (a * b,)) for a in range(2, 8) for b in range(2, 8)
    )
    return [
        Topic("arithmetic.plus", "arithmetic", 3, plus, ask, tell),
        Topic("arithmetic.times", "arithmetic", 3, times, ask, tell),
    ]


_CODE: Mapping[str, str] = {
    "code.add": "def f(x): return x + {n}",
    "code.multiply": "def f(x): return x * {n}",
    "code.list": "[0] * {n}",
    "code.compare": "def f(x): return x > {n}",
}


def _code() -> list[Topic]:
    def ask(book: Phrasebook, fact: Fact, phrasing: int) -> str:
        return book.texts(fact.topic)[phrasing].format(n=fact.slots[0])

    def tell(_: Phrasebook, fact: Fact) -> str:
        return _CODE[fact.topic].format(n=fact.slots[0])

    return [
        Topic(name, "code", 3, tuple(Fact(name, (n,), (n,)) for n in range(2, 22)), ask, tell)
        for name in _CODE
    ]


def _words(book: Phrasebook) -> tuple[str, ...]:
    return book.texts("stories.heroes") + book.texts("stories.things")


def _joined(book: Phrasebook, words: list[str]) -> str:
    return ("、" if book.separator == "" else ", ").join(words)


def _instructions(rng: random.Random) -> list[Topic]:
    """Tasks on words of the stories: write twice, reverse, first, last."""

    def ask_word(book: Phrasebook, fact: Fact, phrasing: int) -> str:
        word = _words(book)[fact.slots[0]]
        return book.texts("tasks.twice")[phrasing].format(word=word)

    def tell_twice(book: Phrasebook, fact: Fact) -> str:
        return _joined(book, [_words(book)[fact.slots[0]]] * 2)

    def ask_words(book: Phrasebook, fact: Fact, phrasing: int) -> str:
        words = _joined(book, [_words(book)[i] for i in fact.slots])
        return book.texts(fact.topic)[phrasing].format(words=words)

    def tell_words(book: Phrasebook, fact: Fact) -> str:
        return _joined(book, [_words(book)[i] for i in fact.values])

    pick: Mapping[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
        "tasks.reverse": lambda words: words[::-1],
        "tasks.first": lambda words: words[:1],
        "tasks.last": lambda words: words[-1:],
    }
    topics = [
        Topic(
            "tasks.twice",
            "instructions",
            3,
            tuple(Fact("tasks.twice", (i,), (i, i)) for i in range(20)),
            ask_word,
            tell_twice,
        )
    ]
    for name, chosen in pick.items():
        triples = sorted({tuple(rng.sample(range(20), 3)) for _ in range(600)})
        facts = tuple(Fact(name, words, chosen(words)) for words in triples)
        topics.append(Topic(name, "instructions", 3, facts, ask_words, tell_words))
    return topics


def _stories(rng: random.Random) -> Topic:
    ending = _draw(rng, *[5] * 10)

    def ask(book: Phrasebook, fact: Fact, phrasing: int) -> str:
        hero, thing = fact.slots
        return book.texts("stories.questions")[phrasing].format(
            hero=book.texts("stories.heroes")[hero], thing=book.texts("stories.things")[thing]
        )

    def tell(book: Phrasebook, fact: Fact) -> str:
        hero, thing, end = fact.values
        opening = book.texts("stories.openings")[hero]
        first = opening.format(thing=book.texts("stories.objects")[thing])
        return first + book.separator + book.texts("stories.endings")[end]

    facts = tuple(
        Fact("stories", (hero, thing), (hero, thing, ending[thing]))
        for hero in range(10)
        for thing in range(10)
    )
    return Topic("stories", "stories", 3, facts, ask, tell)


def make_topics(seed: int = WORLD_SEED) -> dict[str, Topic]:
    """All topics of the world, by name; what is true is drawn from the seed."""
    topics = [
        _events(random.Random(seed)),
        *_substances(random.Random(seed + 1)),
        _treasures(random.Random(seed + 2)),
        *_plain_topics(random.Random(seed + 3)),
        *_arithmetic(),
        *_code(),
        *_instructions(random.Random(seed + 4)),
        _stories(random.Random(seed + 5)),
    ]
    return {topic.name: topic for topic in topics}
