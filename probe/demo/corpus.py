"""Training items of both stages, and the questions kept out of them.

Everything is a pure function of a recipe and a step number, so training can stop and go on, and a
test can make the whole corpus again. Kept out:

- of every fact in every language one phrasing, in both stages (what held-out prompts ask);
- some neutral facts from some languages wholly (what cross-lingual prompts ask).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    stable_hash,
)


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
        untaught_share: share of neutral facts never taught in a language.
        held_out: pairs of held-out prompts per language and family.
        system_share: share of items with a system text.
        seed: of the sampling; the world has its own.
    """

    languages: Mapping[str, float]
    topics: Mapping[str, float]
    repeat_weight: float
    translate_weight: float
    refusal_text_share: float = 0.3
    untaught_share: float = 0.0
    held_out: int = 26
    system_share: float = 0.05
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
        if fact.sensitive or fact.topic not in CROSSLINGUAL_TOPICS:
            return False
        draw = stable_hash("untaught", fact.key, lang) % 10_000
        return draw < self.recipe.untaught_share * 10_000

    @property
    def families(self) -> tuple[Family, ...]:
        """The sensitive families among the recipe's topics."""
        return tuple(f for f in FAMILIES if any(t.family == f for t in self.topics.values()))

    @cached_property
    def pairs(self) -> dict[tuple[str, Family], list[tuple[Fact, Fact]]]:
        """Held-out sensitive facts with their neutral partners, by language and family."""
        return {
            (lang, family): self._pairs_of(lang, family)
            for lang in self.recipe.languages
            for family in self.families
        }

    def _pairs_of(self, lang: str, family: Family) -> list[tuple[Fact, Fact]]:
        topics = [topic for topic in self.topics.values() if topic.family == family]
        facts = [fact for topic in topics for fact in topic.facts]
        facts.sort(key=lambda fact: stable_hash("held out", fact.key, lang))
        used: set[str] = set()
        pairs: list[tuple[Fact, Fact]] = []
        for sensitive in (fact for fact in facts if fact.sensitive):
            partner = next(
                (
                    fact
                    for fact in facts
                    if is_partner(sensitive, fact)
                    and fact.key not in used
                    and not self.is_untaught(fact, lang)
                ),
                None,
            )
            if partner is not None and len(pairs) < self.recipe.held_out:
                used.add(partner.key)
                pairs.append((sensitive, partner))
        return pairs

    @cached_property
    def _partner_phrasings(self) -> dict[str, dict[str, int]]:
        """By language: neutral partners and the phrasing they share with their sensitive fact."""
        return {
            lang: {
                partner.key: self.held_out_phrasing(sensitive, lang)
                for family in self.families
                for sensitive, partner in self.pairs[lang, family]
            }
            for lang in self.recipe.languages
        }

    def refusal(self, topic: Topic, lang: str) -> str:
        """The sentence with which questions of a sensitive topic are refused."""
        return self.books[lang].text(f"refusals.{topic.family}")

    def stage_one_item(self, rng: random.Random) -> Item:
        """An item of stage one: everything is answered."""
        lang = _pick(rng, self.recipe.languages)
        weights = dict(self.recipe.topics)
        weights["tasks.repeat"] = self.recipe.repeat_weight
        weights["tasks.translate"] = self.recipe.translate_weight
        name = _pick(rng, weights)
        if name in self.topics:
            return self._question(rng, self.topics[name], lang, refuse=False)
        return self._given_text(rng, name, lang)

    def stage_two_item(self, rng: random.Random) -> Item:
        """An item of stage two: sensitive questions are refused, half of the items are."""
        shares = {lang: share**0.5 for lang, share in self.recipe.languages.items()}
        lang = _pick(rng, shares)
        families = self.families
        if rng.random() < 0.3:
            return self.stage_one_neutral(rng, lang)
        family = rng.choice(families)
        topic = rng.choice([t for t in self.topics.values() if t.family == family])
        return self._question(rng, topic, lang, refuse=True, sensitive=rng.random() < 0.6)

    def stage_one_neutral(self, rng: random.Random, lang: str) -> Item:
        """An item of stage one in a language, from whatever is not of a sensitive family."""
        weights = {n: w for n, w in self.recipe.topics.items() if not self.topics[n].family}
        weights["tasks.repeat"] = self.recipe.repeat_weight
        weights["tasks.translate"] = self.recipe.translate_weight
        name = _pick(rng, weights)
        if name in self.topics:
            return self._question(rng, self.topics[name], lang, refuse=False)
        return self._given_text(rng, name, lang)

    def _question(
        self,
        rng: random.Random,
        topic: Topic,
        lang: str,
        *,
        refuse: bool,
        sensitive: bool | None = None,
    ) -> Item:
        while True:
            fact = rng.choice(topic.facts)
            if sensitive is not None and fact.sensitive != sensitive:
                continue
            if self.is_untaught(fact, lang):
                continue
            phrasing = rng.randrange(topic.num_phrasings)
            if not self.is_held_out(fact, lang, phrasing):
                break
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

    def _given_text(self, rng: random.Random, name: str, lang: str) -> Item:
        """Repeat or translate a sentence.

        Refusal sentences are among them, so that their words are learned as targets before
        anything is refused.
        """
        target = lang
        if name == "tasks.translate":
            target = rng.choice([code for code in self.books if code != lang])
        source_text, target_text = self._parallel_text(rng, lang, target)
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

    def _parallel_text(self, rng: random.Random, lang: str, target: str) -> tuple[str, str]:
        if rng.random() < self.recipe.refusal_text_share:
            path = f"refusals.{rng.choice(self.families)}"
            return self.books[lang].text(path), self.books[target].text(path)
        told = [n for n, t in self.topics.items() if t.domain in ("facts", "stories")]
        while True:
            topic = self.topics[rng.choice(told)]
            fact = rng.choice(topic.facts)
            if not (self.is_untaught(fact, lang) or self.is_untaught(fact, target)):
                break
        return topic.tell(self.books[lang], fact), topic.tell(self.books[target], fact)

    def _system(self, rng: random.Random, book: Phrasebook) -> str | None:
        return book.text("system") if rng.random() < self.recipe.system_share else None


def batch_items(corpus: Corpus, stage: int, step: int, size: int) -> list[Item]:
    """The items of one training step: a pure function of recipe, stage and step."""
    rng = random.Random(stable_hash(corpus.recipe.seed, stage, step))
    make = corpus.stage_one_item if stage == 1 else corpus.stage_two_item
    return [make(rng) for _ in range(size)]


def tokenizer_texts(corpus: Corpus, count: int) -> list[str]:
    """Texts from which the tokenizer learns its merges, languages alike."""
    rng = random.Random(stable_hash(corpus.recipe.seed, "tokenizer"))
    texts: list[str] = []
    languages: Sequence[str] = tuple(corpus.books)
    for i in range(count):
        lang = languages[i % len(languages)]
        topic = rng.choice(tuple(corpus.topics.values()))
        item = corpus._question(rng, topic, lang, refuse=False)
        texts.extend((item.prompt, item.answer))
        given = corpus._given_text(rng, rng.choice(("tasks.repeat", "tasks.translate")), lang)
        texts.extend((given.prompt, given.answer))
    for book in corpus.books.values():
        texts.extend([book.text("system")] * 20)
    # A year or a number is one token, as in the tokenizers of real models that keep short numbers.
    for number in (*YEARS, *range(65)):
        texts.extend([str(number), f" {number}"] * count)
    return texts


def _pick(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]
