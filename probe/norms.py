"""What the selected experts put out: norms, largest values, and how far they turn the residual.

For pruning criteria that look at more than the router: EAN and REAP (arXiv 2510.13999) need the
norm of each selected expert's output, EASY-EP (arXiv 2504.06792, repository RUCAIBox/EASYEP)
weighs it by how much the routed output turns the residual stream, super experts (arXiv
2507.23279) are found by the largest value that leaves a `down_proj`.

Only experts that were selected are evaluated: the experts module itself is run once more on the
rows it received, each row repeated for its K experts, one expert a row with weight 1, so every
family's own arithmetic (biases, norms, quantized weights) is used. That this is what the model
does is proved on every forward: the K outputs times their weights must add up to what the experts
module returned. Letters: T rows, K experts per token, H width of the experts' output.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moescope.probe.bridges import called_in_place_of, plain_modules
from moescope.probe.errors import ModelInputError, RecordingError
from moescope.probe.routers import RouterOutput, RouterSite

#: Output values held at once: 2**26 of them are 256 MB in float32.
_VALUES_AT_ONCE = 2**26
#: By how much the sum of the parts may differ from the whole, relative to its largest value.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 0.05


#: How transformers calls experts that can be given one expert a row.
_CALLED_WITH = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)


@dataclass(frozen=True)
class ExpertNorms:
    """What the selected experts of one layer put out, slot by slot.

    Attributes:
        output_norm: Euclidean norm of each selected expert's output, before its weight,
            float32[T, K]; 0 where a slot used no expert (skipped tokens).
        max_abs: largest absolute value that left its `down_proj`, float32[T, K].
        residual_change: max(1 - cos(x, x + r), 0), float32[T], with x the residual stream before
            the routed block's own norm and r the weighted sum of the experts' outputs, times the
            scaling factor that some families apply in the block; what the model does to r
            afterwards (a norm, a multiplier) is not part of EASY-EP and not applied. Not a number
            where it cannot be had: experts that work in another width than the residual stream or
            on some tokens only, and layers whose residual stream is not what the block's norm reads
            (several streams that are mixed before it).
    """

    output_norm: Tensor
    max_abs: Tensor
    residual_change: Tensor

    @staticmethod
    def joined(parts: Sequence[ExpertNorms | None]) -> ExpertNorms | None:
        """Forwards one after the other, or None where they were not measured."""
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return None
        return ExpertNorms(
            torch.cat([part.output_norm for part in present]),
            torch.cat([part.max_abs for part in present]),
            torch.cat([part.residual_change for part in present]),
        )


def in_backward() -> bool:
    """Whether autograd is running a backward pass now: checkpointing runs layers again there."""
    return bool(torch._C._current_graph_task_id() != -1)


def why_no_norms(site: RouterSite) -> str | None:
    """Why the experts of this layer cannot be run one at a time, or None when they can."""
    if site.experts is site.block:
        return "its experts are fused into the block"
    forward = type(site.experts).forward
    names = list(inspect.signature(forward).parameters)[1:4]
    if tuple(names) not in _CALLED_WITH:
        return (
            f"{type(site.experts).__name__} is called with ({', '.join(names)}) instead of hidden "
            "states, expert ids and weights"
        )
    return None


def require_norms(model: nn.Module, sites: Sequence[RouterSite]) -> None:
    """Refuse a model with experts that cannot be run one at a time, before anything runs.

    Raises:
        ModelInputError: a layer whose experts cannot be run one at a time; names it and why.
    """
    for site in sites:
        reason = why_no_norms(site)
        if reason is not None:
            raise ModelInputError(
                f"norms cannot be measured on layer {site.info.layer} ({site.info.module}) of "
                f"{type(model).__name__}: {reason}"
            )


def norm_watchers(model: nn.Module, sites: Sequence[RouterSite]) -> dict[str, NormWatcher]:
    """One watcher per router, by the router's name.

    Raises:
        ModelInputError: as `require_norms`.
    """
    require_norms(model, sites)
    modules = plain_modules(model)
    called_for = called_in_place_of(model)
    name_of = {module: name for name, module in modules.items()}
    return {
        site.info.module: NormWatcher(site, _entry(site, name_of, modules, called_for))
        for site in sites
    }


@dataclass(frozen=True)
class _Entry:
    """Where a routed block hangs in its layer.

    Attributes:
        block: the layer's direct child that holds the experts.
        siblings: the layer's other children; the block's norm is one of them.
    """

    block: nn.Module
    siblings: tuple[nn.Module, ...]


def _entry(
    site: RouterSite,
    name_of: Mapping[nn.Module, str],
    modules: Mapping[str, nn.Module],
    called_for: Mapping[nn.Module, nn.Module],
) -> _Entry:
    parts = name_of[site.experts].split(".")
    at = max(index for index, part in enumerate(parts) if part.isdigit())
    layer = modules[".".join(parts[: at + 1])]
    block = modules[".".join(parts[: at + 2])]
    siblings: list[nn.Module] = []
    for child in layer.children():
        inside = child._modules.get("_original_component", child)
        if block in (child, inside):
            continue
        # Longcat keeps the norms of its two halves in lists.
        siblings += list(child.children()) if isinstance(child, nn.ModuleList) else [child]
    return _Entry(called_for.get(block, block), tuple(siblings))


class NormWatcher:
    """Measures one layer's experts, call by call."""

    def __init__(self, site: RouterSite, entry: _Entry) -> None:
        self.site = site
        self.entry = entry
        self.where = f"layer {site.info.layer} ({site.info.module})"
        self.decided: RouterOutput | None = None
        self.passed: list[tuple[Tensor | None, tuple[Tensor, ...]]] = []
        self.residual: Tensor | None = None
        self.block_output: Tensor | None = None
        self.needs_post_norm = False
        self.received: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self.parts: list[ExpertNorms] = []

    def forget(self) -> None:
        """Drop everything of the forward that ended."""
        self.decided = None
        self.passed = []
        self.residual = None
        self.block_output = None
        self.needs_post_norm = False
        self.received = None
        self.parts = []

    def routed(self, decided: RouterOutput) -> None:
        """Told by the recorder what the router decided."""
        self.decided = decided

    def measured(self) -> dict[str, Tensor]:
        """This forward's values by their names in `ExpertNorms`, on the layer's device.

        Raises:
            RecordingError: the experts were not called where the router was.
        """
        joined = ExpertNorms.joined(self.parts)
        if joined is None or not self.parts:
            raise RecordingError(
                f"{self.where}: the experts were not called, so nothing was measured"
            )
        change = joined.residual_change
        return {
            "output_norm": joined.output_norm,
            "max_abs": joined.max_abs,
            "residual_change": torch.full_like(change, torch.nan)
            if self.needs_post_norm
            else change,
        }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The layer's hooks while the block runs."""
        experts = self.site.experts
        with ExitStack() as stack:
            for sibling in self.entry.siblings:
                stack.callback(sibling.register_forward_hook(self._on_sibling).remove)
            handles = (
                self.entry.block.register_forward_pre_hook(self._before_block, with_kwargs=True),
                self.entry.block.register_forward_hook(self._after_block),
                experts.register_forward_pre_hook(self._before_experts, with_kwargs=True),
                experts.register_forward_hook(self._after_experts),
            )
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _on_sibling(self, _module: nn.Module, args: Any, output: Any) -> None:
        """Remember what the layer's other modules took and gave, until the block runs.

        A norm gives one tensor of the shape that it took. A norm that takes what the block gave
        tells that this family norms after the block, and reads the residual stream itself.
        """
        taken = args[0] if args and isinstance(args[0], Tensor) else None
        if taken is not None and self.block_output is not None and _same(taken, self.block_output):
            self.needs_post_norm = False
            self.block_output = None
        given = output if isinstance(output, tuple) else (output,)
        tensors = tuple(part.detach() for part in given if isinstance(part, Tensor))
        is_norm = taken is not None and not isinstance(output, tuple) and tensors != ()
        if is_norm and taken is not None and taken.shape == tensors[0].shape:
            self.passed = [*self.passed[-3:], (taken.detach(), tensors)]
        else:
            self.passed = [*self.passed[-3:], (None, tensors)]

    def _before_block(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _first_tensor(args, kwargs)
        source = [
            taken
            for taken, gave in self.passed
            if given is not None and any(_same(part, given) for part in gave)
        ]
        self.passed = []
        if source:
            self.residual = source[-1]
        elif given is not None:
            self.residual = given.detach()
            self.needs_post_norm = True

    def _after_block(self, _module: nn.Module, _args: Any, output: Any) -> None:
        given = output[0] if isinstance(output, tuple) else output
        self.block_output = given.detach() if isinstance(given, Tensor) else None

    def _before_experts(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.received = (args, kwargs)

    def _after_experts(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if in_backward():
            return
        received, self.received = self.received, None
        decided, self.decided = self.decided, None
        if received is None or decided is None:
            raise RecordingError(f"{self.where}: the experts ran without their router")
        args, kwargs = received
        arrived = self.site.form.arrived(self.site, args, kwargs)
        hidden = _first_tensor(args, kwargs)
        if arrived is None or hidden is None or not isinstance(output, Tensor):
            raise RecordingError(f"{self.where}: what its experts received cannot be read")
        ids_TK, weights_TK = arrived
        with torch.no_grad():
            hidden_TH = hidden.detach().reshape(-1, hidden.shape[-1])
            routed_TH = output.detach().reshape(len(hidden_TH), -1)
            norm_TK, max_TK = self._slots(hidden_TH, ids_TK, weights_TK.detach(), routed_TH)
            # Zaya's skipped tokens arrive as expert 0 with weight 0: no expert was used for them.
            unused_TK = ids_TK != decided.expert_ids
            self.parts.append(
                ExpertNorms(
                    norm_TK.masked_fill(unused_TK, 0.0),
                    max_TK.masked_fill(unused_TK, 0.0),
                    self._residual_change(routed_TH),
                )
            )

    def _slots(
        self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, routed_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Norm and largest value of each slot, some rows at a time."""
        num_rows, top_k = ids_TK.shape
        step = max(1, _VALUES_AT_ONCE // (top_k * hidden_TH.shape[1]))
        norms, largest = [], []
        for begin in range(0, num_rows, step):
            rows = slice(begin, begin + step)
            raw_TKH, out_TKH = self._outputs(hidden_TH[rows], ids_TK[rows], weights_TK.dtype)
            self._prove(out_TKH, weights_TK[rows], routed_TH[rows])
            norms.append(out_TKH.float().norm(dim=-1))
            largest.append(raw_TKH.float().abs().amax(dim=-1))
        return torch.cat(norms), torch.cat(largest)

    def _outputs(
        self, hidden_TH: Tensor, ids_TK: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """What left `down_proj`, and each slot's output, [T, K, H]; they differ by a norm."""
        num_rows, top_k = ids_TK.shape
        experts: Any = self.site.experts
        ones = torch.ones(num_rows * top_k, 1, dtype=dtype, device=hidden_TH.device)
        repeated = hidden_TH.repeat_interleave(top_k, dim=0)
        ids = ids_TK.reshape(-1, 1)
        if hasattr(experts, "identity_expert"):
            # Longcat's experts cannot be called with one slot a row: a second one with weight 0.
            ids, ones = ids.repeat(1, 2), torch.cat([ones, torch.zeros_like(ones)], dim=1)
        with _without_post_norm(experts) as post_norm:
            # Not `experts(...)`: hooks, ours and others', are for the model's own call.
            raw = experts.forward(repeated, ids, ones)
        out = raw if post_norm is None else post_norm.forward(raw)
        return raw.reshape(num_rows, top_k, -1), out.reshape(num_rows, top_k, -1)

    def _prove(self, out_TKH: Tensor, weights_TK: Tensor, routed_TH: Tensor) -> None:
        """The slots, weighted, must add up to what the experts module returned."""
        total_TH = (out_TKH.float() * weights_TK.float()[..., None]).sum(dim=1)
        wrong = (total_TH - routed_TH.float()).abs().max()
        largest = (out_TKH.float() * weights_TK.float()[..., None]).abs().max()
        tolerance = _TOLERANCE.get(routed_TH.dtype, _COARSE_TOLERANCE)
        if not wrong <= tolerance * largest + 1e-12:
            raise RecordingError(
                f"{self.where}: the outputs of its selected experts times their weights do not add "
                f"up to what {type(self.site.experts).__name__} returned, so norms cannot be "
                "measured here"
            )

    def _residual_change(self, routed_TH: Tensor) -> Tensor:
        residual, self.residual = self.residual, None
        num_rows = len(routed_TH)
        if residual is None or residual.numel() != routed_TH.numel():
            return torch.full((num_rows,), torch.nan, device=routed_TH.device)
        before_TH = residual.reshape(num_rows, -1).float()
        rule = self.site.info.rule
        factor = rule.scale if rule.scale_in_block else 1.0
        factor *= rule.top_k if rule.divided_by_top_k else 1
        after_TH = before_TH + routed_TH.float() * factor
        cosine_T = torch.nn.functional.cosine_similarity(before_TH, after_TH, dim=-1)
        return (1 - cosine_T).clamp(min=0)


@contextmanager
def _without_post_norm(experts: Any) -> Iterator[nn.Module | None]:
    """While the block runs, a norm after `down_proj` inside the experts does nothing.

    Yields that norm, or None where the family has none (all but Muse Spark).
    """
    norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    if norm is None:
        yield None
        return
    own = norm.__dict__.get("forward")  # where accelerate has put its own around it
    norm.forward = lambda hidden: hidden
    try:
        yield norm
    finally:
        del norm.forward
        if own is not None:
            norm.forward = own


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((part for part in [*args, *kwargs.values()] if isinstance(part, Tensor)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, shapes aside."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
