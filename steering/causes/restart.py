"""Forwards that start in the middle of a model, each row without an expert of its own.

Five savings, each exact, each proved on the live model before it is relied upon (`prove`):

- *restart*: the model's own forward runs, but decoder layers before the router's hand back what
  they returned before;
- *children*: so do the parts of the router's layer that are done before its router (attention);
- *tokens*: the block around the router computes only the tokens whose routing changes;
- *columns*: tokens before the first change are not computed; later tokens find their keys and
  values in a cache;
- *reads*: the experts of the last layer, and the unembedding, compute only the columns that a row
  reads and that can have changed.

Letters: N rows run, S columns, C columns computed, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moescope.probe.errors import MoescopeError
from moescope.probe.generation import PaddedBatch
from moescope.probe.models import ModelBundle
from moescope.steering.causes.ablated_router import AblatedRouter
from moescope.steering.causes.measuring import TargetBatch, batch_running
from moescope.steering.causes.reach import Pairs
from moescope.steering.causes.stored_batch import Stack, StoredBatch, forward


@dataclass(frozen=True)
class Savings:
    """What a restart leaves out; see this module."""

    restart: bool = False
    children: bool = False
    tokens: bool = False
    columns: bool = False
    reads: bool = False

    @property
    def words(self) -> str:
        """`restart, children, tokens`, for example."""
        names = [name for name, value in vars(self).items() if value]
        return ", ".join(names) or "none (full forwards)"


#: From the fastest on; the first that proves right is used.
LADDER = (
    *(
        Savings(restart=True, children=True, tokens=tokens, columns=columns, reads=reads)
        for reads in (True, False)
        for columns in (True, False)
        for tokens in (True, False)
    ),
    Savings(restart=True, columns=True),
    Savings(restart=True),
    Savings(),
)

#: What a model may raise where it cannot do what a saving asks of it.
REFUSALS = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, MoescopeError,
)  # fmt: skip


def without_experts(
    bundle: ModelBundle,
    stored: StoredBatch,
    router: AblatedRouter,
    around: Stack | None,
    pairs: Pairs,
    prompt_ids: Sequence[int],
    savings: Savings,
) -> Tensor:
    """The value of each row without its expert, float32[N]; called inside `steer` of the rest.

    Args:
        bundle: model and tokenizer.
        stored: the batch that the rows are of.
        router: whose experts are taken out, with what the base plan does there.
        around: the layers around it.
        pairs: N rows and experts; the first of them changes first.
        prompt_ids: of all prompts, by index.
        savings: what is left out.
    """
    begin = _begin(stored, pairs) if savings.columns else 0
    batch = rows_of(stored, pairs.rows, begin)
    run = _Run(stored, router, around, pairs, begin)
    with ExitStack() as stack:
        stack.enter_context(batch_running(batch, prompt_ids))
        for module, replacement in run.replacements(savings):
            stack.enter_context(_instead(module, replacement))
        stack.enter_context(router.attached(run.expert_of_rows, run.places))
        head = head_of(bundle) if savings.reads and not has_functions(stored.batch) else None
        wanted = wanted_columns(batch, pairs.first)
        if head is not None:
            stack.enter_context(_instead(head, _some_columns(head.forward, wanted)))
            last = None if around is None or around.is_last else around.last_block
            if last is not None:
                num_computed = batch.inputs.input_ids.shape[1] - begin
                replacement = _read_tokens(last.forward, wanted, num_computed)
                stack.enter_context(_instead(last, replacement))
        logits = forward(bundle, batch, begin=begin, cache=run.cache(), whole=head is not None)
    if head is None:
        return batch.values(logits) + _unchanged(stored, pairs.rows, batch)
    return _values_of_some(stored, pairs.rows, batch, logits, wanted)


def _begin(stored: StoredBatch, pairs: Pairs) -> int:
    """The first column to compute: where a row changes; functions need all that they read."""
    begin = int(pairs.first.min())
    if has_functions(stored.batch):
        begin = min(begin, stored.batch.inputs.input_ids.shape[1] - stored.batch.num_columns)
    return begin


def rows_of(stored: StoredBatch, rows_N: Tensor, begin: int) -> TargetBatch:
    """These rows of a batch; reads of columns that are not computed count 0."""
    batch = stored.batch
    rows = rows_N.tolist()
    device = batch.inputs.input_ids.device
    num_columns = min(batch.num_columns, batch.inputs.input_ids.shape[1] - begin)
    columns = batch.columns[rows] - (batch.num_columns - num_columns)
    at = rows_N.to(device)
    inputs = PaddedBatch(
        batch.inputs.input_ids[at],
        batch.inputs.attention_mask[at],
        tuple(batch.inputs.lengths[row] for row in rows),
    )
    return replace(
        batch,
        rows=tuple(batch.rows[row] for row in rows),
        members=tuple(batch.members[row] for row in rows),
        inputs=inputs,
        num_columns=num_columns,
        columns=columns.clamp(min=0),
        tokens=batch.tokens[rows],
        factors=batch.factors[rows].masked_fill(columns < 0, 0.0),
    )


def _unchanged(stored: StoredBatch, rows_N: Tensor, batch: TargetBatch) -> Tensor:
    """What reads before the computed columns add to each value, float32[N]."""
    missing = stored.batch.num_columns - batch.num_columns
    early = (stored.batch.columns < missing).to(stored.read.device)
    return (stored.read * early).sum(1)[rows_N.to(stored.read.device)]


def head_of(bundle: ModelBundle) -> nn.Module | None:
    """What makes logits of hidden states, or None where the model does not say."""
    head = bundle.model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def has_functions(batch: TargetBatch) -> bool:
    """Whether a row needs all its logits."""
    return any(row.function is not None for row in batch.rows)


def wanted_columns(batch: TargetBatch, first_N: Tensor) -> Tensor:
    """Columns that a row reads, from its first change on, bool[N, A], among those kept.

    Args:
        batch: the rows.
        first_N: int64[N], their first change, among all columns.
    """
    num_columns = batch.num_columns
    wanted_NA = torch.zeros(batch.num_rows, num_columns)
    wanted_NA.scatter_add_(1, batch.columns.cpu(), (batch.factors != 0).float().cpu())
    before = batch.inputs.input_ids.shape[1] - num_columns
    return (wanted_NA > 0) & (torch.arange(num_columns) + before >= first_N[:, None].cpu())


def _some_columns(own: Callable[..., Any], wanted_NA: Tensor) -> Callable[..., Any]:
    """An unembedding of the wanted columns only, side by side in one row."""

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[1] < wanted_NA.shape[1]:
            raise ValueError("the unembedding does not get the columns that are read")
        hidden = hidden[:, -wanted_NA.shape[1] :]
        return own(hidden[wanted_NA.to(hidden.device)][None], *args, **kwargs)

    return run


def _read_tokens(own: Callable[..., Any], wanted_NA: Tensor, num_computed: int) -> Any:
    """The last block on tokens that are read, and 0 on those that nothing depends on any more."""
    wanted_NC = functional.pad(wanted_NA, (num_computed - wanted_NA.shape[1], 0))

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        at = wanted_NC.to(hidden.device)
        found = own(hidden[at][None], *args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        whole = torch.zeros_like(hidden)
        whole[at] = first.reshape(-1, first.shape[-1])
        return (whole, *found[1:]) if isinstance(found, tuple) else whole

    return run


def _values_of_some(
    stored: StoredBatch, rows_N: Tensor, batch: TargetBatch, logits: Tensor, wanted_NA: Tensor
) -> Tensor:
    """Values of rows of which only the wanted columns were read anew, float32[N]."""
    device = logits.device
    wanted_NA = wanted_NA.to(device)
    if logits.shape[:2] != (1, int(wanted_NA.sum())):
        raise ValueError("the unembedding did not give the columns that are read")
    logits_MV = logits[0].float()
    level_M = logits_MV.logsumexp(-1)
    at_NA = wanted_NA.reshape(-1).cumsum(0).view(wanted_NA.shape) - 1
    columns_NR = batch.columns.to(device)
    is_new_NR = wanted_NA.gather(1, columns_NR) & (batch.factors.to(device) != 0)
    at_NR = at_NA.gather(1, columns_NR).clamp(min=0)
    new_NR = logits_MV[at_NR, batch.tokens.to(device)] - level_M[at_NR]
    new_NR = new_NR * batch.factors.to(device)
    old_NR = stored.read[rows_N.to(stored.read.device)].to(device)
    return torch.where(is_new_NR, new_NR, old_NR).sum(1)


class _Run:
    """One forward from the middle: what is handed back in it, and which rows are edited how."""

    def __init__(
        self,
        stored: StoredBatch,
        router: AblatedRouter,
        around: Stack | None,
        pairs: Pairs,
        begin: int,
    ) -> None:
        self.stored = stored
        self.router = router
        self.site = stored.sites[router.site.info.module]
        self.around = around
        self.rows = pairs.rows
        self.begin = begin
        self.num_rows, self.num_columns = stored.batch.inputs.input_ids.shape
        self.acts_NC = pairs.acts[pairs.places, pairs.rows][:, begin:]
        self.experts_NC = pairs.experts[:, None].expand(self.acts_NC.shape)
        self.computed: Tensor | None = None

    def expert_of_rows(self) -> Tensor:
        """Of the router call that runs, int64[T]."""
        at = self.computed
        return self.experts_NC.reshape(-1) if at is None else self.experts_NC[at]

    def places(self) -> list[bool | Tensor]:
        """Where the base plan's interventions on the router act in that call."""
        found: list[bool | Tensor] = []
        for place in self.site.places:
            if isinstance(place, bool):
                found.append(place)
                continue
            own_NC = self.taken(place.view(self.num_rows, self.num_columns))
            at = self.computed
            found.append(own_NC.reshape(-1) if at is None else own_NC[at.to(own_NC.device)])
        return found

    def taken(self, stored_BS: Tensor) -> Tensor:
        """These rows and columns of something stored, [N, C, ...]."""
        return stored_BS[:, self.begin :].index_select(0, self.rows.to(stored_BS.device))

    def cache(self) -> Any:
        """Keys and values of the columns before, or None."""
        if self.begin == 0 or self.stored.cache is None or self.around is None:
            return None
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        for index, own in enumerate(self.stored.cache.layers):
            if type(own) is not DynamicLayer or own.keys is None:
                raise ValueError("a layer keeps something else than all keys and values")
            layer = DynamicLayer()
            rows = self.rows.to(own.keys.device)
            if index < self.around.index:  # only its length is asked for
                rows = rows[:1]
            keys = own.keys[:, :, : self.begin].index_select(0, rows)
            values = own.values[:, :, : self.begin].index_select(0, rows)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache

    def replacements(self, savings: Savings) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Modules with what runs in their place."""
        if self.around is None:
            if savings != Savings():
                raise ValueError("the model has no list of layers")
            return
        if savings.restart:
            for index in range(self.around.index):
                is_previous = index == self.around.index - 1
                yield self.around.layers[index], self._handing_on(is_previous)
        if savings.children:
            for module, output in self.site.before:
                yield module, self._handing_back(output)
        if savings.tokens:
            block = self.router.site.block
            if block is self.around.layer:
                raise ValueError("the block is the layer")
            yield block, self._some_tokens(block.forward)

    def _handing_on(self, is_previous: bool) -> Callable[..., Any]:
        """A layer that changes nothing, or gives the router's layer its stored input."""

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            output = self.site.layer_output
            if is_previous:
                first = output[0] if isinstance(output, tuple) else output
                hidden = self.taken(first)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return run

    def _handing_back(self, output: Any) -> Callable[..., Any]:
        """A module that returns what it returned before."""
        parts = output if isinstance(output, tuple) else (output,)
        if not isinstance(parts[0], Tensor) or parts[0].shape[:2] != (
            self.num_rows, self.num_columns,
        ):  # fmt: skip
            raise ValueError("a part of the layer returns no tensor by row and token")

        def run(*_args: Any, **_kwargs: Any) -> Any:
            first = self.taken(parts[0])
            # Attention weights and the like: nobody reads them.
            return (first, *(None for _ in parts[1:])) if isinstance(output, tuple) else first

        return run

    def _some_tokens(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The block on the tokens whose routing changes, and its former output elsewhere."""
        output = self.site.block_output
        former = output[0] if isinstance(output, tuple) else output
        if not isinstance(former, Tensor) or former.shape[:2] != (self.num_rows, self.num_columns):
            raise ValueError("the block returns no tensor by row and token")

        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            at = self.acts_NC.to(hidden.device)
            self.computed = self.acts_NC
            try:
                found = own(hidden[at][None], *args, **kwargs)
            finally:
                self.computed = None
            whole = self.taken(former)
            first = found[0] if isinstance(output, tuple) else found
            whole[at.to(whole.device)] = first.reshape(-1, first.shape[-1])
            return (whole, *found[1:]) if isinstance(output, tuple) else whole

        return run


@contextmanager
def _instead(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let a module run something else while the block runs."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = replacement
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def usable(ladder: Sequence[Savings], has_cache: bool, is_last: bool) -> list[Savings]:
    """The savings to try: without a cache columns are left out in the last layer only."""
    return [one for one in ladder if not one.columns or has_cache or is_last]
