"""Running one planned batch: prompts through the model under the recorder, the store's rows out.

A batch that does not fit into memory is run in halves, and so are all later ones of its size.
Which batches that happened to stands in the run's manifest: routing depends a little on the shape
of a batch.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Final

import pyarrow as pa
import torch

from moescope.probe.errors import RecordingError
from moescope.probe.generation import batch_sampling, generate_batch, pad_left
from moescope.probe.models import ModelBundle
from moescope.probe.recording import record
from moescope.probe.rendering import RenderedPrompt
from moescope.probe.routers import LayerInfo, RouterSite
from moescope.probe.rows import RecordedBatch, batch_tables
from moescope.probe.trace_options import TraceOptions

_CPU_IS_FULL: Final = ("not enough memory", "can't allocate memory", "cannot allocate memory")


class BatchRunner:
    """Runs planned batches of rendered prompts on one model.

    Args:
        bundle: model and tokenizer.
        sites: the model's routers, proved.
        layers: the routers to keep.
        options: how to run and what to keep.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        sites: Sequence[RouterSite],
        layers: Sequence[LayerInfo],
        options: TraceOptions,
    ) -> None:
        self._bundle = bundle
        self._sites = sites
        self._layers = layers
        self._options = options
        #: Padded tokens, answers included, that did not fit; None as long as all did.
        self._too_many: int | None = None

    def run(
        self, members: Sequence[RenderedPrompt], batch_index: int
    ) -> tuple[Mapping[str, pa.Table], int]:
        """Run the prompts of a planned batch.

        Returns:
            The store's rows, table by table, and the number of parts it was run in.

        Raises:
            RecordingError: a single prompt does not fit into memory, or routing would have been
                recorded wrongly.
        """
        parts = self._in_parts(members, batch_index)
        names = {name for part in parts for name in part}
        return {
            name: pa.concat_tables([part[name] for part in parts if name in part])
            for name in sorted(names)
        }, len(parts)

    def _in_parts(
        self, members: Sequence[RenderedPrompt], batch_index: int
    ) -> list[Mapping[str, pa.Table]]:
        """The rows of the prompts, in as few parts as fit."""
        size = self._padded_tokens(members)
        if self._too_many is None or size < self._too_many:
            try:
                return [self._run(members, batch_index)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._too_many = size
        # Outside of the handler, whose traceback would keep what the failed attempt had allocated.
        _free_memory()
        if len(members) == 1:
            raise too_long(members[0], self._options, self._bundle.device)
        half = len(members) // 2
        return [
            *self._in_parts(members[:half], batch_index),
            *self._in_parts(members[half:], batch_index),
        ]

    def _padded_tokens(self, members: Sequence[RenderedPrompt]) -> int:
        longest = max(len(prompt) for prompt in members)
        return len(members) * (longest + self._options.max_new_tokens)

    def _run(self, members: Sequence[RenderedPrompt], batch_index: int) -> Mapping[str, pa.Table]:
        """Run prompts as one batch."""
        bundle, options = self._bundle, self._options
        padded = pad_left(
            [prompt.token_ids for prompt in members], bundle.tokenizer.pad_token_id, bundle.device
        )
        with record(bundle.model, norms=options.norms, sites=self._sites) as trace:
            if options.max_new_tokens > 0:
                answers = generate_batch(
                    bundle,
                    padded,
                    max_new_tokens=options.max_new_tokens,
                    sampling=batch_sampling(options.sampling, batch_index),
                )
            else:
                answers = None
                positions = padded.attention_mask.cumsum(dim=-1).sub(1).clamp(min=0)
                with torch.inference_mode():
                    bundle.model(
                        input_ids=padded.input_ids,
                        attention_mask=padded.attention_mask,
                        position_ids=positions,
                        use_cache=False,
                        logits_to_keep=1,
                    )
        return batch_tables(
            RecordedBatch(members, answers, trace),
            layers=self._layers,
            level=options.level,
            tokenizer=bundle.tokenizer,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error).lower() for words in _CPU_IS_FULL)


def too_long(prompt: RenderedPrompt, options: TraceOptions, device: object) -> RecordingError:
    """The error for a prompt that does not even fit into memory alone."""
    return RecordingError(
        f"prompt {prompt.prompt.key or prompt.prompt.prompt_id!r} with {len(prompt):,} tokens and "
        f"{options.max_new_tokens:,} to generate does not fit into the memory of {device} even "
        "alone; shorten it, or use a smaller --dtype or --device-map auto"
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
