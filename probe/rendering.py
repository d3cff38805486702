"""From a prompt to tokens: chat template, token ids, and what each token is part of.

The tokenizer's chat template is applied when it has one, and the rendered text is tokenized
without adding special tokens again, so no beginning-of-text token is doubled. Each token gets a
segment: `system` or `user` text, `answer` (an earlier turn of the assistant), or `template`
(everything the template adds, special tokens included).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moescope.probe.errors import ModelInputError
from moescope.probe.prompts import Prompt

ChatTemplate = Literal["auto", "on", "off"]
_SEGMENT_OF_ROLE = {"system": "system", "user": "user", "assistant": "answer"}


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model sees it; the tuples have one entry a token.

    Attributes:
        text: what was tokenized.
        token_ids: ids in the tokenizer's vocabulary.
        segments: `system`, `user`, `answer` or `template`.
        is_special: whether the id is one of the tokenizer's special tokens.
        in_span: whether the token overlaps the prompt's `span`.
    """

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    segments: tuple[str, ...]
    is_special: tuple[bool, ...]
    in_span: tuple[bool, ...]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


def uses_chat_template(tokenizer: Any, chat_template: ChatTemplate) -> bool:
    """Whether prompts are rendered through the tokenizer's chat template."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template == "on" and not has_template:
        raise ModelInputError("this tokenizer has no chat template; use --chat-template off")
    return has_template and chat_template != "off"


def render_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    chat_template: ChatTemplate = "auto",
    system: str | None = None,
) -> RenderedPrompt:
    """Render and tokenize one prompt.

    Args:
        tokenizer: a transformers tokenizer that reports character offsets.
        prompt: what to render.
        chat_template: `auto` uses the template where there is one.
        system: a system message put before the prompt's own turns.

    Raises:
        ModelInputError: no chat template where one is asked for, a template that changes the
            text so that its tokens cannot be told apart, or a tokenizer without offsets.
    """
    templated = uses_chat_template(tokenizer, chat_template)
    turns = _turns(prompt, system)
    if templated:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        pieces = _locate(turns, text, prompt)
    else:
        text = "\n\n".join(turn["content"] for turn in turns)
        pieces = _locate(turns, text, prompt)
    token_ids, offsets = _tokenize(tokenizer, text, add_special_tokens=not templated)
    special_ids = frozenset(tokenizer.all_special_ids)
    is_special = tuple(token_id in special_ids for token_id in token_ids)
    segments = tuple(
        "template" if special else _segment(offset, pieces)
        for offset, special in zip(offsets, is_special, strict=True)
    )
    span = _span_range(prompt, pieces, text)
    in_span = tuple(_overlaps(offset, span) for offset in offsets)
    return RenderedPrompt(prompt, text, token_ids, segments, is_special, in_span)


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    segment: str


def _turns(prompt: Prompt, system: str | None) -> list[dict[str, str]]:
    own = prompt.messages or ({"role": "user", "content": prompt.text},)
    turns = [dict(turn) for turn in own]
    if system is not None:
        if turns[0]["role"] == "system":
            raise ModelInputError(
                f"prompt {prompt.key or prompt.prompt_id} has a system turn of its own; "
                "leave --system out"
            )
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _locate(turns: Sequence[Mapping[str, str]], text: str, prompt: Prompt) -> list[_Piece]:
    """Where each turn's content stands in the rendered text."""
    pieces: list[_Piece] = []
    position = 0
    for turn in turns:
        content = turn["content"]
        start = text.find(content, position)
        if start < 0:  # many templates trim the content
            content = content.strip()
            start = text.find(content, position)
        if start < 0:
            raise ModelInputError(
                f"the chat template changes the {turn['role']} text of prompt "
                f"{prompt.key or prompt.prompt_id}, so its tokens cannot be told from the "
                "template's; use --chat-template off"
            )
        position = start + len(content)
        pieces.append(_Piece(start, position, _SEGMENT_OF_ROLE[turn["role"]]))
    return pieces


def _tokenize(
    tokenizer: Any, text: str, *, add_special_tokens: bool
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    try:
        encoded = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
    except NotImplementedError as error:
        raise ModelInputError(
            f"{type(tokenizer).__name__} reports no character offsets; moescope needs a "
            "tokenizer with a tokenizer.json"
        ) from error
    token_ids = tuple(int(token_id) for token_id in encoded["input_ids"])
    if not token_ids:
        raise ModelInputError("a prompt has no tokens after tokenization")
    return token_ids, [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _overlaps(offset: tuple[int, int], span: tuple[int, int] | None) -> bool:
    return span is not None and offset[0] < span[1] and offset[1] > span[0]


def _segment(offset: tuple[int, int], pieces: Sequence[_Piece]) -> str:
    for piece in pieces:
        if _overlaps(offset, (piece.start, piece.end)):
            return piece.segment
    return "template"


def _span_range(prompt: Prompt, pieces: Sequence[_Piece], text: str) -> tuple[int, int] | None:
    if prompt.span is None:
        return None
    start = text.index(prompt.span, pieces[-1].start)
    return start, start + len(prompt.span)
