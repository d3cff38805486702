"""Targets: the one number of a prompt whose causes are asked for.

A target is a sum of log-probabilities, each with a factor, of tokens at columns of one or more
rows: the prompt, or the prompt with a given text after it (teacher forcing). That covers the
log-probability of an answer, the difference between two openings, the loss on the prompt, and a
difference of two logits (at one column it equals that of the log-probabilities). Anything else is a
`Custom` target: a Python function of the logits.

Letters: A columns whose logits are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moescope.probe.errors import InputError
from moescope.probe.models import ModelBundle
from moescope.probe.rendering import RenderedPrompt
from moescope.steering.scoring import answer_token_ids


@dataclass(frozen=True)
class Read:
    """One log-probability that a target adds up.

    Attributes:
        column: of the row, counted from its end: 1 is the last.
        token: the token whose log-probability at that column (given what is up to it) counts.
        factor: times this.
    """

    column: int
    token: int
    factor: float


@dataclass(frozen=True)
class TargetRow:
    """One sequence that a target feeds to the model.

    Attributes:
        prompt: index of the prompt it belongs to, among those given.
        token_ids: the prompt's, and those of the text after it that are fed.
        num_prompt_tokens: how many of them are the prompt.
        reads: the log-probabilities that count.
        function: of the logits of the last `num_columns` columns, float[A, V], to a scalar tensor;
            added to what `reads` say.
        num_columns: A, how many columns of logits are needed, counted from the end.
    """

    prompt: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    reads: tuple[Read, ...]
    num_columns: int
    function: Callable[[Tensor], Tensor] | None = None


class Target(Protocol):
    """What is asked about; one number per prompt, in `unit`."""

    @property
    def name(self) -> str:
        """What error messages and tables call it."""
        ...

    @property
    def unit(self) -> str:
        """Of its values."""
        ...

    def rows(
        self, bundle: ModelBundle, rendered: RenderedPrompt, prompt: int
    ) -> tuple[TargetRow, ...]:
        """The rows of one prompt.

        Args:
            bundle: model and tokenizer.
            rendered: the prompt.
            prompt: its index among those given.

        Raises:
            InputError: the prompt has not what the target needs.
        """
        ...


def target_rows(
    bundle: ModelBundle, target: Target, rendered: Sequence[RenderedPrompt]
) -> list[TargetRow]:
    """The rows of all prompts, in their order.

    Raises:
        InputError: a prompt has not what the target needs; there is no prompt.
    """
    if not rendered:
        raise InputError(f"target {target.name!r} needs at least one prompt")
    return [row for at, prompt in enumerate(rendered) for row in target.rows(bundle, prompt, at)]


@dataclass(frozen=True)
class AnswerLogProb:
    """The log-probability of a text after the prompt.

    Attributes:
        texts: by prompt id; without it each prompt's `expected` answer.
        num_tokens: only the first so many tokens of it (its opening); all of them without.
        mean: per token instead of their sum.
    """

    texts: Mapping[int, str] | None = None
    num_tokens: int | None = None
    mean: bool = False
    name: str = "answer_log_prob"
    unit: str = "nats"

    def rows(
        self, bundle: ModelBundle, rendered: RenderedPrompt, prompt: int
    ) -> tuple[TargetRow, ...]:
        """One row: the prompt and the text without its last token, which is predicted only."""
        text = _text_of(rendered, self.texts, self.name)
        return (_forced(bundle, rendered, prompt, text, self.num_tokens, self.mean, 1.0),)


@dataclass(frozen=True)
class OpeningDifference:
    """How much likelier one opening is than another: log p(first) - log p(second).

    With the refusal as the first and the answer as the second it is what 10.5 of our methods calls
    the refusal opening minus that of the answer: above 0 the model leans towards refusing.

    Attributes:
        first: text by prompt id.
        second: text by prompt id; without it each prompt's `expected` answer.
        num_tokens: tokens of each text that count; all of them where None.
    """

    first: Mapping[int, str]
    second: Mapping[int, str] | None = None
    num_tokens: int | None = 4
    name: str = "opening_difference"
    unit: str = "nats"

    def rows(
        self, bundle: ModelBundle, rendered: RenderedPrompt, prompt: int
    ) -> tuple[TargetRow, ...]:
        """Two rows, one for each text."""
        first = _text_of(rendered, self.first, self.name)
        second = _text_of(rendered, self.second, self.name)
        return (
            _forced(bundle, rendered, prompt, first, self.num_tokens, False, 1.0),
            _forced(bundle, rendered, prompt, second, self.num_tokens, False, -1.0),
        )


@dataclass(frozen=True)
class PromptLoss:
    """The mean loss on the prompt's own tokens, the first one left out."""

    name: str = "prompt_loss"
    unit: str = "nats per token"

    def rows(
        self, bundle: ModelBundle, rendered: RenderedPrompt, prompt: int
    ) -> tuple[TargetRow, ...]:
        """One row: the prompt without its last token, which is predicted only."""
        del bundle
        ids = rendered.token_ids
        if len(ids) < 2:
            raise InputError(
                f"prompt {rendered.prompt.prompt_id} has {len(ids)} token, and a loss needs two"
            )
        num_reads = len(ids) - 1
        reads = tuple(
            Read(num_reads - at, token, -1.0 / num_reads) for at, token in enumerate(ids[1:])
        )
        return (TargetRow(prompt, ids[:-1], num_reads, reads, num_reads),)


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another where the first answer token is decided.

    Attributes:
        first, second: token ids.
    """

    first: int
    second: int
    name: str = "logit_difference"
    unit: str = "logits"

    def rows(
        self, bundle: ModelBundle, rendered: RenderedPrompt, prompt: int
    ) -> tuple[TargetRow, ...]:
        """One row: the prompt; what normalizes both log-probabilities cancels."""
        del bundle
        ids = rendered.token_ids
        reads = (Read(1, self.first, 1.0), Read(1, self.second, -1.0))
        return (TargetRow(prompt, ids, len(ids), reads, 1),)


@dataclass(frozen=True)
class Custom:
    """Any function of the logits after a prompt.

    Attributes:
        function: float[A, V], the logits of the prompt's last `num_columns` tokens, to a scalar
            tensor; differentiable where attribution is asked for.
        num_columns: A; the last column decides the first answer token.
    """

    function: Callable[[Tensor], Tensor]
    num_columns: int = 1
    name: str = "custom"
    unit: str = ""

    def rows(
        self, bundle: ModelBundle, rendered: RenderedPrompt, prompt: int
    ) -> tuple[TargetRow, ...]:
        """One row: the prompt."""
        del bundle
        ids = rendered.token_ids
        if len(ids) < self.num_columns:
            raise InputError(
                f"target {self.name!r} reads {self.num_columns} columns, and prompt "
                f"{rendered.prompt.prompt_id} has {len(ids)} tokens"
            )
        return (TargetRow(prompt, ids, len(ids), (), self.num_columns, self.function),)


def _text_of(rendered: RenderedPrompt, texts: Mapping[int, str] | None, name: str) -> str:
    prompt = rendered.prompt
    text = prompt.expected if texts is None else texts.get(prompt.prompt_id)
    if not text:
        source = "no expected answer" if texts is None else "no text"
        raise InputError(f"target {name!r}: prompt {prompt.prompt_id} has {source}")
    return text


def _forced(
    bundle: ModelBundle,
    rendered: RenderedPrompt,
    prompt: int,
    text: str,
    num_tokens: int | None,
    mean: bool,
    factor: float,
) -> TargetRow:
    """A text fed after a prompt; its last token is predicted but never fed."""
    answer = answer_token_ids(bundle, rendered, text)[:num_tokens]
    if not answer:
        raise InputError(f"prompt {rendered.prompt.prompt_id}: the text {text!r} has no tokens")
    each = factor / len(answer) if mean else factor
    reads = tuple(Read(len(answer) - at, token, each) for at, token in enumerate(answer))
    ids = (*rendered.token_ids, *answer[:-1])
    return TargetRow(prompt, ids, len(rendered.token_ids), reads, len(answer))
