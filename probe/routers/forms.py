"""How most routers hand over what they decided: `(logits, weights, ids, ...)`.

65 of the 72 families with routed experts in transformers 5.23 return a tuple that begins with
logits [T, E], weights [T, K] and ids [T, K], and call `experts(hidden, ids, weights)`. What some
of them need besides is here too: Gemma 4's factors per expert, DeepSeek-V4's table of token ids,
Inkling's shared experts and Zaya's skip class. `moescope.probe.routers.odd_forms` has the others.

Letters: T rows that passed the router, E classes, K experts per token, S shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moescope.kernels.route import shared_weights
from moescope.probe.errors import RecordingError, UnknownRoutingError
from moescope.probe.routers.reading import live_tensor
from moescope.probe.routers.spec import RouterOutput, RouterSite


class TupleForm:
    """`(logits, weights, ids, ...)` from the router, `experts(hidden, ids, weights)`."""

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """The first three values of the router's tuple."""
        del args
        if not isinstance(output, tuple) or len(output) < 3:
            raise RecordingError(
                f"{site.where}: the router returned {describe(output)} instead of (logits, "
                "weights, ids); a fused kernel or another version of it may have taken its place"
            )
        return RouterOutput(*output[:3])

    def inputs(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> dict[str, Any]:
        """The selection bias, where the rule has one."""
        del args, output
        bias_E = site.bias
        if bias_E is not None and bias_E.is_meta:
            raise UnknownRoutingError(f"{site.where}: its selection bias is not in memory")
        return {} if bias_E is None else {"bias_E": bias_E}

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """The router's tuple with weights and ids replaced."""
        del site, args
        return (output[0], weights.to(output[1].dtype), ids, *output[3:])

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """The second and third argument of the experts."""
        _, ids, weights = experts_arguments(site, args, kwargs, 3)
        return ids, weights

    def counted(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Tokens per expert, from the ids that arrived."""
        found = self.arrived(site, args, kwargs)
        if found is None:
            return None
        ids, weights = found
        return torch.bincount(ids[weights != 0], minlength=site.info.num_experts)


class AtLeastTwoForm(TupleForm):
    """LongCat-Flash: the tuple, but its experts fail on one expert a token.

    `LongcatFlashExperts.forward` squeezes the axis of slots away where it has length 1. One expert
    a token is written with a second slot beside it: the same expert again, with weight 0.
    """

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """The router's tuple with weights and ids replaced."""
        if ids.shape[1] == 1:
            ids = ids.expand(-1, 2)
            weights = torch.cat([weights, torch.zeros_like(weights)], dim=1)
        return super().write(site, args, output, weights, ids)


class ScaledProbabilityForm(TupleForm):
    """Gemma 4: probabilities in place of logits, and a learned factor per expert."""

    def inputs(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> dict[str, Any]:
        """The factors per expert."""
        del args, output
        return {"expert_scale_E": tensor_of(site, "per_expert_scale")}


class TableForm(TupleForm):
    """DeepSeek-V4's hash layers: ids from a table by token id, the router's second argument."""

    def inputs(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> dict[str, Any]:
        """The table's ids of these tokens."""
        del output
        if len(args) < 2 or not isinstance(args[1], Tensor):
            raise RecordingError(
                f"{site.where}: a hash router was called without token ids, so its table cannot be "
                "followed"
            )
        table_VK = tensor_of(site, "tid2eid")
        return {"table_ids_TK": table_VK[args[1].reshape(-1)].long()}


class SharedGammasForm(TupleForm):
    """Inkling: a fourth value, the weights of the shared experts, normalized with the routed ones.

    A written selection gives the shared experts the weights that the router's own logits give them
    beside the newly selected experts; edits of logits change the routed weights only.
    """

    def inputs(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> dict[str, Any]:
        """Bias, the shared experts' logits, and the global factor for each expert."""
        factor_1 = tensor_of(site, "global_scale").float()
        return {
            **super().inputs(site, args, output),
            "shared_logits_TS": self._shared_logits(site, args),
            "expert_scale_E": factor_1.expand(site.info.num_experts),
        }

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """Weights, ids and the shared experts' weights replaced."""
        logits_TE, old_TK, _, old_gammas_TS = output[:4]
        needed = self.inputs(site, args, output)
        gammas_TS = shared_weights(
            logits_TE,
            ids,
            site.info.rule,
            shared_logits_TS=needed["shared_logits_TS"],
            expert_scale_E=needed["expert_scale_E"],
        )
        gammas_TS = gammas_TS.to(old_gammas_TS.dtype).contiguous()
        return (logits_TE, weights.to(old_TK.dtype), ids, gammas_TS, *output[4:])

    def _shared_logits(self, site: RouterSite, args: tuple[Any, ...]) -> Tensor:
        """The shared experts' logits, float32[T, S]; the router computes but does not return them.

        All logits are computed and the shared ones cut out, as the router does: a smaller product
        could round differently.
        """
        weight = tensor_of(site, "weight").float()
        count: Any = site.router.n_shared_experts
        hidden: Tensor = args[0]
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            flat = hidden.reshape(-1, hidden.shape[-1]).float()
            return torch.nn.functional.linear(flat, weight)[..., -count:]


class SkipClassForm(TupleForm):
    """Zaya: top-1 of E - 1 experts and a last class that means "no expert".

    The router says id 0 and weight 0 for it. Here such a token has id E - 1 and weight 0, so that
    expert 0 is not credited with tokens that it never saw.
    """

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """The router's decision, skipped tokens as class E - 1."""
        found = super().read(site, args, output)
        return found._replace(expert_ids=self._skipped(site, found.expert_ids, found.weights))

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """Weights and ids replaced, class E - 1 as the router says it."""
        skips = ids == site.info.num_experts - 1
        return super().write(
            site, args, output, weights.masked_fill(skips, 0), ids.masked_fill(skips, 0)
        )

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Ids and weights in the experts' arguments, skipped tokens as class E - 1."""
        found = super().arrived(site, args, kwargs)
        return None if found is None else (self._skipped(site, *found), found[1])

    def _skipped(self, site: RouterSite, ids: Tensor, weights: Tensor) -> Tensor:
        return ids.masked_fill((ids == 0) & (weights == 0), site.info.num_experts - 1)


def experts_arguments(
    site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int
) -> list[Any]:
    """The experts' arguments in order of their parameters, however they were passed."""
    found = [*args, *kwargs.values()]
    if len(found) != count:
        raise RecordingError(
            f"{site.where}: the experts were called with {len(found)} arguments instead of "
            f"{count}; a fused kernel or another version of them may have taken their place"
        )
    return found


def tensor_of(site: RouterSite, name: str) -> Tensor:
    """A tensor of the live router, as it is at this moment.

    Raises:
        UnknownRoutingError: it is not there, or not in memory.
    """
    value = live_tensor(site.router, name)
    if value is None or value.is_meta:
        raise UnknownRoutingError(
            f"{site.where}: {type(site.router).__name__}.{name} is not in memory, so the selection "
            "cannot be repeated"
        )
    return value


def describe(value: Any) -> str:
    """A returned value in a few words, for error messages."""
    if isinstance(value, Tensor):
        return f"one tensor {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return f"a {type(value).__name__}"
