"""Real routing of DeepSeek-V2-Lite, tiled to any size, as the shards of a run.

The data (deepseek-ai/ESFT, MIT): one file per router, one line per sequence, expert ids of all
tokens, then their weights, rounded to four digits; 64 experts, 6 per token, 26 routed layers. Every
tile adds other noise within the rounding, so that weights fill their 24 bits as they came from the
model, and no tile is a copy of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.probe.layer_rows import lists_of
from moescope.probe.storage.run_folder import RunDescription
from moescope.probe.storage.shards import shard_name

EXPERTS, TOP_K, LAYERS = 64, 6, range(1, 27)
HALF_A_DIGIT = 5e-5

Array = NDArray[Any]
Weights = Literal["shipped", "float32", "bf16"]


@dataclass(frozen=True)
class Tile:
    """One copy of all sequences: experts by rank, with their weights.

    Attributes:
        number: of the tile.
        lengths: tokens of each sequence.
        experts: uint16[tokens, layers, 6].
        weights: float32[tokens, layers, 6], descending.
    """

    number: int
    lengths: Array
    experts: Array
    weights: Array

    @property
    def prompt_ids(self) -> Array:
        """Of the sequences."""
        return self.number * len(self.lengths) + np.arange(len(self.lengths))

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """Its rows, as a collector writes them."""
        prompt = np.repeat(self.prompt_ids, self.lengths)
        position = np.concatenate([np.arange(length) for length in self.lengths])
        num_tokens, num_layers = self.experts.shape[:2]
        rows = num_tokens * num_layers
        return {
            "prompts": self._prompts(),
            "tokens": self._tokens(prompt, position),
            "usage_arrays": self._usage(),
            "routing_arrays": pa.table(
                {
                    "prompt_id": np.repeat(prompt, num_layers),
                    "position": np.repeat(position, num_layers),
                    "layer": np.tile(np.array(LAYERS), num_tokens),
                    "kind": pa.repeat(pa.scalar("mlp"), rows),
                    "is_ranked": pa.repeat(pa.scalar(value=True), rows),
                    "experts": lists_of(self.experts.reshape(-1), TOP_K),
                    "weights": lists_of(self.weights.reshape(-1), TOP_K),
                }
            ),
        }

    def _prompts(self) -> pa.Table:
        number = len(self.lengths)
        empty = pa.nulls(number, pa.string())
        names = ("key", "label", "lang", "pair_id", "target", "span", "expected", "response",
                 "outcome", "detector", "meta")  # fmt: skip
        halves = np.where(np.arange(number) < number // 2, "a", "b")
        return pa.table(
            {
                "prompt_id": self.prompt_ids, "text": [""] * number, "rendered_text": [""] * number,
                "set_name": ["esft"] * number, "domain": halves, "num_tokens": self.lengths,
                "num_generated": np.zeros(number, int), **dict.fromkeys(names, empty),
            }
        )  # fmt: skip

    def _tokens(self, prompt: Array, position: Array) -> pa.Table:
        number = len(prompt)
        ids = (prompt * 7919 + position * 104_729) % 100_000  # as spread as those of a vocabulary
        words = ids.astype(str)
        return pa.table(
            {
                "prompt_id": prompt, "position": position, "token_id": ids, "token": words,
                "phase": ["prompt"] * number, "segment": ["user"] * number,
                "is_special": np.zeros(number, bool), "in_span": np.zeros(number, bool),
                "is_routed": np.ones(number, bool),
            }
        )  # fmt: skip

    def _usage(self) -> pa.Table:
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        layer = np.arange(len(LAYERS))
        cell = ((owner[:, None, None] * len(LAYERS) + layer[:, None]) * EXPERTS) + self.experts
        size = len(self.lengths) * len(LAYERS) * EXPERTS
        counts = np.bincount(cell.reshape(-1), minlength=size).astype(np.int32)
        sums = np.bincount(cell.reshape(-1), weights=self.weights.reshape(-1), minlength=size)
        rows = len(self.lengths) * len(LAYERS)
        empty = pa.nulls(rows, pa.list_(pa.float32()))
        # The source has the scores of the selected experts alone.
        unknown = ("prob_sum", "norm_sum", "weighted_norm_sum", "easyep_sum", "max_abs")
        return pa.table(
            {
                "prompt_id": np.repeat(self.prompt_ids, len(LAYERS)), "phase": ["prompt"] * rows,
                "segment": ["user"] * rows, "is_special": np.zeros(rows, bool),
                "layer": np.tile(np.array(LAYERS), len(self.lengths)), "kind": ["mlp"] * rows,
                "routed_tokens": np.repeat(self.lengths, len(LAYERS)),
                "num_tokens": lists_of(counts, EXPERTS),
                "weight_sum": lists_of(sums.astype(np.float32), EXPERTS),
                **dict.fromkeys(unknown, empty),
            }
        )  # fmt: skip


@dataclass(frozen=True)
class RealRouting:
    """All sequences as recorded.

    Attributes:
        lengths: tokens of each sequence.
        experts: [tokens, layers, 6], in the order of the files.
        weights: [tokens, layers, 6], rounded.
    """

    lengths: Array
    experts: Array
    weights: Array

    @classmethod
    def read(cls, data: Path) -> RealRouting:
        """Read the folders `law` and `summary`."""
        layers = []
        for layer in LAYERS:
            lines = [
                line.split("\t\t")
                for folder in ("law", "summary")
                for line in (data / folder / f"expert_weights_{layer}.txt").read_text().splitlines()
            ]
            ids = [np.array(line[0].split("\t"), np.int64).reshape(-1, TOP_K) for line in lines]
            weights = [np.array(line[1].split("\t"), float).reshape(-1, TOP_K) for line in lines]
            layers.append((ids, weights))
        lengths = np.array([len(ids) for ids in layers[0][0]])
        experts = np.stack([np.concatenate(ids) for ids, _ in layers], axis=1)
        weights = np.stack([np.concatenate(weights) for _, weights in layers], axis=1)
        return cls(lengths, experts, weights)

    @property
    def num_slots(self) -> int:
        """Of one tile."""
        return int(self.experts.size)

    def tile(self, number: int, kind: Weights = "float32") -> Tile:
        """A copy with noise of its own."""
        weights = self.weights.astype(np.float32)
        if kind != "shipped":
            rng = np.random.default_rng(number)
            noise = rng.uniform(-HALF_A_DIGIT, HALF_A_DIGIT, self.weights.shape)
            weights = (self.weights + noise).astype(np.float32)
        if kind == "bf16":
            bits = weights.view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            weights = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
        order = np.argsort(-weights, axis=-1, kind="stable")
        return Tile(
            number,
            self.lengths,
            np.take_along_axis(self.experts, order, -1).astype(np.uint16),
            np.take_along_axis(weights, order, -1),
        )

    def tiles(self, number: int, kind: Weights) -> Iterator[Tile]:
        """So many copies, one after the other."""
        for index in range(number):
            yield self.tile(index, kind)

    def describe(self, tiles: int, *, level: str = "topk", **changes: Any) -> RunDescription:
        """The run of so many tiles, a shard each."""
        number = len(self.lengths)
        layers = [
            {"layer": layer, "kind": "mlp", "moe_layer": layer - 1, "module": f"layers.{layer}",
             "num_experts": EXPERTS, "top_k": TOP_K, "num_shared_experts": 2,
             "rule": {"score": "softmax"}}
            for layer in LAYERS
        ]  # fmt: skip
        return RunDescription(
            **{
                "model": "deepseek-v2-lite", "revision": None, "family": "deepseek_v2",
                "record_level": level, "layers": layers, "manifest": {}, "identity": {"n": tiles},
                "planned_shards": {
                    shard_name(tile): list(range(tile * number, (tile + 1) * number))
                    for tile in range(tiles)
                }, **changes,
            }
        )  # fmt: skip
