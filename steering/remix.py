"""Re-mixing experts at decision time: routing scores taken from similar, successful samples.

    with remix(bundle.model, references, texts):
        bundle.model.generate(**inputs)          # one text a sequence, in order
    with remix(bundle.model, references, {prompt.prompt_id: prompt.text for prompt in prompts}):
        generate_answers(bundle, rendered)       # whatever batches they come in

In the last few routed layers, at the last prompt token and at every generated one, the router's
probabilities give way to a mean over the prompt's nearest reference samples, *before* top-k; the
family's own top-k and renormalization follow. The vector is the same for all these tokens.

Source: C3PO (arXiv 2504.07964): critical layers are the last 5, core experts the best 20, at the
last token. What its released code does is this kernel regression (`mix=1`, `core_experts=None`)
and not the paper's gradient steps. With a key-value cache that code overwrites every generated
token, without one only the newest; here both mean every one, so a cache changes nothing.

Letters: B prompts, T rows of a router, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moescope.kernels.route import routing_probabilities, select
from moescope.probe.errors import InputError, MoescopeError, PlanError
from moescope.probe.routers import RouterSite
from moescope.steering.computed_routing import RouterCall, computed_routing, routed_layers
from moescope.steering.positions import TokenPositions
from moescope.steering.remix_store import Kernel, References
from moescope.steering.report import SteeringReport


@dataclass(frozen=True, kw_only=True)
class Remix:
    """Settings of re-mixing.

    Attributes:
        num_neighbours: reference samples for each prompt.
        kernel: how they are weighted; see `moescope.steering.remix_store.neighbours`.
        bandwidth: of the Gaussian kernel.
        mix: share of the neighbours' mean, over 0 and at most 1; the rest is the token's own
            scores. 1 is the released code.
        num_layers: the last so many routed layers (C3PO's critical layers); all where there are
            fewer.
        layers: decoder layers instead of these.
        core_experts: only the token's own best so many experts get new scores, the others keep
            theirs, so that the sum need not be 1; None for all, the released code. That the core
            is chosen by the token's own scores is our reading of the paper.
        drawn_by: a seed, with which references are drawn at random instead of the nearest: a
            control; see `References.neighbour_scores`.
    """

    num_neighbours: int = 3
    kernel: Kernel = "similarity"
    bandwidth: float = 0.5
    mix: float = 1.0
    num_layers: int = 5
    layers: tuple[int, ...] | None = None
    core_experts: int | None = 20
    drawn_by: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.mix <= 1:
            raise PlanError(f"mix must be over 0 and at most 1, not {self.mix:g}")
        if self.kernel not in ("similarity", "gaussian"):
            raise PlanError(f"kernel must be similarity or gaussian, not {self.kernel!r}")
        for name in ("num_neighbours", "num_layers", "core_experts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name} must be at least 1, not {value}")
        if self.layers is not None and not self.layers:
            raise PlanError("layers must name at least one layer")


def remixed_scores(
    own_TE: Tensor, neighbours_TE: Tensor, *, mix: float = 1.0, core_experts: int | None = None
) -> Tensor:
    """Scores float32[T, E] to select by: mix * neighbours + (1 - mix) * own, in the core only.

    The core is each token's own best `core_experts` experts, ties to the lowest id.
    """
    new_TE = neighbours_TE if mix == 1 else mix * neighbours_TE + (1 - mix) * own_TE
    if core_experts is None or core_experts >= own_TE.shape[1]:
        return new_TE
    ranked_TE = own_TE.sort(dim=1, descending=True, stable=True).indices
    core_TE = torch.zeros_like(own_TE, dtype=torch.bool)
    core_TE.scatter_(1, ranked_TE[:, :core_experts], True)
    return torch.where(core_TE, new_TE, own_TE)


@contextmanager
def remix(
    model: nn.Module,
    references: References,
    texts: Sequence[str] | Mapping[int, str],
    settings: Remix | None = None,
    *,
    sites: Sequence[RouterSite] | None = None,
) -> Iterator[SteeringReport]:
    """Route by similar samples while the block runs.

    Args:
        model: a transformers model, or a TransformerLens bridge around one.
        references: the samples; leave the prompts themselves out (`References.without`).
        texts: of the prompts that will run, one a sequence of the batch (`generate` may repeat
            each for beams and samples); or by prompt id, where whoever runs the model says which
            prompts run (`moescope.probe.batching.running_prompts`).
        settings: C3PO's without them.
        sites: the model's routers where they are proved already; see `steer`.

    Yields:
        The report of `steer`: `replay` rows count the tokens that were re-mixed.

    Raises:
        PlanError: a layer that is not there or cannot be steered, a router without a softmax, or
            references of another model.
        InputError: see `References.neighbour_scores`.
    """
    settings = settings or Remix()
    chosen = _chosen(routed_layers(model, "re-mixing", sites), settings)
    for site in chosen:
        _require_fit(site, references)
    layers = [site.info.layer for site in chosen]
    prompts = tuple(texts) if isinstance(texts, Mapping) else None
    texts = list(texts.values()) if isinstance(texts, Mapping) else list(texts)
    if not texts:
        raise InputError("re-mixing needs the text of at least one prompt")
    targets = references.neighbour_scores(
        texts, layers, num_neighbours=settings.num_neighbours, kernel=settings.kernel,
        bandwidth=settings.bandwidth, drawn_by=settings.drawn_by,
    )  # fmt: skip
    with computed_routing(
        model, _Mixer(settings, targets, prompts), layers=layers, name="remix",
        scopes=("last_prompt", "generated"), sites=sites,
    ) as report:  # fmt: skip
        yield report


@dataclass(frozen=True)
class _Mixer:
    """The routing of one router call.

    Attributes:
        settings: how scores are mixed.
        targets: decoder layer -> the neighbours' mean of each text, float32[B, E].
        prompts: the prompt of each text; None where texts are in the order of the batch.
    """

    settings: Remix
    targets: Mapping[int, Tensor]
    prompts: tuple[int, ...] | None

    def __call__(self, call: RouterCall) -> tuple[Tensor, Tensor]:
        """Weights [T, K] and ids [T, K] by the re-mixed scores."""
        info, logits_TE = call.site.info, call.decided.logits
        own_TE = routing_probabilities(logits_TE, info.rule)
        scores_TE = remixed_scores(
            own_TE, self._of_rows(call), mix=self.settings.mix,
            core_experts=self.settings.core_experts,
        )  # fmt: skip
        # The scores are taken as they are; a softmax of the K best logits is what they are
        # divided by their sum.
        rule = replace(
            info.rule, score="probabilities", arithmetic="float32", weights="score",
            renormalize=info.rule.renormalize or info.rule.weights == "softmax_topk",
        )  # fmt: skip
        return select(scores_TE, rule, **call.inputs)

    def _of_rows(self, call: RouterCall) -> Tensor:
        """Each row's neighbours' mean, float32[T, E]."""
        target_BE = self.targets[call.site.info.layer].to(call.decided.logits.device)
        positions = call.positions
        if positions is None:
            raise MoescopeError(
                f"{call.site.where}: which tokens pass the router is not known; call the re-mixed "
                "model itself, not a part of it"
            )
        if self.prompts is not None:
            target_BE = target_BE[self._texts_of(positions)]
        if positions.num_sequences % len(target_BE):
            raise MoescopeError(
                f"re-mixing was given {len(target_BE)} texts, and the number of sequences is "
                f"{positions.num_sequences}; give one text for each prompt of the batch"
            )
        times = positions.num_sequences // len(target_BE) * positions.num_columns
        return target_BE.repeat_interleave(times, dim=0)

    def _texts_of(self, positions: TokenPositions) -> list[int]:
        """Which text each running prompt has."""
        if not positions.prompts:
            raise MoescopeError(
                "re-mixing was given texts by prompt, and which prompts run is not known; run the "
                "model inside moescope.probe.batching.running_prompts([...])"
            )
        text_of = {prompt: at for at, prompt in enumerate(self.prompts or ())}
        missing = [prompt for prompt in positions.prompts if prompt not in text_of]
        if missing:
            raise MoescopeError(f"re-mixing was given no text of prompt {missing[0]}")
        return [text_of[prompt] for prompt in positions.prompts]


def _chosen(found: Sequence[RouterSite], settings: Remix) -> list[RouterSite]:
    """The routers to re-mix."""
    if settings.layers is None:
        return list(found[-settings.num_layers :])
    by_layer = {site.info.layer: site for site in found}
    missing = [layer for layer in settings.layers if layer not in by_layer]
    if missing:
        raise PlanError(
            f"layer {missing[0]} has no feed-forward router; the routed layers are "
            f"{', '.join(map(str, by_layer))}"
        )
    return [by_layer[layer] for layer in settings.layers]


def _require_fit(site: RouterSite, references: References) -> None:
    """A softmax to replace, and references that have this layer and its experts."""
    info, rule = site.info, site.info.rule
    if rule.weights == "softmax_topk":  # ranks by logits, to which a bias may be added
        is_softmax = rule.selection_bias == "none" and rule.groups is None
    else:
        is_softmax = (
            rule.score == "softmax" and rule.weights == "score" and rule.selection_bias != "logit"
        )
    if not is_softmax or rule.from_table or rule.capacity is not None:
        raise PlanError(
            f"{site.where} cannot be re-mixed: what is replaced is a softmax over all experts, "
            f"and this router selects by {rule.description}"
        )
    scores_NE = references.scores.get(info.layer)
    if scores_NE is None:
        raise PlanError(f"{site.where}: the references hold no scores of this layer")
    if scores_NE.shape[1] != info.num_experts:
        raise PlanError(
            f"{site.where} has {info.num_experts} experts, and the references "
            f"{scores_NE.shape[1]}: they are of another model"
        )
