"""A model as lm-evaluation-harness runs it, with the positions that steering needs.

The harness' own `HFLM` scores answers in forwards of prompt and answer together, padded on the
right and without an attention mask, so that nobody could tell prompt, answer and padding apart.
`SteerableHFLM` hands the model that mask and says where each row's answer begins, as
`moescope.steering.scoring` does; numbers are the same, because causal attention never looks at
padding to the right. Generation needs nothing: `steer` knows the prompt of each `generate`.

This module imports lm_eval; see `moescope.steering.harness_tasks.require_harness`.

Letters: B rows, S columns, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from moescope.probe.errors import InputError, MoescopeError
from moescope.probe.models import ModelBundle
from moescope.steering.positions import answers_begin_at

#: A request as HFLM has it: (context, continuation) or None, and the token ids of both.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class FedRow:
    """What one request feeds the model.

    Attributes:
        token_ids: all but the last of prompt and answer, cut on the left to the model's length.
        answer_column: of the answer's first token; `len(token_ids)` where only that is asked for.
    """

    token_ids: tuple[int, ...]
    answer_column: int


class SteerableHFLM(HFLM):  # type: ignore[misc]
    """The harness' HFLM around a loaded model; see the module."""

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        batch_size: int = 8,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            bundle: model and tokenizer, used as they are.
            batch_size: requests in one forward.
            advance: called with the number of requests that were just run.

        Raises:
            InputError: the model is an encoder-decoder.
        """
        if getattr(bundle.model.config, "is_encoder_decoder", False):
            raise InputError(
                f"{bundle.name} is an encoder-decoder; tasks of the harness are run on "
                "decoder-only models"
            )
        self._fed: deque[FedRow] = deque()
        self._advance = advance or (lambda _num_rows: None)
        # Otherwise requests that feed the same tokens share one forward, though their prompts may
        # end at different places (which HFLM 0.4.13 scores wrongly besides).
        super().__init__(
            pretrained=bundle.model,
            tokenizer=bundle.tokenizer,
            batch_size=batch_size,
            logits_cache=False,
        )

    def fed_row(self, request: Request) -> FedRow:
        """The row of a request, as HFLM makes it.

        HFLM counts white space at the end of the prompt (many chat templates end in a line break)
        to the answer it scores. The model would be given it, so for a plan it is prompt.
        """
        strings, context, continuation = request
        whole = [*context, *continuation]
        fed = whole[-(self.max_length + 1) :][:-1]
        begin = len(context)
        if strings is not None and strings[0].strip() and strings[0] != strings[0].rstrip():
            given = self.tok_encode(strings[0])
            if len(given) < len(whole) and whole[: len(given)] == given:
                begin = len(given)
        return FedRow(tuple(fed), max(begin - (len(whole) - 1 - len(fed)), 0))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As in HFLM, which runs requests in this order; `_model_call` checks it row by row."""
        ordered = sorted(requests, key=lambda one: (-len(one[1] + one[2]), tuple(one[1] + one[2])))
        self._fed = deque(self.fed_row(one) for one in ordered)
        try:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        finally:
            num_left = len(self._fed)
            self._fed.clear()
        if num_left:
            raise MoescopeError(f"lm_eval left {num_left} requests out, which it never should")
        return found

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The logits [B, S, V] of rows padded on the right."""
        rows = [self._fed.popleft() for _ in range(min(len(inps), len(self._fed)))]
        mask_BS = torch.zeros_like(inps)
        for at, row in enumerate(rows):
            mask_BS[at, : len(row.token_ids)] = 1
        if [tuple(row) for row in inps.tolist()] != [
            row.token_ids + (0,) * (inps.shape[1] - len(row.token_ids)) for row in rows
        ]:
            raise MoescopeError(
                "this version of lm_eval batches requests in another way, so prompt and answer "
                "cannot be told apart; use 0.4.13"
            )
        columns = torch.tensor([row.answer_column for row in rows])
        with torch.inference_mode(), answers_begin_at(columns):
            logits_BSV: Tensor = self.model(
                input_ids=inps, attention_mask=mask_BS, use_cache=False
            ).logits
        self._advance(len(rows))
        return logits_BSV

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in HFLM; `steer` knows where the prompt ends, and the mask where it begins."""
        with torch.inference_mode():
            found: Tensor = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return found
