"""Direct logit attribution: which tokens an expert writes for, and which against.

What an expert adds to the residual stream, `w * E_e(x)`, is carried through every norm after it
(scale frozen at that of the whole stream; LayerNorm also centred), the residual multiplier, the
final norm, the unembedding and the logit scaling, before any softcap. This is the direct path
only: what later layers make of it is not in it.

Logits are taken relative to their mean over the vocabulary, because what is added to all of them
changes no probability. The sum over all parts (embedding, attention, shared and dense parts, every
expert, the norm's bias) is the model's logits; that is checked on every batch.

Source: Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits), logit lens with
frozen norms; methods as in TransformerLens' `logit_attrs`.

Letters: X experts, P prompts, C other parts, N read positions, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.probe.bridges import underlying
from moescope.probe.errors import InputError, ModelInputError
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import RouterSite, find_routers
from moescope.steering.causes.measuring import (
    TargetBatch,
    batch_logits,
    batch_running,
    target_batches,
)
from moescope.steering.causes.residual_stream import StreamPart, StreamReader
from moescope.steering.causes.shares import effect_columns
from moescope.steering.causes.targets import TargetRow


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What the parts of a model write into a target's logits.

    Attributes:
        experts: layer, kind and expert of each.
        values: float64[X, P], contribution to the target's logits: the sum over its reads of
            factor times the logit's change (relative to the mean over the vocabulary); 0 where the
            expert is not used at a read position.
        used: int64[X, P], read positions at which the expert was used.
        parts: name and layer (None: of no layer) of everything else.
        part_values: float64[C, P], the same of these; with `values` they sum to `target`.
        target: float64[P], the target's logits.
        writes: float64[X, H], what an expert adds to the input of the unembedding, logit scaling
            included; mean over a prompt's read positions, then over prompts.
        max_error: the largest difference of a logit from the sum of its parts.
    """

    experts: tuple[tuple[int, str, int], ...]
    values: NDArray[np.float64]
    used: NDArray[np.int64]
    parts: tuple[tuple[str, int | None], ...]
    part_values: NDArray[np.float64]
    target: NDArray[np.float64]
    writes: NDArray[np.float64]
    max_error: float

    def frame(self, units: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
        """One row per part.

        Columns: `part` (`expert`, `attention`, `shared`, ...), `layer`, `kind`, `expert`, `effect`
        (mean contribution to the target's logits) with `low` and `high` (95 %, over units), `n`
        prompts, `num_used` (prompts with a read position that used it).

        Args:
            units: the unit of each prompt.
            seed: of the resampling.
        """
        num_prompts, num_parts = len(self.target), len(self.parts)
        layers = [one[0] for one in self.experts] + [one[1] for one in self.parts]
        experts = [one[2] for one in self.experts] + [None] * num_parts
        return pd.DataFrame(
            {
                "part": ["expert"] * len(self.experts) + [one[0] for one in self.parts],
                "layer": pd.array(layers, dtype="Int64"),
                "kind": [one[1] for one in self.experts] + [None] * num_parts,
                "expert": pd.array(experts, dtype="Int64"),
                **effect_columns(np.concatenate([self.values, self.part_values]), units, seed),
                "num_used": [*(self.used > 0).sum(1), *[num_prompts] * num_parts],
            }
        )

    def top_tokens(
        self, bundle: ModelBundle, expert: tuple[int, str, int], *, number: int = 10
    ) -> pd.DataFrame:
        """The tokens that an expert writes most for and most against, mean over prompts.

        For a single prompt, attribute that prompt alone.

        Columns: `side` (`for`, `against`), `token_id`, `token`, `logit` (its change relative to
        the mean over the vocabulary, 0 where the expert is not used counted in).

        Args:
            bundle: the model that was attributed.
            expert: layer, kind and expert.
            number: tokens on each side.

        Raises:
            InputError: no such expert.
        """
        if expert not in self.experts:
            raise InputError(f"layer {expert[0]} has no expert {expert[2]} of kind {expert[1]!r}")
        head = _head(bundle)
        with torch.no_grad():
            wrote_H = torch.as_tensor(self.writes[self.experts.index(expert)])
            logits_V = head.weight.detach().float().cpu() @ wrote_H.float()
        logits_V = logits_V - logits_V.mean()
        order = logits_V.argsort(descending=True, stable=True)
        number = min(number, len(order))
        rows = [
            {
                "side": side,
                "token_id": int(token),
                "token": bundle.tokenizer.decode([int(token)]),
                "logit": float(logits_V[token]),
            }
            for side, tokens in (("for", order[:number]), ("against", order.flip(0)[:number]))
            for token in tokens
        ]
        return pd.DataFrame(rows)


def attribute_logits(
    bundle: ModelBundle,
    rows: Sequence[TargetRow],
    rendered: Sequence[RenderedPrompt],
    *,
    tokens_per_batch: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> LogitAttribution:
    """What every expert, and everything else, writes directly into a target's logits.

    One forward per batch, in which each routed block is run once more without its experts, and the
    selected experts once more at the read positions.

    Args:
        bundle: model and tokenizer.
        rows: from `target_rows`, with reads (no `Custom` targets).
        rendered: the prompts.
        tokens_per_batch: padded tokens a forward may hold.
        progress: called with (batches done, batches in all).

    Raises:
        InputError: a target that is no sum of log-probabilities.
        ModelInputError: the model's tail cannot be read; says where and why.
    """
    if any(row.function is not None for row in rows):
        raise InputError("logits can be attributed only for targets that add up log-probabilities")
    sums = _Sums(bundle, find_routers(bundle.model), rows, len(rendered))
    prompt_ids = [one.prompt.prompt_id for one in rendered]
    batches = target_batches(bundle, rows, tokens_per_batch=tokens_per_batch)
    for done, batch in enumerate(batches):
        with torch.inference_mode(), batch_running(batch, prompt_ids):
            sums.add(batch)
        if progress is not None:
            progress(done + 1, len(batches))
    return sums.result()


@dataclass(frozen=True)
class _Cells:
    """The read positions of a batch.

    Attributes:
        rows, columns: int64[N]; columns in the A that are kept.
        prompts: the prompt of each.
        share: float64[N], 1 over the read positions of its prompt.
        reads: of each position the tokens and factors.
    """

    rows: Tensor
    columns: Tensor
    prompts: NDArray[np.int64]
    share: NDArray[np.float64]
    reads: tuple[tuple[tuple[int, float], ...], ...]

    def pick(self, tensor: Tensor, num_kept: int) -> Tensor:
        """[B, S, ...] of a forward at the positions, [N, ...]."""
        columns = tensor.shape[1] - num_kept + self.columns
        return tensor[self.rows.to(tensor.device), columns.to(tensor.device)]


class _Sums:
    """The attribution, batch by batch."""

    def __init__(
        self,
        bundle: ModelBundle,
        sites: Sequence[RouterSite],
        rows: Sequence[TargetRow],
        num_prompts: int,
    ) -> None:
        self.bundle, self.sites = bundle, sites
        self.model = underlying(bundle.model)
        self.head = _head(bundle)
        self.num_prompts = num_prompts
        self.num_positions = np.zeros(num_prompts, dtype=np.int64)
        for row in rows:
            self.num_positions[row.prompt] += len({read.column for read in row.reads})
        routed = [site.info for site in sites if site.info.kind == "mlp"]
        self.experts = [
            (info.layer, info.kind, expert) for info in routed for expert in range(info.num_experts)
        ]
        self.first_of: dict[int | None, int] = {}
        for at, (layer, _, _) in enumerate(self.experts):
            self.first_of.setdefault(layer, at)
        width = self.head.weight.shape[1]
        self.values = np.zeros((len(self.experts), num_prompts))
        self.used = np.zeros((len(self.experts), num_prompts), dtype=np.int64)
        self.writes = np.zeros((len(self.experts), width))
        self.others: dict[tuple[str, int | None], NDArray[np.float64]] = {}
        self.max_error = 0.0
        weight = self.head.weight.detach()
        self.mean_row_H = weight.double().mean(0).cpu()

    def add(self, batch: TargetBatch) -> None:
        """One forward and its parts."""
        cells = self._cells(batch)
        kept = batch.num_columns
        reader = StreamReader(self.model, self.sites, lambda tensor: cells.pick(tensor, kept))
        raw: list[Tensor] = []
        hook = self.head.register_forward_hook(lambda _m, _a, output: raw.append(output))
        try:
            with reader.reading():
                logits_BAV = batch_logits(self.bundle, batch)
        finally:
            hook.remove()
        assert reader.final is not None
        raw_NV = cells.pick(raw[-1], kept).double().cpu()
        scaling = self._scaling(raw_NV, cells.pick(logits_BAV, kept).double().cpu())
        read_NH, bias_N = self._read_vectors(cells)
        total_NH = torch.zeros_like(read_NH)
        for part in reader.parts:
            carried_NH = reader.final(part.written)
            total_NH += carried_NH
            self._count(part, cells, carried_NH * scaling, read_NH)
        constant_N = ((reader.final.bias * read_NH).sum(1) + bias_N) * scaling
        self._add_other(("constant", None), cells, constant_N)
        self._prove(total_NH + reader.final.bias, raw_NV, reader.tolerance)

    def _count(self, part: StreamPart, cells: _Cells, carried_NH: Tensor, read_NH: Tensor) -> None:
        value_N = (carried_NH * read_NH).sum(1)
        if part.expert is None:
            self._add_other((part.part, part.layer), cells, value_N)
            return
        rows = self.first_of[part.layer] + part.expert.numpy()
        np.add.at(self.values, (rows, cells.prompts), value_N.numpy())
        is_used_N = (part.written != 0).any(1).numpy()
        np.add.at(self.used, (rows[is_used_N], cells.prompts[is_used_N]), 1)
        np.add.at(self.writes, rows, carried_NH.numpy() * (cells.share / self.num_prompts)[:, None])

    def _add_other(self, key: tuple[str, int | None], cells: _Cells, value_N: Tensor) -> None:
        found = self.others.setdefault(key, np.zeros(self.num_prompts))
        np.add.at(found, cells.prompts, value_N.numpy())

    def _cells(self, batch: TargetBatch) -> _Cells:
        rows, columns, prompts, reads = [], [], [], []
        for at, row in enumerate(batch.rows):
            for column in sorted({read.column for read in row.reads}):
                rows.append(at)
                columns.append(batch.num_columns - column)
                prompts.append(row.prompt)
                own = [(one.token, one.factor) for one in row.reads if one.column == column]
                reads.append(tuple(own))
        of = np.array(prompts, dtype=np.int64)
        share = 1.0 / self.num_positions[of]
        return _Cells(torch.tensor(rows), torch.tensor(columns), of, share, tuple(reads))

    def _read_vectors(self, cells: _Cells) -> tuple[Tensor, Tensor]:
        """Per position what the input of the unembedding is multiplied with, and what is added."""
        bias = getattr(self.head, "bias", None)
        vectors, constants = [], []
        for reads in cells.reads:
            tokens = torch.tensor([token for token, _ in reads])
            factors = torch.tensor([factor for _, factor in reads], dtype=torch.float64)
            own_RH = self.head.weight.detach()[tokens.to(self.head.weight.device)].double().cpu()
            vectors.append(factors @ (own_RH - self.mean_row_H))
            if isinstance(bias, Tensor):
                whole = bias.detach().double().cpu()
                constants.append(factors @ (whole[tokens] - whole.mean()))
            else:
                constants.append(torch.zeros((), dtype=torch.float64))
        return torch.stack(vectors), torch.stack(constants)

    def _scaling(self, raw_NV: Tensor, logits_NV: Tensor) -> float:
        """What the model multiplies the unembedding's output by, before any softcap."""
        config = self.model.config
        if getattr(config, "final_logit_softcapping", None):
            return 1.0
        found = float((raw_NV * logits_NV).sum() / (raw_NV * raw_NV).sum())
        if (raw_NV * found - logits_NV).abs().max() > 1e-4 * logits_NV.abs().max():
            raise ModelInputError(
                f"{type(self.model).__name__}: its logits are not those of its unembedding times a "
                "number, so they cannot be attributed"
            )
        return found

    def _prove(self, total_NH: Tensor, raw_NV: Tensor, tolerance: float) -> None:
        """All parts together must give the unembedding's own output."""
        weight = self.head.weight
        with torch.no_grad():
            again = self.head.forward(total_NH.to(weight.device, weight.dtype)).double().cpu()
        error = float((again - raw_NV).abs().max())
        if error > tolerance * max(1.0, float(raw_NV.abs().max())):
            raise ModelInputError(
                f"{type(self.model).__name__}: the parts of its residual stream miss its logits by "
                f"{error:.2g}, so they cannot be attributed"
            )
        self.max_error = max(self.max_error, error)

    def result(self) -> LogitAttribution:
        """What was added up."""
        parts = tuple(self.others)
        part_values = np.array([self.others[one] for one in parts])
        return LogitAttribution(
            experts=tuple(self.experts),
            values=self.values,
            used=self.used,
            parts=parts,
            part_values=part_values,
            target=self.values.sum(0) + part_values.sum(0),
            writes=self.writes,
            max_error=self.max_error,
        )


def _head(bundle: ModelBundle) -> Any:
    """The unembedding of a model.

    Raises:
        ModelInputError: it has none.
    """
    head = underlying(bundle.model).get_output_embeddings()  # type: ignore[operator]
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise ModelInputError(f"{type(bundle.model).__name__} has no unembedding to attribute to")
    return head
