"""How prompts are run and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass

from moescope.probe.generation import GREEDY, Sampling
from moescope.probe.recording import RecordLevel
from moescope.probe.rendering import ChatTemplate
from moescope.probe.storage.run_folder import RoutingPlace


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How prompts are run and what is kept.

    Attributes:
        level: `usage` keeps counts per prompt, `topk` every token's experts and weights too,
            `probs` the router's probability of every expert as well.
        norms: measure what each selected expert put out (see `moescope.probe.norms`).
        max_new_tokens: tokens to generate after each prompt; 0 runs the prompts alone.
        sampling: how answers are generated.
        chat_template: whether prompts go through the tokenizer's chat template.
        system: a system message for all prompts.
        layers: decoder layers to keep; None keeps all routed ones.
        tokens_per_batch: padded tokens of a batch, answers included.
        routing_in: `store`, or `shards` to leave routing in Parquet files that the store reads.
    """

    level: RecordLevel = "topk"
    norms: bool = False
    max_new_tokens: int = 0
    sampling: Sampling = GREEDY
    chat_template: ChatTemplate = "auto"
    system: str | None = None
    layers: tuple[int, ...] | None = None
    tokens_per_batch: int = 4096
    routing_in: RoutingPlace = "store"
