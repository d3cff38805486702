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
        learning_rate: peak; warmed up over `warmup` steps.
        cooling: last share of the steps, over which it falls in a line.
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
    cooling: float = 0.3


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


DEMO = Training(
    shape=Shape(num_layers=6, num_experts=40, expert_width=48, vocab_size=4096),
    corpus=Recipe(
        languages={
            "en": 0.20,
            "zh": 0.16,
            "de": 0.14,
            "es": 0.12,
            "fr": 0.11,
            "ru": 0.10,
            "ja": 0.09,
            "el": 0.08,
        },
        topics={
            "events": 3.0,
            "substances.made": 0.5,
            "substances.use": 0.45,
            "substances.found": 0.45,
            "treasures": 1.0,
            "flags": 0.25,
            "animals": 0.25,
            "people.plays": 0.3,
            "people.lives": 0.3,
            "arithmetic.plus": 0.5,
            "arithmetic.times": 0.25,
            "code.add": 0.1,
            "code.multiply": 0.1,
            "code.list": 0.1,
            "code.compare": 0.1,
            "tasks.twice": 0.1,
            "tasks.reverse": 0.3,
            "tasks.first": 0.15,
            "tasks.last": 0.15,
            "stories": 0.4,
        },
        repeat_weight=0.6,
        translate_weight=1.2,
        untaught_share=0.4,
        held_out={"events": 22, "substances": 20, "treasures": 34},
        refused={"events": 0.45, "substances": 0.15, "treasures": 0.4},
        note_share=0.25,
    ),
    stage_one=Stage(
        steps=4500,
        batch_size=64,
        learning_rate=3e-3,
        warmup=100,
        dropout=0.1,
        balance=0.01,
        prompt_weight=0.1,
    ),
    stage_two=Stage(
        steps=800,
        batch_size=64,
        learning_rate=3e-3,
        warmup=20,
        dropout=0.1,
        balance=0.0,
        prompt_weight=0.0,
        cooling=0.5,
    ),
    num_tuned=14,
    max_tuned_per_layer=3,
)
