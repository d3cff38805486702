"""How often a contrast finds what is not there, and what is.

Draws are fixed by seed. CI takes fifty of each, `make soak` all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from moescope.probe.analysis.cells import Cells
from moescope.probe.analysis.contrasts.discovery import ContrastResult, discover
from moescope.probe.analysis.contrasts.rules import make_rule
from moescope.probe.analysis.contrasts.settings import ContrastSettings, check_settings
from moescope.probe.analysis.selection import Router
from moescope.probe.analysis.statistics import Parts, benjamini_hochberg

EXPERTS = 1_664
CI_DRAWS, ALL_DRAWS = 50, 500


def noise(rng: np.random.Generator, experts: int, *, step: float = 0.0) -> tuple[Parts, Any]:
    """Two groups of 14 and 26 units alike but for expert 0, whose rate in a is higher by `step`.

    Tokens of a unit depend on each other strongly: every unit has its own rates; lengths 5 to 500.
    """
    tokens = np.exp(rng.uniform(np.log(5), np.log(500), 40)).astype(int)
    is_a = np.arange(40) < 14
    rates = rng.beta(0.6, 8.0, (40, experts))
    rates[is_a, 0] = np.minimum(rates[is_a, 0] + step, 1)
    counts = rng.binomial(tokens[:, None], rates).astype(np.float32)
    parts = Parts(counts=counts, tokens=tokens.astype(float), units=np.arange(40), is_a=is_a)
    return parts, np.where(is_a, 1, 2)


def contrast_parts(parts: Parts, strata: Any, how: ContrastSettings) -> ContrastResult:
    """Discovery on parts whose experts belong to one router."""
    cells = Cells(
        counts=parts.counts, tokens=parts.tokens, units=parts.units,
        classes=(~parts.is_a).astype(np.int64), num_classes=2,
    )  # fmt: skip
    size = parts.counts.shape[1]
    router = Router(layer=0, kind="mlp", moe_layer=0, num_experts=size, top_k=1)
    return discover(cells, make_rule(how, [router], cells, ("group a", "group b")), strata, how)


def settings(**changes: Any) -> ContrastSettings:
    defaults: dict[str, Any] = {
        "average": "pooled", "split": True, "candidates": 50, "q": 0.05, "bootstrap": 1,
        "permutations": None, "seed": 0,
    }  # fmt: skip
    return check_settings(**(defaults | changes))


def discoveries_in_noise(draws: int, experts: int, **changes: Any) -> tuple[int, int]:
    """Draws with any confirmed expert, and draws where a token-level z-test finds one."""
    confirmed = by_tokens = 0
    for seed in range(draws):
        parts, strata = noise(np.random.default_rng([17, seed]), experts)
        result = contrast_parts(parts, strata, settings(seed=seed, **changes))
        confirmed += bool(result.confirmed.any())
        rate_a, rate_b = parts.rates()
        n_a, n_b = parts.tokens[parts.is_a].sum(), parts.tokens[~parts.is_a].sum()
        pooled = parts.counts.sum(axis=0) / (n_a + n_b)
        error = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
        p = 2 * stats.norm.sf(np.abs(rate_a - rate_b) / np.maximum(error, 1e-12))
        by_tokens += bool((benjamini_hochberg(p) <= 0.05).any())
    return confirmed, by_tokens


@pytest.mark.parametrize(
    "changes",
    [{"average": "unit"}, {"split": False}, {"method": "log_odds"}, {"method": "safex"}],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_no_variant_confirms_much_in_noise(changes: Any) -> None:
    draws = 25
    how = {"average": None, "candidates": 20, "bootstrap": 50} | changes
    found, by_tokens = discoveries_in_noise(draws, 120, **how)
    assert found <= stats.binom.ppf(0.999, draws, 0.05)
    assert by_tokens > 0.9 * draws


@pytest.mark.parametrize("draws", [CI_DRAWS, pytest.param(ALL_DRAWS, marks=pytest.mark.soak)])
def test_noise_is_rarely_confirmed_while_tokens_as_units_always_are(draws: int) -> None:
    found, by_tokens = discoveries_in_noise(draws, EXPERTS)
    print(f"{found} of {draws} draws with any discovery; by tokens {by_tokens}")  # noqa: T201
    assert found <= 0.07 * draws
    assert by_tokens > 0.5 * draws


UNITS_PER_GROUP = 80
RATE, SPREAD = 0.2, 0.04


def planted_difference(rng: np.random.Generator, errors: float) -> tuple[Parts, Any]:
    """Two groups of 80 units; expert 0's mean rates differ by so many standard errors of a half.

    The standard error is the true one of the difference of means over the units of one half.
    """
    units = 2 * UNITS_PER_GROUP
    is_a = np.arange(units) < UNITS_PER_GROUP
    rates = RATE + SPREAD * rng.standard_normal((units, EXPERTS))
    error = SPREAD * np.sqrt(2 / (UNITS_PER_GROUP / 2))
    rates[is_a, 0] += errors * error
    parts = Parts(
        counts=rates.astype(np.float32), tokens=np.ones(units), units=np.arange(units), is_a=is_a
    )
    return parts, np.where(is_a, 1, 2)


def computed_power(errors: float) -> float:
    """The share of draws in which the expert is found, from the normal and t distributions alone.

    Its difference on the discovery half must exceed that of all but 49 of the others, and its p on
    the confirmation half reach the level over the number of candidates. That others reach theirs
    too, which Benjamini-Hochberg rewards, is left out.
    """
    cut = stats.norm.isf(50 / EXPERTS / 2)
    among_candidates = stats.norm.sf(cut - errors) + stats.norm.cdf(-cut - errors)
    freedom = UNITS_PER_GROUP - 2
    smallest = stats.t.isf(0.05 / 50 / 2, freedom)
    return float(among_candidates * stats.nct.sf(smallest, freedom, errors))


@pytest.mark.parametrize("draws", [CI_DRAWS, pytest.param(ALL_DRAWS, marks=pytest.mark.soak)])
@pytest.mark.parametrize("errors", [3.0, 8.0])
def test_a_planted_difference_is_found_as_often_as_computed(errors: float, draws: int) -> None:
    expected = 0.95 if errors == 8 else computed_power(errors)
    found = 0
    for seed in range(draws):
        parts, strata = planted_difference(np.random.default_rng([5, seed]), errors)
        result = contrast_parts(parts, strata, settings(seed=seed))
        place = np.flatnonzero(result.candidates == 0)
        found += bool(len(place) and result.q[place[0]] <= 0.05)
    print(f"{errors:g} standard errors: found in {found} of {draws}, computed {expected:.3f}")  # noqa: T201
    assert found >= expected * draws


def test_a_planted_step_in_noise_is_confirmed() -> None:
    for seed in range(5):
        parts, strata = noise(np.random.default_rng([99, seed]), 1_664, step=0.6)
        result = contrast_parts(parts, strata, settings(seed=seed, candidates=10))
        assert result.candidates[0] == 0
        assert result.confirmed[0]
        assert not result.confirmed[1:].any()
