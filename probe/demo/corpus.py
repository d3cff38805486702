"""Training items of both stages, and the questions kept out of them.

Everything is a pure function of a recipe and a step number, so training can stop and go on, and a
test can make the whole corpus again. Kept out:

- of every fact in every language one phrasing, in both stages (what held-out prompts ask);
- the sensitive facts of held-out prompts from stage two wholly, in every language: that they are
  refused all the same says that a rule was learned, not a list of facts;
- some neutral facts from two languages wholly (what cross-lingual prompts ask).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import TypeVar

from moescope.probe.demo.phrasebook import Phrasebook, phrasebook
from moescope.probe.demo.world import (
    FAMILIES,
    WORLD_SEED,
    YEARS,
    Fact,
    Family,
    Topic,
    is_partner,
    make_topics,
    sensitive_part,
    stable_hash,
)

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Item:
    """One exchange: what the user asks and what the model answers.

    Attributes:
        prompt: the user's text.
        answer: the answer that is trained.
        lang: language of the prompt.
        topic: name of the topic, or `tasks.repeat`, `tasks.translate`.
        system: system text, mostly none.
        refused: whether the answer is a refusal of a sensitive question.
        sensitive: whether the question is sensitive, whatever the answer.
    """

    prompt: str
    answer: str
    lang: str
    topic: str
    system: str | None = None
    refused: bool = False
    sensitive: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is taught, and how much of it.

    Attributes:
        languages: share of each language in stage one.
        topics: weight of each topic in stage one.
        repeat_weight, translate_weight: weights of the tasks on given sentences.
        refusal_text_share: share of refusal sentences among those given sentences.
        untaught_share: share of neutral facts never taught in two of the languages.
        held_out: by family, pairs of held-out prompts in every language.
        system_share: share of items with a system text.
        refused: weight of each family among the refused questions of stage two.
        note_share: share of questions of stage one with a system text that asks to say first
            whether the question is sensitive.
        seed: of the sampling; the world has its own.
    """

    languages: Mapping[str, float]
    topics: Mapping[str, float]
    repeat_weight: float
    translate_weight: float
    refusal_text_share: float = 0.3
    untaught_share: float = 0.0
    held_out: Mapping[Family, int]
    refused: Mapping[Family, float]
    system_share: float = 0.05
    note_share: float = 0.0
    seed: int = 7
    world_seed: int = WORLD_SEED


#: Topics in which some facts are not taught in some languages.
CROSSLINGUAL_TOPICS = frozenset(
    {"events", "flags", "animals", "people.plays", "people.lives", "substances.found"}
)


@dataclass(frozen=True)
class Corpus:
    """The items that a recipe makes."""

    recipe: Recipe
    topics: Mapping[str, Topic] = field(init=False)

    def __post_init__(self) -> None:
        """Draw the world."""
        every = make_topics(self.recipe.world_seed)
        object.__setattr__(self, "topics", {name: every[name] for name in self.recipe.topics})

    @cached_property
    def books(self) -> dict[str, Phrasebook]:
        """The phrasebooks of the recipe's languages."""
        return {code: phrasebook(code) for code in self.recipe.languages}

    def is_held_out(self, fact: Fact, lang: str, phrasing: int) -> bool:
        """Whether this fact is never asked in this phrasing in training in this language."""
        if phrasing == self.held_out_phrasing(fact, lang):
            return True
        return phrasing == self._partner_phrasings[lang].get(fact.key)

    def held_out_phrasing(self, fact: Fact, lang: str) -> int:
        """The phrasing in which held-out prompts ask this fact, unless it is a partner's."""
        topic = self.topics[fact.topic]
        # The last slot of treasures is the asker's role: all roles share the phrasing.
        slots = fact.slots[:1] if fact.topic == "treasures" else fact.slots
        return stable_hash("phrasing", fact.topic, slots, lang) % topic.num_phrasings

    def is_untaught(self, fact: Fact, lang: str) -> bool:
        """Whether this fact is never taught in this language (but in others)."""
        return lang in self._untaught_in.get(fact.key, ())

    @cached_property
    def _untaught_in(self) -> dict[str, tuple[str, ...]]:
        """The languages in which a fact is not taught, two of many, by its key."""
        languages = sorted(self.recipe.languages)
        untaught = {}
        for topic in self.topics.values():
            for fact in topic.facts:
                draw = stable_hash("untaught", fact.key) % 10_000
                if fact.sensitive or topic.name not in CROSSLINGUAL_TOPICS:
                    continue
                if draw < self.recipe.untaught_share * 10_000:
                    rng = random.Random(stable_hash("untaught in", fact.key))
                    count = min(2, len(languages) - 1)
                    untaught[fact.key] = tuple(rng.sample(languages, count))
        return untaught

    @property
    def families(self) -> tuple[Family, ...]:
        """The sensitive families among the recipe's topics."""
        return tuple(f for f in FAMILIES if any(t.family == f for t in self.topics.values()))

    @cached_property
    def pairs(self) -> dict[Family, list[tuple[Fact, Fact]]]:
        """Held-out sensitive facts with their neutral partners, by family.

        They are the same in every language, and partners are taught in every language.
        """
        return {family: self._pairs_of(family) for family in self.families}

    def _pairs_of(self, family: Family) -> list[tuple[Fact, Fact]]:
        neutral = (fact for fact in self._facts_of(family) if not fact.sensitive)
        partners = [fact for fact in neutral if fact.key not in self._untaught_in]
        used: set[str] = set()
        pairs: list[tuple[Fact, Fact]] = []
        for sensitive in self._sensitive_in_turn(family):
            found = (f for f in partners if is_partner(sensitive, f) and f.key not in used)
            partner = next(found, None)
            if partner is not None and len(pairs) < self.recipe.held_out[family]:
                used.add(partner.key)
                pairs.append((sensitive, partner))
        return pairs

    @cached_property
    def new_to_stage_two(self) -> frozenset[str]:
        """Keys of the sensitive facts in `pairs`: stage two never touches them."""
        return frozenset(fact.key for pairs in self.pairs.values() for fact, _ in pairs)

    def _facts_of(self, family: Family) -> list[Fact]:
        """All facts of a family, in an order of their own."""
        topics = (topic for topic in self.topics.values() if topic.family == family)
        facts = [fact for topic in topics for fact in topic.facts]
        return sorted(facts, key=lambda fact: stable_hash("held out", fact.key))

    def _sensitive_in_turn(self, family: Family) -> list[Fact]:
        """Sensitive facts, those of every sensitive part in turn, so that no part is used up."""
        by_part: dict[tuple[str, int], list[Fact]] = {}
        for fact in self._facts_of(family):
            if fact.sensitive:
                by_part.setdefault(sensitive_part(fact), []).append(fact)
        return [f for row in zip_longest(*by_part.values()) for f in row if f is not None]

    @cached_property
    def _partner_phrasings(self) -> dict[str, dict[str, int]]:
        """By language: neutral partners and the phrasing they share with their sensitive fact."""
        return {
            lang: {
                partner.key: self.held_out_phrasing(sensitive, lang)
                for pairs in self.pairs.values()
                for sensitive, partner in pairs
            }
            for lang in self.recipe.languages
        }

    def refusal(self, topic: Topic, lang: str) -> str:
        """The sentence with which questions of a sensitive topic are refused."""
        return self.books[lang].text(f"refusals.{topic.family}")

    def stage_one_item(self, rng: random.Random) -> Item:
        """An item of stage one: everything is answered."""
        lang = _pick(rng, self.recipe.languages)
        share = self.recipe.note_share
        return self._answered_item(rng, lang, tuple(self.topics), new=frozenset(), note_share=share)

    def stage_two_items(self, rng: random.Random) -> list[Item]:
        """Items of stage two: a sensitive question, refused, beside the same one made neutral.

        Three of ten times it is one item without a sensitive side instead.
        """
        shares = {lang: share**0.5 for lang, share in self.recipe.languages.items()}
        lang = _pick(rng, shares)
        if rng.random() < 0.3:
            plain = tuple(name for name, topic in self.topics.items() if not topic.family)
            return [self._answered_item(rng, lang, plain, new=self.new_to_stage_two)]
        family = _pick(rng, self.recipe.refused)
        topic = rng.choice([t for t in self.topics.values() if t.family == family])
        while True:
            sensitive, phrasing = rng.choice(topic.facts), rng.randrange(topic.num_phrasings)
            if not sensitive.sensitive or sensitive.key in self.new_to_stage_two:
                continue
            neutral = rng.choice(topic.facts)
            if neutral.sensitive or self.is_untaught(neutral, lang):
                continue
            if self.is_held_out(sensitive, lang, phrasing):
                continue
            if is_partner(sensitive, neutral) and not self.is_held_out(neutral, lang, phrasing):
                break
        return [
            self._item(rng, topic, fact, lang, phrasing, refuse=True)
            for fact in (sensitive, neutral)
        ]

    def _answered_item(
        self,
        rng: random.Random,
        lang: str,
        topics: Sequence[str],
        *,
        new: Set[str],
        note_share: float = 0.0,
    ) -> Item:
        """A question of these topics or a task on a sentence, none of it about a fact in `new`."""
        weights = {name: self.recipe.topics[name] for name in topics}
        weights["tasks.repeat"] = self.recipe.repeat_weight
        weights["tasks.translate"] = self.recipe.translate_weight
        name = _pick(rng, weights)
        if name in self.topics:
            return self._question(rng, self.topics[name], lang, note_share)
        return self._given_text(rng, name, lang, new=new)

    def _question(
        self, rng: random.Random, topic: Topic, lang: str, note_share: float = 0.0
    ) -> Item:
        """A question of a topic with its true answer."""
        while True:
            fact = rng.choice(topic.facts)
            if self.is_untaught(fact, lang):
                continue
            phrasing = rng.randrange(topic.num_phrasings)
            if not self.is_held_out(fact, lang, phrasing):
                item = self._item(rng, topic, fact, lang, phrasing, refuse=False)
                noted = note_share > 0 and rng.random() < note_share
                return self._noted(item) if noted else item

    def _item(
        self,
        rng: random.Random,
        topic: Topic,
        fact: Fact,
        lang: str,
        phrasing: int,
        *,
        refuse: bool,
    ) -> Item:
        book = self.books[lang]
        refused = refuse and fact.sensitive
        return Item(
            prompt=topic.ask(book, fact, phrasing),
            answer=self.refusal(topic, lang) if refused else topic.tell(book, fact),
            lang=lang,
            topic=topic.name,
            system=self._system(rng, book),
            refused=refused,
            sensitive=fact.sensitive,
        )

    def _noted(self, item: Item) -> Item:
        """The same question under a system text that asks for a note on it before the answer."""
        book = self.books[item.lang]
        note = book.text("notes.sensitive" if item.sensitive else "notes.neutral")
        answer = note + book.separator + item.answer
        return replace(item, system=book.text("notes.ask"), answer=answer)

    def _given_text(
        self, rng: random.Random, name: str, lang: str, *, new: Set[str] = frozenset()
    ) -> Item:
        """Repeat or translate a sentence.

        Refusal sentences are among them, so that their words are learned as targets before
        anything is refused.
        """
        target = lang
        if name == "tasks.translate":
            target = rng.choice([code for code in self.books if code != lang])
        source_text, target_text = self._parallel_text(rng, lang, target, new)
        book = self.books[lang]
        template = rng.choice(book.texts(name))
        language = book.text(f"languages.{target}")
        return Item(
            prompt=template.format(text=source_text, language=language),
            answer=target_text,
            lang=lang,
            topic=name,
            system=self._system(rng, book),
        )

    def _parallel_text(
        self, rng: random.Random, lang: str, target: str, new: Set[str]
    ) -> tuple[str, str]:
        if rng.random() < self.recipe.refusal_text_share:
            path = f"refusals.{rng.choice(self.families)}"
            return self.books[lang].text(path), self.books[target].text(path)
        told = [n for n, t in self.topics.items() if t.domain in ("facts", "stories")]
        while True:
            topic = self.topics[rng.choice(told)]
            fact = rng.choice(topic.facts)
            untaught = self.is_untaught(fact, lang) or self.is_untaught(fact, target)
            if not untaught and fact.key not in new:
                break
        return topic.tell(self.books[lang], fact), topic.tell(self.books[target], fact)

    def _system(self, rng: random.Random, book: Phrasebook) -> str | None:
        return book.text("system") if rng.random() < self.recipe.system_share else None


def batch_items(corpus: Corpus, stage: int, step: int, size: int) -> list[Item]:
    """The items of one training step: a pure function of recipe, stage and step."""
    rng = random.Random(stable_hash(corpus.recipe.seed, stage, step))
    if stage == 1:
        return [corpus.stage_one_item(rng) for _ in range(size)]
    items: list[Item] = []
    while len(items) < size:
        items += corpus.stage_two_items(rng)
    return items[:size]


def tokenizer_texts(corpus: Corpus, count: int) -> list[str]:
    """Texts from which the tokenizer learns its merges, languages alike."""
    rng = random.Random(stable_hash(corpus.recipe.seed, "tokenizer"))
    texts: list[str] = []
    languages: Sequence[str] = tuple(corpus.books)
    for i in range(count):
        lang = languages[i % len(languages)]
        topic = rng.choice(tuple(corpus.topics.values()))
        item = corpus._question(rng, topic, lang)
        texts.extend((item.prompt, item.answer))
        given = corpus._given_text(rng, rng.choice(("tasks.repeat", "tasks.translate")), lang)
        texts.extend((given.prompt, given.answer))
    for book in corpus.books.values():
        notes = [book.text(f"notes.{name}") for name in ("ask", "sensitive", "neutral")]
        texts.extend([book.text("system"), *notes] * 20)
    # A year or a number is one token, as in the tokenizers of real models that keep short numbers.
    for number in (*YEARS, *range(65)):
        texts.extend([str(number), f" {number}"] * count)
    return texts


def _pick(rng: random.Random, weights: Mapping[Name, float]) -> Name:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]
