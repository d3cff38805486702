"""Which token each router row belongs to: prompt or generated, padding or real.

Routers see a batch flattened to [B * S] rows; plans speak of the prompt, its last token and
generated tokens. A pre-hook on the model reads each forward's inputs, and `generate` is wrapped
while steering is on, because only its caller knows where the prompt ends (without a cache, with a
prefill in chunks, or with several tokens guessed at once, the forwards alone do not tell).

- inside `generate`: columns of its input are the prompt, what follows is generated;
- inside `answers_begin_at`: as told (teacher forcing);
- a plain forward without a filled cache is all prompt; with one, its tokens are generated, and
  count from the length at which the cache was first seen filled.

Letters: B sequences, S columns of this forward, T = B * S rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moescope.probe.batching import prompts_running
from moescope.probe.errors import MoescopeError
from moescope.steering.plan import FirstGenerated, TokenScope

_ANSWER_COLUMN: ContextVar[int | Tensor | None] = ContextVar("answer_column", default=None)


@contextmanager
def answers_begin_at(column: int | Tensor) -> Iterator[None]:
    """Say where prompts end in the forwards inside the block.

    Args:
        column: the first column, padding counted, that is not prompt: one number, or int[B] for
            each sequence its own.
    """
    token = _ANSWER_COLUMN.set(column)
    try:
        yield
    finally:
        _ANSWER_COLUMN.reset(token)


@dataclass
class TokenPositions:
    """The tokens of one forward.

    Attributes:
        num_sequences: B.
        num_columns: S.
        first_column: column of this forward's first token in the whole sequence (cache length).
        answer_column: first column that is generated, one number or int[B].
        is_real: bool[B, S], False on padding, or None where no mask was given.
        device: where row masks are made.
        position: int64[B, S], of each token in its own sequence, padding left out; None where
            the mask does not tell.
        prompts: the prompt of each sequence, where whoever runs the model said.
    """

    num_sequences: int
    num_columns: int
    first_column: int
    answer_column: int | Tensor
    is_real: Tensor | None
    device: torch.device
    position: Tensor | None = None
    prompts: tuple[int, ...] | None = None
    _rows: dict[TokenScope, bool | Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """T, the rows that a router sees."""
        return self.num_sequences * self.num_columns

    def rows(self, scope: TokenScope, prompt_ids: tuple[int, ...] | None = None) -> bool | Tensor:
        """The rows in scope: all (True), none (False), or bool[T] without padding.

        `all` is True with padding too: what happens on padding reaches no other token.
        """
        if scope not in self._rows:
            self._rows[scope] = self._find(scope)
        found = self._rows[scope]
        if prompt_ids is None or found is False:
            return found
        chosen = [prompt in prompt_ids for prompt in self._known_prompts()]
        if not any(chosen):
            return False
        if all(chosen):
            return found
        chosen_B1 = torch.tensor(chosen, device=self.device)[:, None]
        of_prompts = chosen_B1.expand(-1, self.num_columns).reshape(-1)
        return of_prompts if found is True else found & of_prompts

    def prompts_and_positions(self) -> tuple[Tensor, Tensor]:
        """Prompt and position of each row, int64[T] on the CPU; position -1 on padding.

        Raises:
            MoescopeError: nobody said which prompts run, or the mask does not tell positions.
        """
        if self.position is None:
            raise MoescopeError(
                "the attention mask does not tell which position each token has; give a mask of "
                "[sequences, tokens]"
            )
        prompts = torch.tensor(self._known_prompts())[:, None]
        return prompts.expand(-1, self.num_columns).reshape(-1), self.position.cpu().reshape(-1)

    def _known_prompts(self) -> list[int]:
        """The prompt of each sequence; `generate` repeats each for beams and samples."""
        prompts = self.prompts
        if prompts is None or not prompts or self.num_sequences % len(prompts):
            said = "nobody said" if prompts is None else f"{len(prompts)} were named"
            raise MoescopeError(
                f"which prompts these {self.num_sequences} sequences are is not known ({said}); "
                "run the model inside moescope.probe.batching.running_prompts([...])"
            )
        times = self.num_sequences // len(prompts)
        return [prompt for prompt in prompts for _ in range(times)]

    def real_rows(self) -> Tensor | None:
        """The rows that are not padding, bool[T], or None where no mask was given."""
        return None if self.is_real is None else self.is_real.reshape(-1)

    def _find(self, scope: TokenScope) -> bool | Tensor:
        if scope == "all":
            return True
        begin, end = self.first_column, self.first_column + self.num_columns
        if isinstance(self.answer_column, int):
            wants_prompt = scope in ("prompt", "last_prompt")
            if wants_prompt and begin >= self.answer_column:
                return False
            if not wants_prompt and end <= self.answer_column:
                return False
        column_S = torch.arange(begin, end, device=self.device)
        column_BS = column_S.expand(self.num_sequences, -1)
        answer = self.answer_column
        answer_B1 = answer.to(self.device)[:, None] if isinstance(answer, Tensor) else answer
        found_BS = column_BS < answer_B1
        if scope == "generated" or isinstance(scope, FirstGenerated):
            found_BS = ~found_BS
        if isinstance(scope, FirstGenerated):
            found_BS = found_BS & (column_BS < answer_B1 + scope.first_generated)
        if self.is_real is not None:
            found_BS = found_BS & self.is_real.to(self.device)
        if scope == "last_prompt":
            found_BS = self._last_of(found_BS, answer_B1 <= end)
        return found_BS.reshape(-1)

    def _last_of(self, prompt_BS: Tensor, is_complete: bool | Tensor) -> Tensor:
        """Each sequence's last prompt token, where the prompt ends within this forward."""
        later_BS = prompt_BS.long().flip(-1).cumsum(-1).flip(-1)
        return prompt_BS & (later_BS == 1) & is_complete


class PositionTracker:
    """Knows the token positions of the forward that is running.

    Attributes:
        current: of the running forward (its decoder), None outside or where it cannot be told.
        encoder: of its encoder, None where the model has none.
        is_running: whether a forward is running.
        num_forwards: forwards begun.
    """

    def __init__(self, model: nn.Module) -> None:
        self.current: TokenPositions | None = None
        self.encoder: TokenPositions | None = None
        self.is_running = False
        self.num_forwards = 0
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._has_encoder = "decoder_input_ids" in self._parameters
        self._prompt_lengths: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def of(self, kind: str) -> TokenPositions | None:
        """The positions of the rows that routers of this kind see."""
        return self.encoder if kind == "encoder" and self._has_encoder else self.current

    def before_forward(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Forward pre-hook of the model."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        tokens = _tokens(given, args)
        self.num_forwards += 1
        self.is_running = True
        if self._has_encoder:
            self._before_encoder_decoder(given, tokens)
            return
        if tokens is None:
            raise MoescopeError("a steered model needs input_ids or inputs_embeds in each forward")
        first_column = self._cache_length(given.get("past_key_values"))
        answer_column = self._answer_column(given, first_column, tokens.shape[1])
        self.current = _positions(tokens, first_column, answer_column, given.get("attention_mask"))

    def _before_encoder_decoder(self, given: Mapping[str, Any], tokens: Tensor | None) -> None:
        """An encoder reads the prompt; what its decoder was started with is its own prompt."""
        mask = given.get("attention_mask")
        self.encoder = None if tokens is None else _positions(tokens, 0, tokens.shape[1], mask)
        decoded = _tokens(given, (), prefix="decoder_")
        self.current = None
        if decoded is None:
            return
        cache = given.get("past_key_values")
        first_column = self._cache_length(cache)
        answer_column: int | Tensor = decoded.shape[1]
        if cache is not None:
            answer_column = self._prompt_lengths.setdefault(cache, first_column or decoded.shape[1])
        mask = given.get("decoder_attention_mask")
        self.current = _positions(decoded, first_column, answer_column, mask)

    def after_forward(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Forward hook of the model, called on errors too."""
        self.current = self.encoder = None
        self.is_running = False

    def _answer_column(
        self, given: Mapping[str, Any], first_column: int, num_columns: int
    ) -> int | Tensor:
        told = _ANSWER_COLUMN.get()
        if told is not None:
            return told
        cache = given.get("past_key_values")
        if cache is None:
            return num_columns
        here = first_column if first_column else num_columns
        return self._prompt_lengths.setdefault(cache, here)

    @staticmethod
    def _cache_length(cache: Any) -> int:
        if cache is None:
            return 0
        if not hasattr(cache, "get_seq_length"):
            raise MoescopeError(
                f"a {type(cache).__name__} does not tell how many tokens it holds, so steering "
                "cannot tell prompt from generated tokens; use a cache of transformers"
            )
        return int(cache.get_seq_length())


def _position_in_sequence(mask: Any, tokens: Tensor, first_column: int) -> Tensor | None:
    """int64[B, S]: how many real tokens precede each; -1 on padding; None where nothing tells."""
    num_sequences, num_columns = tokens.shape[:2]
    end = first_column + num_columns
    if mask is None:
        columns = torch.arange(first_column, end, device=tokens.device)
        return columns.expand(num_sequences, -1)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[-1] < end:
        return None
    real = mask[:, :end] != 0
    return (real.long().cumsum(-1) - 1).masked_fill(~real, -1)[:, first_column:]


def _tokens(given: Mapping[str, Any], args: tuple[Any, ...], prefix: str = "") -> Tensor | None:
    """What a forward reads: its ids or embeddings, also where it was called by position only."""
    found = given.get(f"{prefix}input_ids")
    found = given.get(f"{prefix}inputs_embeds") if found is None else found
    if found is None and args:
        found = args[0]
    return found if isinstance(found, Tensor) and found.ndim >= 2 else None


def _positions(
    tokens: Tensor, first_column: int, answer_column: int | Tensor, mask: Any
) -> TokenPositions:
    num_sequences, num_columns = tokens.shape[:2]
    return TokenPositions(
        num_sequences=num_sequences,
        num_columns=num_columns,
        first_column=first_column,
        answer_column=answer_column,
        is_real=_real_tokens(mask, first_column, num_columns),
        device=tokens.device,
        position=_position_in_sequence(mask, tokens, first_column),
        prompts=prompts_running(),
    )


def _real_tokens(mask: Any, first_column: int, num_columns: int) -> Tensor | None:
    """bool[B, S] from an attention mask of two dimensions, or of four as static caches use it."""
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if isinstance(one, Tensor)), None)
    end = first_column + num_columns
    if not isinstance(mask, Tensor) or mask.shape[-1] < end:
        return None
    if mask.ndim == 2:
        return mask[:, first_column:end] != 0
    if mask.ndim == 4 and mask.shape[-2] == num_columns:
        # A real token sees at least itself, padding sees nothing.
        own = mask[:, 0].diagonal(offset=first_column, dim1=-2, dim2=-1)
        return own if own.dtype == torch.bool else own == 0
    return None


@contextmanager
def prompts_known_in_generate(model: nn.Module) -> Iterator[None]:
    """While the block runs, forwards inside `model.generate` know where the prompt ends."""
    own = model.__dict__.get("generate")
    generate = getattr(model, "generate", None)
    has_encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if generate is None:
        yield
        return

    @wraps(generate)
    def knowing(*args: Any, **kwargs: Any) -> Any:
        with answers_begin_at(_prompt_columns(args, kwargs, has_encoder)):
            return generate(*args, **kwargs)

    model.__dict__["generate"] = knowing
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = own


def _prompt_columns(args: tuple[Any, ...], kwargs: Mapping[str, Any], has_encoder: bool) -> int:
    """Width of what `generate` was given; with nothing, it starts from one token of its own.

    With an encoder, what is given goes there, and the decoder's prompt is its own.
    """
    named = ("decoder_input_ids",) if has_encoder else ("inputs", "input_ids", "inputs_embeds")
    for given in (*(() if has_encoder else args[:1]), *(kwargs.get(name) for name in named)):
        if isinstance(given, Tensor):
            return int(given.shape[1])
    return 1
