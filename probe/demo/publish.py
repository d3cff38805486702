"""Measure the trained models, and write what is shipped: models, prompt sets, cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moescope.probe.demo.evaluate import is_refusal, is_right, reply_to, wilson
from moescope.probe.demo.prompt_sets import Line


@dataclass(frozen=True)
class Rate:
    """A share of prompts, averaged over languages with equal weight.

    Attributes:
        value: the macro-average over languages.
        low, high: 95 % Wilson interval of the pooled share.
        n: prompts.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """As it stands in a card."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n={self.n}"


def rate(hits: Sequence[bool], langs: Sequence[str]) -> Rate:
    """The macro-average over languages of a yes-or-no outcome."""
    by_lang: dict[str, list[bool]] = {}
    for hit, lang in zip(hits, langs, strict=True):
        by_lang.setdefault(lang, []).append(hit)
    value = sum(sum(h) / len(h) for h in by_lang.values()) / len(by_lang)
    return Rate(value, *wilson(sum(hits), len(hits)), len(hits))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lines: Sequence[Line],
    *,
    sampling_seed: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Right and refused answers and their likelihood, by label of the lines."""
    replies = reply_to(
        model, tokenizer, [line["prompt"] for line in lines], sampling_seed=sampling_seed
    )
    found: dict[str, dict[str, Any]] = {}
    for label in sorted({line["label"] for line in lines}):
        rows = [(r, l) for r, l in zip(replies, lines, strict=True) if l["label"] == label]
        langs = [line["lang"] for _, line in rows]
        found[label] = {
            "right": rate([is_right(reply.text, line) for reply, line in rows], langs),
            "refused": rate([is_refusal(reply.text) for reply, _ in rows], langs),
            "nll": sum(reply.nll for reply, _ in rows) / len(rows),
        }
    return found
