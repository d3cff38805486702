"""Recording the routing of a transformers model: a context manager over its routers.

    with record(bundle.model) as trace:
        bundle.model(**inputs)
    trace[3].expert_ids

Hooks sit on the routers and keep what was *used*: the ids and weights that the router handed on,
with what it scored beside them; nothing is selected again. Every forward is checked as it ends: a
routed layer that produced nothing, or another number of rows than the layers beside it, stops with
its name. On leaving, also through an exception, no hook is left behind.

Letters: T rows that passed a router (tokens, padding included), K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moescope.probe.bridges import called_in_place_of, underlying
from moescope.probe.errors import RecordingError
from moescope.probe.norms import ExpertNorms, norm_watchers
from moescope.probe.recorder import Forward, Recorder
from moescope.probe.routers import LayerInfo, RouterSite, find_routers
from moescope.probe.sums import LayerUsage

#: What is kept: counts only, experts and weights of every token, or the router's scores too.
RecordLevel = Literal["usage", "topk", "probs"]

#: A decoder layer, or a layer and its kind where it has several routed blocks.
LayerKey = int | tuple[int, str]

__all__ = [
    "Forward",
    "LayerKey",
    "LayerTrace",
    "LayerUsage",
    "RecordLevel",
    "Trace",
    "record",
]


@dataclass(frozen=True)
class LayerTrace:
    """The recorded routing of one layer: one row per token that passed its router.

    A layer that a model uses more than once in a forward has its rows once per use, one use after
    the other.

    Attributes:
        info: which layer.
        weights: routing weights as used, float[T, K], in the router's own order.
        expert_ids: selected experts, int64[T, K], in the router's own order.
        is_token: bool[T], false on padding; None where that cannot be told: an attention mask of
            another shape than [batch, length], or routers that see an unknown part of the tokens.
        modality: int8[T], 0 text, 1 image, 2 video, 3 audio, where the processor's
            `mm_token_type_ids` told it in every forward; None elsewhere.
        norms: what the selected experts put out, with `record(norms=True)`.
        bias: the router's selection bias, float[E], or None.
    """

    info: LayerInfo
    weights: Tensor
    expert_ids: Tensor
    is_token: Tensor | None = None
    modality: Tensor | None = None
    norms: ExpertNorms | None = None
    bias: Tensor | None = None
    kept_logits: Tensor | None = field(default=None, repr=False)

    @property
    def logits(self) -> Tensor:
        """What the router scored, float[T, E]: raw logits (probabilities for Gemma 4).

        Raises:
            RecordingError: recorded at level topk, which does not keep them.
        """
        if self.kept_logits is None:
            raise RecordingError(
                "logits were not kept: this was recorded at level topk; use "
                'record(model, level="probs")'
            )
        return self.kept_logits


@dataclass
class Trace:
    """What `record` caught.

    Attributes:
        layers: the routed layers, in forward order.
        level: what is kept.
        forwards: one entry per forward of the model (or of its encoder, where `generate` calls
            that alone), on the CPU, padding rows included; empty at level usage.
    """

    layers: list[LayerInfo]
    level: RecordLevel = "probs"
    forwards: list[Forward] = field(default_factory=list)
    sums: dict[str, LayerUsage] = field(default_factory=dict, repr=False)
    biases: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, layer: LayerKey) -> LayerTrace:
        """All rows of one routed layer, forwards one after the other.

        Args:
            layer: the decoder layer; with its kind, as `trace[3, "attention"]`, where it has
                several routed blocks.
        """
        info = self.layer(layer)
        if self.level == "usage":
            raise RecordingError("level usage keeps no rows; read trace.usage(layer)")
        self._require_something()
        parts = [
            forward.rows[info.module] for forward in self.forwards if info.module in forward.rows
        ]
        if not parts:
            raise RecordingError(
                f"layer {info.layer} ({info.module}) routed nothing in what was recorded"
            )
        return LayerTrace(
            info=info,
            weights=torch.cat([part.weights for part in parts]),
            expert_ids=torch.cat([part.expert_ids for part in parts]).long(),
            is_token=_joined([part.tokens.is_token for part in parts]),
            modality=_joined([part.tokens.modality for part in parts]),
            norms=ExpertNorms.joined([part.norms for part in parts]),
            bias=self.biases.get(info.module),
            kept_logits=_joined([part.logits for part in parts]),
        )

    def usage(self, layer: LayerKey) -> LayerUsage:
        """Sums over all recorded tokens of one layer, padding left out where it is known.

        Raises:
            RecordingError: nothing was recorded, or not at level usage.
        """
        info = self.layer(layer)
        if self.level != "usage":
            raise RecordingError(f"sums are kept at level usage, this is level {self.level}")
        if info.module not in self.sums:
            raise RecordingError("nothing was recorded: the model was not called")
        return self.sums[info.module].on_cpu()

    def layer(self, layer: LayerKey) -> LayerInfo:
        """The routed layer that a key names.

        Raises:
            KeyError: no such layer, or several kinds of router in it.
        """
        number, kind = layer if isinstance(layer, tuple) else (layer, None)
        found = [info for info in self.layers if info.layer == number and kind in (None, info.kind)]
        if len(found) == 1:
            return found[0]
        if found:
            kinds = " or ".join(f"[{number}, {info.kind!r}]" for info in found)
            raise KeyError(f"layer {number} has {len(found)} routers: say which, as {kinds}")
        known = [info.layer for info in self.layers if kind in (None, info.kind)]
        what = "router" if kind is None else f"router of kind {kind!r}"
        raise KeyError(f"layer {number} has no {what}; the routed layers are {known}")

    def sequence_rows(self, beam_indices: Tensor, layer: LayerKey | None = None) -> list[Tensor]:
        """Which rows belong to each sequence that one beam search returned.

        Beams swap their rows between forwards. `generate(..., num_beams=N,
        return_dict_in_generate=True)` returns as `beam_indices` from which row each token was
        taken, which is the row whose input was that sequence's own beginning.

        Args:
            beam_indices: int[sequences, steps], as `generate` returned it; negative after the end.
            layer: whose rows, where stacks differ (encoder-decoder models); the last one otherwise.

        Returns:
            For each sequence the rows into `trace[layer]`, int64[n]: all positions of the prompt,
            padding included, then one for each generated token but the last.

        Raises:
            RecordingError: the trace is not that of one such call of `generate`.
        """
        self._require_something()
        info = self.layers[-1] if layer is None else self.layer(layer)
        forwards = [forward for forward in self.forwards if info.module in forward.rows]
        shapes = [forward.shapes.get(info.module) for forward in forwards]
        num_rows = int(beam_indices.max()) + 1
        taken = (beam_indices >= 0).sum(dim=1).tolist()
        if (
            any(shape is None or shape[0] < num_rows for shape in shapes)
            or any(shape is not None and shape[1] != 1 for shape in shapes[1:])
            or len(forwards) < max(taken)
        ):
            raise RecordingError(
                f"these beam indices are of {max(taken)} steps over at least {num_rows} rows, and "
                f"the trace has {len(forwards)} forwards of shapes {shapes}: record one call of "
                "generate alone"
            )
        first = shapes[0]
        assert first is not None
        starts = [0]
        for forward in forwards:
            starts.append(starts[-1] + len(forward.rows[info.module].expert_ids))
        found = []
        for row, steps in zip(beam_indices.cpu(), taken, strict=True):
            prompt = int(row[0]) * first[1] + torch.arange(first[1])
            later = torch.tensor(starts[1:steps], dtype=torch.long) + row[1:steps].long()
            found.append(torch.cat([prompt, later]))
        return found

    def clear(self) -> None:
        """Forget what was recorded so far; `record` goes on."""
        self.forwards.clear()
        self.sums.clear()

    def _require_something(self) -> None:
        if not self.forwards:
            raise RecordingError("nothing was recorded: the model was not called")


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Forwards one after the other, or None where one of them has none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


@contextmanager
def record(
    model: Any,
    *,
    level: RecordLevel = "probs",
    norms: bool = False,
    sites: Sequence[RouterSite] | None = None,
) -> Iterator[Trace]:
    """Record the routing of every forward of `model` while the block runs.

    Args:
        model: a transformers model, or a TransformerLens `TransformerBridge` around one; then its
            own hooks go on working, and what they change is what is recorded.
        level: `usage` keeps sums only, `topk` every token's experts and weights, `probs` the
            router's logits too.
        norms: measure what each selected expert put out (see `moescope.probe.norms`); the experts
            that were selected are run once more.
        sites: the model's routers, where the caller has found or verified them already.

    Raises:
        ModelInputError: a dense model, a family that is not supported, or (`norms`) one whose
            experts cannot be run one at a time.
        RecordingError: a routed layer was skipped, or routed another number of tokens.
    """
    model = underlying(model)
    sites = find_routers(model) if sites is None else list(sites)
    trace = Trace([site.info for site in sites], level)
    _require_unambiguous(trace.layers)
    watchers = norm_watchers(model, sites) if norms else {}
    recorder = Recorder(model, sites, level=level, watchers=watchers)
    called_for = called_in_place_of(model)
    with ExitStack() as stack:
        for site in sites:
            hooked = called_for.get(site.router, site.router)
            hook = hooked.register_forward_hook(recorder.router_hook(site))
            stack.callback(hook.remove)
        for watcher in watchers.values():
            stack.enter_context(watcher.attached())
        stack.enter_context(recorder.following_forwards(trace.forwards, trace.sums))
        trace.biases.update(_biases(sites))
        yield trace


def _biases(sites: Sequence[RouterSite]) -> dict[str, Tensor]:
    found = {site.info.module: site.bias for site in sites}
    return {
        module: bias.detach().float().cpu() for module, bias in found.items() if bias is not None
    }


def _require_unambiguous(layers: Sequence[LayerInfo]) -> None:
    seen: dict[tuple[int, str], str] = {}
    for info in layers:
        other = seen.setdefault((info.layer, info.kind), info.module)
        if other != info.module:
            raise RecordingError(
                f"{other} and {info.module} are both layer {info.layer} of kind {info.kind!r}, so "
                "their rows could not be told apart"
            )
