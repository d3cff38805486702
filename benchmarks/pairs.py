"""Timing two ways of doing the same thing side by side, in interleaved pairs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

Run = Callable[[], None]


@dataclass(frozen=True)
class Ratio:
    """How much longer one of two runs takes.

    Attributes:
        median: of the ratios of all pairs.
        low, high: bootstrap interval of that median, 95 %.
        pairs: how many there were.
        seconds: median time of the plain run.
    """

    median: float
    low: float
    high: float
    pairs: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.median:.4f} [{self.low:.4f}, {self.high:.4f}], median of {self.pairs} "
            f"interleaved pairs of {self.seconds:.2f} s"
        )


def model_and_inputs() -> tuple[torch.nn.Module, torch.Tensor]:
    """A random OLMoE: 16 layers, 64 experts, top-8, width 512; 8 prompts of 256 tokens."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=256, num_hidden_layers=16,
        num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=8,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).eval()
    return model, torch.randint(2, 1000, (8, 256))


def compare(plain: Run, other: Run, *, pairs: int) -> Ratio:
    """Time both in turn, the order swapped from pair to pair, after one of each to warm up."""
    plain()
    other()
    seconds = np.empty((pairs, 2))
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            (plain, other)[which]()
            seconds[pair, which] = time.perf_counter() - start
    ratios = seconds[:, 1] / seconds[:, 0]
    draws = np.random.default_rng(0).choice(ratios, (4000, pairs))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Ratio(
        float(np.median(ratios)), float(low), float(high), pairs, float(np.median(seconds[:, 0]))
    )


def machine() -> str:
    """What it ran on."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}"
    )
