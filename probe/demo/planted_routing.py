"""A routing table with planted structure, for tests of analyses.

Tokens of prompts in several languages and domains, routed by rules that are known: who
specializes in which domain, who goes together, who follows whom in the next layer, and in which
layers languages keep to experts of their own. Nothing else is there: the rest is drawn evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LANGUAGES = ("en", "de", "zh", "ru")
DOMAINS = ("facts", "code", "stories")


@dataclass(frozen=True)
class PlantedRouting:
    """Routing of N tokens in L layers, K experts each of E, and the truth about it.

    Attributes:
        expert_ids: int64[N, L, K], distinct within a token and layer, rank 0 first.
        weights: float64[N, L, K], falling with rank and summing to 1.
        prompt_ids: int64[N], ascending; position: int64[N], from 0 in every prompt.
        position: int64[N].
        langs: language of every token.
        domains: domain of every token.
        num_experts: E.
        specialists: layer to {expert: domain}: selected for every token of that domain and for
            no other token.
        partners: layer to the pair that is always selected together, or not at all.
        transitions: layer to {expert: expert of the next layer}: who has the first gets the
            second there.
        language_experts: layer to {language: its experts}: of these layers every token takes an
            expert of its language and none of another's. Other layers know no language.
    """

    expert_ids: NDArray[np.int64]
    weights: NDArray[np.float64]
    prompt_ids: NDArray[np.int64]
    position: NDArray[np.int64]
    langs: NDArray[np.str_]
    domains: NDArray[np.str_]
    num_experts: int
    specialists: dict[int, dict[int, str]]
    partners: dict[int, tuple[int, int]]
    transitions: dict[int, dict[int, int]]
    language_experts: dict[int, dict[str, tuple[int, ...]]]


def plant_routing(
    *, prompts_per_cell: int = 6, tokens_per_prompt: int = 20, seed: int = 0
) -> PlantedRouting:
    """A table of 5 layers, 24 experts, 4 of them a token.

    Layer 0 and layer 4 keep languages apart; layer 1 has a specialist for every domain; layer 2
    has a pair of partners; from layer 2 to layer 3 some experts have a fixed successor.

    Args:
        prompts_per_cell: prompts for every language and domain.
        tokens_per_prompt: tokens of each.
        seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    cells = [(lang, domain) for lang in LANGUAGES for domain in DOMAINS]
    prompts = [cell for cell in cells for _ in range(prompts_per_cell)]
    num_experts, num_layers, top_k = 24, 5, 4
    own = {lang: tuple(range(4 * i, 4 * i + 4)) for i, lang in enumerate(LANGUAGES)}
    shared = tuple(range(16, num_experts))
    specialists = {20 + i: domain for i, domain in enumerate(DOMAINS)}
    partners = (3, 11)
    successor = {5: 17, 9: 2}

    def draw(pool: list[int], count: int) -> list[int]:
        return [int(e) for e in rng.choice(pool, size=count, replace=False)]

    def route(lang: str, domain: str) -> list[list[int]]:
        apart = [[*draw(list(own[lang]), 2), *draw(list(shared), 2)] for _ in range(2)]
        special = next(e for e, d in specialists.items() if d == domain)
        plain = [e for e in range(num_experts) if e not in specialists]
        third = draw([e for e in range(num_experts) if e not in partners], top_k)
        if rng.random() < 0.3:
            third[:2] = partners
        following = [successor[e] for e in third if e in successor]
        free = [e for e in range(num_experts) if e not in successor.values()]
        fourth = [*following, *draw(free, top_k - len(following))]
        return [apart[0], [special, *draw(plain, top_k - 1)], third, fourth, apart[1]]

    rows = [route(*prompt) for prompt in prompts for _ in range(tokens_per_prompt)]
    ids = np.array(rows, dtype=np.int64)
    raw = np.sort(rng.random(ids.shape) + 0.05, axis=-1)[..., ::-1]
    langs, domains = (np.repeat(column, tokens_per_prompt) for column in zip(*prompts, strict=True))
    assert ids.shape == (len(langs), num_layers, top_k)
    return PlantedRouting(
        expert_ids=rng.permuted(ids, axis=-1),
        weights=raw / raw.sum(axis=-1, keepdims=True),
        prompt_ids=np.repeat(np.arange(len(prompts)), tokens_per_prompt),
        position=np.tile(np.arange(tokens_per_prompt), len(prompts)),
        langs=langs,
        domains=domains,
        num_experts=num_experts,
        specialists={1: specialists},
        partners={2: partners},
        transitions={2: successor},
        language_experts={0: dict(own), num_layers - 1: dict(own)},
    )
