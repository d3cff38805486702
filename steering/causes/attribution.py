"""What each expert causes, estimated for all experts at once from one backward pass.

The exact effect of an expert on a target m is Δ = m(model without it) - m(model) (our methods,
10.5). To first order it is what the change of the layer's routing weights gains,

    A = Σ_t Σ_j (w'_j - w_j) · ∂m/∂w_j,

with w' the weights that the rule gives at token t without the expert, in the mode asked for:

- `drop`: only its own weight changes, A = -Σ_t w·∂m/∂w;
- `drop_renorm`: the others of the token are normalized again; for weights that sum to 1 this is
  -Σ_t w_e/(1 - w_e) · (g_e - Σ_j w_j g_j / Σ_j w_j), g = ∂m/∂w;
- `replace`: the next expert enters, for which ∂m/∂w = ⟨∂m/∂y, E_new(x)⟩ is had by computing it in
  a slot of weight 0 (`via` min, so that all weights may move a little).

Weights are leaves at the experts' input: ids are frozen, the weights of later layers are free. What
a first-order estimate cannot see: that a later router chooses other experts, and that a layer norm
bends what is taken away in large. So every result says how it ranks against exact effects on a
sample (`moescope.steering.causes.agreement`). `moescope.steering.causes.integrated` is dearer and
comes nearer to the size of large effects.

Letters: X experts of all routers, P prompts, B rows of a batch, T rows of a router, E experts, K
experts per token, M added slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.probe.bridges import underlying
from moescope.probe.errors import InputError, ModelInputError
from moescope.probe.models import ModelBundle
from moescope.probe.norms import why_no_norms
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import RouterSite, find_routers
from moescope.steering.causes.keys import ExpertKey, Mode
from moescope.steering.causes.leaves import (
    Added,
    Leaf,
    Moved,
    PlanEdits,
    Routed,
    by_row_and_expert,
    differentiable,
    experts_of,
    gradients,
    leaves_planted,
)
from moescope.steering.causes.measuring import batch_logits, batch_running, target_batches
from moescope.steering.causes.shares import effect_columns
from moescope.steering.causes.targets import TargetRow
from moescope.steering.plan import SteeringPlan

if TYPE_CHECKING:
    from moescope.steering.causes.agreement import Agreement

#: Told how many of how many batches are done.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimated effects of single experts on a target.

    Attributes:
        experts: the X experts.
        values: float64[X, P], the target's unit; 0 where a prompt never selects the expert.
        baseline: float64[P], the target without any change but the base plan's.
        method: what was estimated and how, in a few words.
        cost: forwards that it took, a backward counted as two, those of the agreement left out.
        agreement: how it ranks against exact effects on a sample; None where none was asked for.
    """

    experts: tuple[ExpertKey, ...]
    values: NDArray[np.float64]
    baseline: NDArray[np.float64]
    method: str
    cost: float
    agreement: Agreement | None = None

    @property
    def means(self) -> NDArray[np.float64]:
        """The mean over prompts, float64[X]."""
        mean: NDArray[np.float64] = self.values.mean(axis=1)
        return mean

    def frame(self, units: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
        """One row per expert: layer, kind, expert, estimate, low, high, n, num_units.

        Args:
            units: of each prompt, its `pair_id` or itself; what the interval draws.
            seed: of the draws.

        Returns:
            Mean over n prompts with its 95 % bootstrap interval over units; NaN for one unit.
        """
        if len(units) != self.values.shape[1]:
            raise InputError(f"{len(units)} units were given for {self.values.shape[1]} prompts")
        columns = effect_columns(self.values, units, seed)
        frame = pd.DataFrame(self.experts, columns=list(ExpertKey._fields))
        return frame.assign(
            estimate=columns["effect"], low=columns["low"], high=columns["high"], n=columns["n"],
            num_units=len(set(units)),
        )  # fmt: skip


def attribute(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    *,
    mode: Mode = "drop",
    base_plan: SteeringPlan | None = None,
    integrated_steps: int | None = None,
    num_checked: int = 24,
    seed: int = 0,
    sites: Sequence[RouterSite] | None = None,
    tokens_per_batch: int = 1024,
    progress: Progress | None = None,
) -> Attribution:
    """First-order effects of taking each expert out, one forward and backward for each batch.

    Args:
        bundle: model and tokenizer; not steered at the moment, and left as it was.
        rows: the target's, from `target_rows`.
        rendered: the prompts.
        mode: how an expert is taken out, at every token of the rows.
        base_plan: steering that is there already; effects are those on the steered model.
        integrated_steps: passes of the integrated form (`moescope.steering.causes.integrated`),
            each as dear as the whole first-order form, which is run too; None for that alone.
        num_checked: experts whose exact effect is measured for `agreement`; 0 for none.
        seed: of their choice.
        sites: the model's routers, where the caller has them.
        tokens_per_batch: padded tokens a forward may hold.
        progress: told after each batch.

    Raises:
        InputError: the mode cannot be estimated for a router of this model, or the base plan does
            not fit it.
    """
    sites = find_routers(underlying(bundle.model)) if sites is None else sites
    if mode == "replace":
        require_added_slots(sites)
    # Both build on this module.
    from moescope.steering.causes.agreement import measure_agreement
    from moescope.steering.causes.integrated import integrated

    if integrated_steps is None:
        found = estimated(
            bundle, rows, rendered, Removal(mode), base_plan=base_plan, sites=sites,
            tokens_per_batch=tokens_per_batch, progress=progress,
        )  # fmt: skip
    else:
        found = integrated(
            bundle, rows, rendered, mode=mode, base_plan=base_plan, num_passes=integrated_steps,
            seed=seed, sites=sites, tokens_per_batch=tokens_per_batch, progress=progress,
        )  # fmt: skip
    if not num_checked:
        return found

    agreement = measure_agreement(
        bundle, rows, rendered, found, mode=mode, base_plan=base_plan, num_experts=num_checked,
        seed=seed, tokens_per_batch=tokens_per_batch,
    )  # fmt: skip
    return replace(found, agreement=agreement)


class Removal:
    """Taking each selected expert out, as changes of routing weights.

    Args:
        mode: how.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self.method = f"first-order {mode}"
        self.moved: Moved | None = None
        self._after: list[list[tuple[Tensor, Tensor]]] = []

    @property
    def added(self) -> Added | None:
        """The slots needed for experts that enter."""
        return None if self.mode == "drop" else self._entering

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """A forward begins with rows of these prompts."""
        del prompt_ids
        self._after = []

    def effects(self, leaf: Leaf, gradient: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The effect at each token of taking out each of its experts, float64[T, K], and ids.

        Args:
            leaf: the leaf.
            gradient: ∂m/∂w of its slots.
            number: of the leaf in its forward, from 0.
        """
        routed = leaf.routed
        num_slots = routed.ids.shape[1]
        if self.mode == "drop":
            return -(routed.weights.double() * gradient[:, :num_slots].double()), routed.ids
        # One slot for each expert: a slot of weight 0 may name an expert that is there already.
        gradient_TE = torch.zeros(
            routed.logits.shape, dtype=torch.float64, device=gradient.device
        ).scatter_(1, leaf.ids, gradient.double())
        effects = [
            (self.change(routed, number, slot) * gradient_TE).sum(1) for slot in range(num_slots)
        ]
        return torch.stack(effects, dim=1), routed.ids

    def change(self, routed: Routed, number: int, slot: int) -> Tensor:
        """What the weights change by where this slot's expert is taken out, float64[T, E]."""
        weights, ids = self._after[number][slot]
        return routed.dense(weights, ids) - routed.dense(routed.weights, routed.ids)

    def _entering(self, routed: Routed) -> Tensor:
        """Experts that come in for one of the token's own, int64[T, M]; remembers the weights."""
        mark = "mask_min" if self.mode == "replace" else "drop_renorm"
        num_experts = routed.logits.shape[1]
        with torch.no_grad():
            after = [
                routed.under(**{mark: one_hot(routed.ids[:, slot], num_experts)})
                for slot in range(routed.ids.shape[1])
            ]
            self._after.append(after)
            return entering(routed.ids, after, num_experts)


def estimated(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    change: Removal,
    *,
    base_plan: SteeringPlan | None,
    sites: Sequence[RouterSite],
    tokens_per_batch: int,
    progress: Progress | None = None,
) -> Attribution:
    """One forward and backward for each batch; `change` says what each slot's effect is."""
    keys = experts_of(sites)
    first_of, begin = {}, 0
    for site in sites:
        first_of[site.info.module] = begin
        begin += site.info.num_experts
    values_XP = np.zeros((len(keys), len(rendered)))
    baseline_P = np.zeros(len(rendered))
    for members, values_B, parts in _passes(
        bundle, rows, rendered, change, base_plan, sites, tokens_per_batch, progress
    ):
        np.add.at(baseline_P, members, values_B)
        for module, part_BE in parts:
            own = slice(first_of[module], first_of[module] + part_BE.shape[1])
            np.add.at(values_XP[own].T, members, part_BE)
    return Attribution(keys, values_XP, baseline_P, change.method, 3.0)


def _passes(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    change: Removal,
    base_plan: SteeringPlan | None,
    sites: Sequence[RouterSite],
    tokens_per_batch: int,
    progress: Progress | None,
) -> Iterator[tuple[list[int], NDArray[np.float64], list[tuple[str, NDArray[np.float64]]]]]:
    """For each batch its prompts, its rows' targets, and each router's effects float64[B, E]."""
    model = underlying(bundle.model)
    plan = PlanEdits(model, base_plan, sites)
    prompt_ids = [one.prompt.prompt_id for one in rendered]
    batches = target_batches(bundle, rows, tokens_per_batch=tokens_per_batch)
    for done, batch in enumerate(batches, start=1):
        change.begin([prompt_ids[row.prompt] for row in batch.rows])
        with (
            differentiable(model),
            plan.attached(),
            leaves_planted(sites, plan, change.added, change.moved) as leaves,
            batch_running(batch, prompt_ids),
        ):
            values_B = batch.values(batch_logits(bundle, batch))
            slopes = gradients(values_B, leaves)
        parts = []
        for number, (leaf, gradient) in enumerate(zip(leaves, slopes, strict=True)):
            effects, ids = change.effects(leaf, gradient, number)
            part_BE = by_row_and_expert(effects, ids, batch.num_rows, leaf.routed)
            parts.append((leaf.routed.site.info.module, part_BE.cpu().numpy()))
        leaves.clear()
        yield [row.prompt for row in batch.rows], values_B.detach().double().cpu().numpy(), parts
        if progress is not None:
            progress(done, len(batches))


def require_added_slots(sites: Sequence[RouterSite]) -> None:
    """Refuse routers whose experts cannot be given further slots of weight 0.

    Raises:
        ModelInputError: names the layer and why.
    """
    for site in sites:
        reason = why_no_norms(site)
        if site.info.rule.capacity is not None:
            reason = "its experts take one slot a token"
        if reason is not None:
            raise ModelInputError(
                f"{site.where}: what an expert would add that was not selected cannot be estimated "
                f"here: {reason}; mode 'drop' can"
            )


def selected(ids: Tensor, num_experts: int, counts: Tensor | None = None) -> Tensor:
    """Which experts have a slot, bool[T, E]; only slots that count, bool[T, K'], where given."""
    marks = torch.ones_like(ids) if counts is None else counts.long()
    found = torch.zeros(len(ids), num_experts, dtype=torch.long, device=ids.device)
    return found.scatter_add_(1, ids, marks) > 0


def entering(slots: Tensor, after: Sequence[tuple[Tensor, Tensor]], num_experts: int) -> Tensor:
    """Experts that have a weight in one of the selections `after` and no slot yet, int64[T, M].

    Rows with fewer than M are filled with any experts, whose weights change by nothing more.
    """
    before_TE = selected(slots, num_experts)
    entering_TE = torch.zeros_like(before_TE)
    for weights, ids in after:
        entering_TE |= selected(ids, num_experts, weights != 0) & ~before_TE
    width = int(entering_TE.sum(1).max()) if len(slots) else 0
    return entering_TE.byte().topk(width, dim=1).indices


def one_hot(ids_T: Tensor, num_experts: int) -> Tensor:
    """bool[T, E]."""
    return ids_T[:, None] == torch.arange(num_experts, device=ids_T.device)
