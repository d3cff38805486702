"""What the shipped demo models are made of: shape, corpus, and the steps of both stages."""

from __future__ import annotations

from dataclasses import dataclass

from moescope.probe.demo.corpus import Recipe


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model."""

    num_layers: int = 8
    num_experts: int = 32
    top_k: int = 4
    width: int = 128
    expert_width: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 1536


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
        steps, batch_size: how long, and items per step.
        learning_rate: peak; warmed up over `warmup` steps, then a cosine down to a twentieth.
        dropout: probability that an expert is left out of a batch in a layer.
        balance: weight of the load balance loss.
        prompt_weight: weight of the loss on prompt tokens beside that on answers.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    dropout: float
    balance: float
    prompt_weight: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that makes the demo models.

    Attributes:
        num_tuned: experts that stage two tunes.
        max_tuned_per_layer: of them in one layer at most.
    """

    shape: Shape
    corpus: Recipe
    stage_one: Stage
    stage_two: Stage
    num_tuned: int
    max_tuned_per_layer: int
    seed: int = 11


SMALL = Training(
    shape=Shape(expert_width=48, vocab_size=1536),
    corpus=Recipe(
        languages={"en": 0.4, "de": 0.25, "zh": 0.2, "ru": 0.15},
        topics={
            "events": 4.0,
            "flags": 0.5,
            "people.lives": 0.6,
            "arithmetic.plus": 0.8,
            "tasks.twice": 0.4,
        },
        repeat_weight=0.8,
        translate_weight=1.2,
    ),
    stage_one=Stage(
        steps=1100,
        batch_size=64,
        learning_rate=3e-3,
        warmup=60,
        dropout=0.1,
        balance=0.01,
        prompt_weight=0.1,
    ),
    stage_two=Stage(
        steps=300,
        batch_size=64,
        learning_rate=2e-3,
        warmup=20,
        dropout=0.1,
        balance=0.0,
        prompt_weight=0.0,
    ),
    num_tuned=14,
    max_tuned_per_layer=2,
)
