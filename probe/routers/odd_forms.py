"""Routers that hand over their decision in a form of their own.

DBRX (logits only; the block selects), Llama 4 (dense scores that scale the experts' inputs), JetMoE
(tokens sorted by expert), Switch (one-hot, with tokens dropped beyond an expert's capacity), NLLB
(weights in a dense matrix) and Doge (product keys, all in one block).

A selection that is written leaves less in some of these forms than was decided (a slot of weight 0
has no id in a dense matrix), so the tensor that carries it also remembers weights and ids, and
`read` returns those: `record` inside `steer` sees exactly what steering decided.

Letters: B sequences of S tokens, T = B S rows that passed the router, E experts, K per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.errors import MoescopeError, RecordingError
from moescope.probe.routers.forms import TupleForm, describe, experts_arguments
from moescope.probe.routers.spec import RouterOutput, RouterSite

_SELECTION = "_moescope_selection"


class BlockSelectionForm(TupleForm):
    """DBRX: the router returns logits, and the block's `route_tokens_to_experts` selects.

    Reading asks that method, the one that the block is about to call with the same tensor. Writing
    stands in for it once: the block's next call of it, with exactly the tensor that was written,
    gets the written selection, and the block is as before.
    """

    _METHOD = "route_tokens_to_experts"

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """The logits, and what the block selects by them."""
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise RecordingError(
                f"{site.where}: the router returned {describe(output)} instead of its logits"
            )
        found = remembered(output)
        if found is None:
            found = getattr(type(site.block), self._METHOD)(site.block, output)
        return RouterOutput(output, *found)

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """The logits, remembering the selection, with the block's method stood in for once."""
        block = site.block
        logits_TE = remember(output.view_as(output), weights.to(output.dtype), ids)

        def selection(given_TE: Tensor) -> tuple[Tensor, Tensor]:
            block.__dict__.pop(self._METHOD, None)
            found = remembered(given_TE)
            if found is None:  # left over from a forward that an exception ended
                found = getattr(type(block), self._METHOD)(block, given_TE)
            return found

        block.__dict__[self._METHOD] = selection
        return logits_TE


class DenseScoreForm(TupleForm):
    """Llama 4: `(scores [T, E], logits [T, E])`, zero where not selected, scaling experts' inputs.

    Every expert runs on every token, on zeros where it was not selected.
    """

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """Logits, and the entries of the scores that are not zero, best logit first."""
        if not isinstance(output, tuple) or len(output) != 2:
            raise RecordingError(
                f"{site.where}: the router returned {describe(output)} instead of (scores, logits)"
            )
        scores_TE, logits_TE = output
        found = remembered(scores_TE)
        if found is None:
            chosen_TE = logits_TE.masked_fill(scores_TE == 0, -torch.inf)
            ids = chosen_TE.topk(site.info.top_k, dim=1).indices
            found = scores_TE.gather(1, ids), ids
        return RouterOutput(logits_TE, *found)

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """The scores rebuilt from the selection."""
        weights = weights.to(output[0].dtype)
        scores_TE = torch.zeros_like(output[0]).scatter(1, ids, weights)
        return remember(scores_TE, weights, ids), output[1]

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Nothing: the experts' inputs are already scaled."""
        return None

    def counted(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Rows per expert that are not all zero."""
        hidden: Tensor = experts_arguments(site, args, kwargs, 1)[0]
        by_expert = hidden.view(site.info.num_experts, -1, hidden.shape[-1])
        return (by_expert != 0).any(-1).sum(1)


class DispatchForm(TupleForm):
    """JetMoE: `(order, token, gate, tokens per expert, logits)`, slots sorted by expert.

    Its attention experts keep exactly K query heads per token; where fewer are written, the rest
    repeat the token's first expert with gate 0.
    """

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """Weights and ids with the sorting undone."""
        if not isinstance(output, tuple) or len(output) != 5:
            raise RecordingError(
                f"{site.where}: the router returned {describe(output)} instead of the five of "
                "JetMoeTopKGating"
            )
        order, _, gates, sizes, logits_TE = output
        found = remembered(gates)
        if found is None:
            counts = torch.tensor(sizes, device=order.device)
            experts = torch.arange(len(sizes), device=order.device).repeat_interleave(counts)
            ids = torch.empty_like(order).scatter(0, order, experts)
            weights = torch.empty_like(gates).scatter(0, order, gates)
            shape = (logits_TE.shape[0], -1)
            found = weights.view(shape), ids.view(shape)
        return RouterOutput(logits_TE, *found)

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """The slots of the selection, sorted by expert as the router sorts them."""
        logits_TE = output[4]
        weights = weights.to(output[2].dtype)
        slots_weights, slots_ids = weights, ids
        if site.info.kind == "attention":
            slots_weights, slots_ids = self._exactly_k(site, weights, ids)
        per_token = slots_ids.shape[1]
        _, order = slots_ids.flatten().sort(0)
        token = order.div(per_token, rounding_mode="trunc")
        gates = slots_weights.flatten()[order]
        sizes = torch.bincount(slots_ids.flatten(), minlength=site.info.num_experts).tolist()
        return order, token, remember(gates, weights, ids), sizes, logits_TE

    def _exactly_k(self, site: RouterSite, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        missing = site.info.top_k - ids.shape[1]
        if missing < 0:
            raise MoescopeError(
                f"{site.where}: attention experts take at most {site.info.top_k} experts a token, "
                f"not {ids.shape[1]}"
            )
        filler = ids[:, :1].expand(-1, missing)
        zeros = weights.new_zeros(weights.shape[0], missing)
        return torch.cat([weights, zeros], 1), torch.cat([ids, filler], 1)

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Nothing: the experts get rows and counts."""
        return None

    def counted(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """The counts with which the experts split their rows."""
        rows, sizes = experts_arguments(site, args, kwargs, 2)
        return torch.tensor(sizes, device=rows.device)


class OneHotForm(TupleForm):
    """Switch: `(one-hot [B, S, E], weight [B, S, 1], logits [B, S, E])`.

    A token beyond an expert's capacity in its sequence has a row of zeros: no expert sees it. Here
    it has the id of the expert that it was meant for and weight 0. Writing applies the capacity
    again, to the written selection.
    """

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """The dispatched expert, or the intended one with weight 0."""
        if not isinstance(output, tuple) or len(output) != 3:
            raise RecordingError(
                f"{site.where}: the router returned {describe(output)} instead of (one-hot, "
                "weights, logits)"
            )
        one_hot_BSE, weights_BS1, logits_BSE = output
        logits_TE = logits_BSE.reshape(-1, logits_BSE.shape[-1])
        found = remembered(one_hot_BSE)
        if found is None:
            one_hot_TE = one_hot_BSE.reshape(logits_TE.shape)
            dispatched_T1 = one_hot_TE.sum(1, keepdim=True)
            ids = torch.where(
                dispatched_T1 > 0,
                one_hot_TE.argmax(1, keepdim=True),
                logits_TE.argmax(1, keepdim=True),
            )
            found = weights_BS1.reshape(-1, 1) * dispatched_T1.to(weights_BS1.dtype), ids
        return RouterOutput(logits_TE, *found)

    def inputs(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> dict[str, Any]:
        """How many rows are one sequence."""
        return {"rows_per_sequence": output[0].shape[1]}

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """One-hot rows of the selection, dropped beyond the capacity as the router drops them."""
        one_hot_BSE, weights_BS1, logits_BSE = output
        if ids.shape[1] != 1:
            raise MoescopeError(f"{site.where}: this router takes one expert a token, no other")
        capacity: Any = site.router.expert_capacity
        weights = weights.to(weights_BS1.dtype)
        # A slot without weight goes to no expert and takes up no capacity.
        wanted = nn.functional.one_hot(ids[:, 0], site.info.num_experts) * (weights != 0)
        wanted = wanted.view(one_hot_BSE.shape)
        kept = wanted * (torch.cumsum(wanted, dim=-2) <= capacity)
        used = weights * kept.sum(-1).view(-1, 1).to(weights.dtype)
        # What the router says of tokens that no expert gets has no effect and is left as it is.
        weights_BS1 = torch.where(weights == 0, weights_BS1.view(-1, 1), weights).view_as(
            weights_BS1
        )
        return remember(kept, used, ids), weights_BS1, logits_BSE

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Ids and weights of the one-hot rows; weight 0 where a row is empty."""
        _, one_hot_T1E, weights = experts_arguments(site, args, kwargs, 3)
        one_hot_TE = one_hot_T1E[:, 0]
        dispatched = one_hot_TE.sum(1, keepdim=True).to(weights.dtype)
        return one_hot_TE.argmax(1, keepdim=True), weights * dispatched


class DenseWeightsForm(TupleForm):
    """NLLB: `(one-hot of the first choice, weights [T, E], logits [T, E])`, two a token.

    Choices dropped beyond capacity have weight 0 and the id of the expert they were meant for.
    """

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """The two entries that carry weight, then those that the logits ask for."""
        if not isinstance(output, tuple) or len(output) != 3:
            raise RecordingError(
                f"{site.where}: the router returned {describe(output)} instead of (mask, weights, "
                "logits)"
            )
        _, weights_TE, logits_TE = output
        wanted_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        ids = (wanted_TE + 2.0 * (weights_TE > 0)).topk(site.info.top_k, dim=1).indices
        return RouterOutput(logits_TE, weights_TE.gather(1, ids), ids)

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """Refused: the experts of this version ignore which expert was chosen."""
        raise MoescopeError(f"{site.where} cannot be steered: {site.record_only}")

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """The entries of the weights that are not zero, as handed to the experts."""
        _, _, weights_TE = experts_arguments(site, args, kwargs, 3)
        weights, ids = weights_TE.topk(site.info.top_k, dim=1)
        return ids, weights


class ProductKeyForm(TupleForm):
    """Doge: the router's `Linear` gives scores of two halves of a key; the block does the rest.

    Expert i * sqrt(E) + j scores first half i plus second half j. Note that Doge's own view of the
    scores mixes tokens (`modeling_doge.py`, DogeCDMoE.forward): the halves of one row come from two
    other tokens. They are read here as the model reads them.
    """

    def read(self, site: RouterSite, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """All E scores, and the block's own steps from them to ids and weights."""
        block: Any = site.block
        if not isinstance(output, Tensor) or output.shape[-1] != 2 * block.num_keys:
            raise RecordingError(
                f"{site.where}: the router returned {describe(output)} instead of the scores of "
                "two key halves"
            )
        halves = output.view(2, output.numel() // output.shape[-1], -1)
        logits_TE = (halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)).flatten(1)
        (best_x, best_y), (x, y) = halves.topk(block.num_keys, dim=-1)
        scores = (best_x.unsqueeze(-1) + best_y.unsqueeze(-2)).flatten(1)
        candidates = (x.unsqueeze(-1) * block.num_keys + y.unsqueeze(-2)).flatten(1)
        picked, positions = scores.topk(block.top_k, dim=-1)
        weights = torch.softmax(picked, dim=-1)
        if block.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return RouterOutput(logits_TE, weights, candidates.gather(-1, positions))

    def write(
        self, site: RouterSite, args: tuple[Any, ...], output: Any, weights: Tensor, ids: Tensor
    ) -> Any:
        """Refused: nothing between the scores and the experts can be replaced."""
        raise MoescopeError(f"{site.where} cannot be steered: {site.record_only}")

    def arrived(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Nothing: the experts are an embedding that gets ids without weights."""
        return None

    def counted(
        self, site: RouterSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """How often each expert is looked up."""
        (ids,) = experts_arguments(site, args, kwargs, 1)
        return torch.bincount(ids.flatten(), minlength=site.info.num_experts)


def remember(carrier: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Tie a selection to the tensor that carries it."""
    setattr(carrier, _SELECTION, (weights, ids))
    return carrier


def remembered(carrier: Tensor) -> tuple[Tensor, Tensor] | None:
    """The selection tied to a tensor, or None."""
    found: tuple[Tensor, Tensor] | None = getattr(carrier, _SELECTION, None)
    return found
