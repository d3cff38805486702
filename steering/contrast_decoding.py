"""Self-contrast decoding (SCMoE): the model against itself with an expert that it did not choose.

    with contrasting(bundle.model, SelfContrast(beta=0.5)):
        bundle.model.generate(**inputs)

Each next token is scored by two forwards: strong, the model as it is, and weak, in which every
token of every routed layer uses only the expert of one rank. What both say alike is discounted:
(1 + beta) * strong - beta * weak, among the tokens that the strong one finds plausible.

Source: Shi et al., "Unchosen Experts Can Contribute Too" (NeurIPS 2024, arXiv 2405.14507); the
plausibility bound is that of O'Brien and Lewis (arXiv 2309.09117). The weak forward has hidden
states of its own and therefore a key-value cache of its own. `record` around it sees both forwards,
the strong one first.

Letters: B sequences, S tokens so far, V vocabulary, T rows of a router, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moescope.kernels.route import Edits, select
from moescope.probe.bridges import underlying
from moescope.probe.errors import InputError, PlanError
from moescope.probe.routers import RouterSite, find_routers
from moescope.steering.computed_routing import RouterCall, computed_routing, routed_layers
from moescope.steering.report import SteeringReport


@dataclass(frozen=True, kw_only=True)
class SelfContrast:
    """Settings of self-contrast decoding.

    Attributes:
        rank: whose rank in the router's order the weak forward uses, from 0, as in the store; None
            for the best unchosen expert of each layer (rank K; 2 for Mixtral, as in the example
            of the authors' release).
        alpha: a token is kept where its strong score is at least the largest plus ln(alpha), that
            is, where its probability is at least alpha times the largest; over 0, at most 1.
        beta: how much the weak scores are discounted, at least 0; with 0 and greedy choice the
            model's own tokens come out.
        weight: of the weak forward's one expert. `renormalized`: over the chosen ranks, of which
            there is one, so 1 (times the family's constant factor); the paper. `own`: what the
            family's rule gives, below 1 where it does not renormalize; ours.
    """

    rank: int | None = None
    alpha: float = 0.1
    beta: float = 0.5
    weight: Literal["renormalized", "own"] = "renormalized"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.rank is not None and self.rank < 0:
            raise PlanError(f"rank counts from 0 and cannot be {self.rank}")
        if not 0 < self.alpha <= 1:
            raise PlanError(f"alpha must be over 0 and at most 1, not {self.alpha:g}")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise PlanError(f"beta must be a number of at least 0, not {self.beta:g}")
        if self.weight not in ("renormalized", "own"):
            raise PlanError(f"weight must be renormalized or own, not {self.weight!r}")


def contrast_scores(strong_BV: Tensor, weak_BV: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Next-token scores float[B, V] of self-contrast; minus infinity where not plausible.

    (1 + beta) * strong - beta * weak; -inf where strong < max(strong) + ln(alpha).
    """
    floor_B1 = strong_BV.amax(dim=-1, keepdim=True) + math.log(alpha)
    implausible_BV = strong_BV < floor_B1
    return ((1 + beta) * strong_BV - beta * weak_BV).masked_fill(implausible_BV, -torch.inf)


@contextmanager
def only_rank(
    model: nn.Module,
    rank: int | None = None,
    *,
    weight: Literal["renormalized", "own"] = "renormalized",
    sites: Sequence[RouterSite] | None = None,
) -> Iterator[SteeringReport]:
    """Let every token use only the expert of one rank, in all routed layers, while the block runs.

    Shared experts go on working. Arguments as in `SelfContrast` and `steer`.

    Raises:
        PlanError: there is no such rank, or a layer cannot be steered or is steered already.
    """
    layers = routed_layers(model, "self-contrast", sites)
    for site in layers:
        _require_rank(site, rank)

    def compute(call: RouterCall) -> tuple[Tensor, Tensor]:
        wanted = call.site.info.top_k if rank is None else rank
        return _of_rank(call, wanted, weight)

    with computed_routing(
        model, compute, layers=[site.info.layer for site in layers], name="only one rank",
        sites=sites,
    ) as report:  # fmt: skip
        yield report


@contextmanager
def contrasting(
    model: nn.Module, contrast: SelfContrast | None = None, *, use_cache: bool = True
) -> Iterator[None]:
    """Let `model.generate` choose tokens by self-contrast while the block runs.

    Greedy choice and sampling; processors of `generate` that change scores (repetition penalty)
    act on the strong scores, temperature and top-p on the contrasted ones. Text only.

    Args:
        model: a transformers decoder, or a TransformerLens bridge around one.
        contrast: the settings; the paper's without them.
        use_cache: whether the weak forward keeps a key-value cache.

    Raises:
        PlanError: a family whose routing cannot be steered, or a rank that it does not have.
        InputError: raised by `generate`, before a token is made: beams (contrasted scores are no
            log-probabilities, so sums of them do not compare), inputs other than token ids, or
            padded prompts without an attention mask.
    """
    model = underlying(model)
    settings = contrast or SelfContrast()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PlanError("self-contrast is for decoders; this model has an encoder")
    for site in routed_layers(model, "self-contrast"):
        _require_rank(site, settings.rank)
    own = model.__dict__.get("generate")
    generate: Any = model.generate

    @wraps(generate)
    def contrasted(*args: Any, **kwargs: Any) -> Any:
        mask = _mask_of_generate(model, args, kwargs)
        given = kwargs.pop("logits_processor", None) or []
        processor = ContrastProcessor(model, settings, mask, use_cache=use_cache)
        return generate(*args, logits_processor=_processors(*given, processor), **kwargs)

    model.__dict__["generate"] = contrasted
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = own


class ContrastProcessor:
    """A logits processor for `generate`: takes the strong scores and runs the weak forward.

    Args:
        model: the transformers model that generates.
        contrast: the settings.
        attention_mask: int[B, S] of the prompts; rows may be fewer than those that `generate`
            asks for by a whole factor (`num_return_sequences`).
        use_cache: whether the weak forward keeps a key-value cache.
    """

    def __init__(
        self,
        model: nn.Module,
        contrast: SelfContrast,
        attention_mask: Tensor,
        *,
        use_cache: bool = True,
    ) -> None:
        self.model = model
        self.contrast = contrast
        self.prompt_mask = attention_mask
        self.use_cache = use_cache
        self._accepts = signature(model.forward).parameters
        self._cache: Any = None
        self._cached: Tensor | None = None  # the tokens that the cache holds, int64[B, S]
        self._sites: list[RouterSite] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrasted scores float[B, V] of the next token, from strong ones."""
        weak_BV = self.weak_scores(input_ids).to(scores)
        return contrast_scores(scores, weak_BV, alpha=self.contrast.alpha, beta=self.contrast.beta)

    def weak_scores(self, input_ids: Tensor) -> Tensor:
        """The weak forward's scores float32[B, V] of the token after int64[B, S]."""
        mask = self._mask(input_ids)
        known = self._num_known(input_ids)
        inputs: dict[str, Any] = {
            "input_ids": input_ids[:, known:], "attention_mask": mask, "use_cache": self.use_cache,
        }  # fmt: skip
        if "position_ids" in self._accepts:  # as `generate` counts them
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, known:]
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1
        if known:
            inputs["past_key_values"] = self._cache
        contrast = self.contrast
        with (
            torch.no_grad(),
            only_rank(self.model, contrast.rank, weight=contrast.weight, sites=self._sites),
        ):
            found = self.model(**inputs)
        self._keep(input_ids, found)
        logits: Tensor = found.logits
        return logits[:, -1].float()

    def _num_known(self, input_ids: Tensor) -> int:
        """How many of the tokens the cache holds already; 0 where it holds others."""
        held = self._cached
        if held is None or held.shape[1] >= input_ids.shape[1]:
            return 0
        same = torch.equal(held, input_ids[:, : held.shape[1]])
        return held.shape[1] if same else 0

    def _keep(self, input_ids: Tensor, found: Any) -> None:
        """The cache for the next token; and that the routers are proved, which `steer` has done."""
        if self.use_cache:
            self._cache = getattr(found, "past_key_values", None)
            self._cached = None if self._cache is None else input_ids.clone()
        if self._sites is None:
            self._sites = [
                replace(site, info=replace(site.info, verified=True, reason=None))
                if site.info.kind == "mlp"
                else site
                for site in find_routers(self.model)
            ]

    def _mask(self, input_ids: Tensor) -> Tensor:
        """The prompts' mask with the tokens since, int[B, S]."""
        mask = self.prompt_mask.to(input_ids.device)
        num_rows, num_columns = input_ids.shape
        if num_rows % len(mask) or num_columns < mask.shape[1]:
            raise InputError(
                f"the attention mask has shape {list(mask.shape)}, and the sequences that are "
                f"continued {list(input_ids.shape)}; give the mask of these prompts"
            )
        mask = mask.repeat_interleave(num_rows // len(mask), dim=0)
        return functional.pad(mask, (0, num_columns - mask.shape[1]), value=1)


def _of_rank(
    call: RouterCall, rank: int, weight: Literal["renormalized", "own"]
) -> tuple[Tensor, Tensor]:
    """Weights float[T, 1] and ids int64[T, 1] of the experts of one rank."""
    logits_TE, rule = call.decided.logits, call.site.info.rule
    num_T = torch.full(logits_TE.shape[:1], rank + 1, device=logits_TE.device)
    # Numbers per token, rather than one number, are taken in the order of their scores.
    ranked = Edits(top_k=num_T, max_top_k=rank + 1)
    weights_TR, ids_TR = select(logits_TE, rule, ranked, **call.inputs)
    ids_T1 = ids_TR[:, rank:]
    if weight == "own" and rule.weights == "sparsemixer":
        return weights_TR[:, rank:], ids_T1  # each weight is made without the experts before it
    this_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, ids_T1, True)
    if weight == "renormalized" and rule.weights != "logsigmoid_shared":
        # A softmax over the one logit: exactly 1, then the family's constant factors.
        rule = replace(rule, weights="softmax_topk", renormalize=False)
    return select(logits_TE, rule, Edits(force_natural=this_TE, top_k=1), **call.inputs)


def _require_rank(site: RouterSite, rank: int | None) -> None:
    info = site.info
    if info.rule.capacity is not None:
        raise PlanError(
            f"{site.where} sends each token to one expert up to the expert's capacity; another "
            "rank's expert cannot be used there"
        )
    if info.rule.from_table:
        raise PlanError(
            f"{site.where} takes its experts from a table by token id, so they have no ranks"
        )
    wanted = info.top_k if rank is None else rank
    if wanted >= info.num_experts:
        raise PlanError(
            f"{site.where} has {info.num_experts} experts, so ranks 0-{info.num_experts - 1}; "
            f"there is no rank {wanted}"
        )


def _processors(*processors: Any) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors)


def _mask_of_generate(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The prompts' attention mask in a call of `generate`, int[B, S].

    Raises:
        InputError: what self-contrast cannot do.
    """
    config = kwargs.get("generation_config") or model.generation_config
    beams = kwargs.get("num_beams", getattr(config, "num_beams", None))
    if beams is not None and beams > 1:
        raise InputError("self-contrast decodes greedily or by sampling; num_beams must be 1")
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError("self-contrast needs the prompts as token ids of [sequences, tokens]")
    others = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and name not in ("inputs", "input_ids", "attention_mask")
    ]
    if others:
        raise InputError(f"self-contrast reads text alone, and cannot take {', '.join(others)}")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask
    pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
    if pad is not None and bool((ids == pad).any()):
        raise InputError("these prompts hold padding tokens; give generate their attention_mask")
    return torch.ones_like(ids)
