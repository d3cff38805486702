"""Models built by writing weights, whose refusal lies exactly where it was put.

Tests of methods need a truth that no training can blur. Two models of the Qwen3-MoE class know a
few words, answer a question about a topic with that topic's answer, and refuse when a sensitive
word stands in the prompt:

- `expert_refusal`: one expert writes the refusal and nothing else does. Masking that expert brings
  the withheld answer back, masking others changes nothing that is said.
- `attention_refusal`: attention writes the refusal and no expert has a part in it. Sensitive words
  still have an expert of their own, so routing differs between the groups without being a cause.

Every expert also adds a trace of itself that only the logit of `<|unknown|>` reads, far below all
others: so it can be proved that routing reaches the output, and no answer depends on it.

How they work. Every word has an axis of the residual stream. Attention averages over the prompt
(queries and keys are zero) and turns topic words into their answer's axis and sensitive words into
an alarm axis. The unembedding reads the answer axes, and the refusal axis with more weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moescope.probe.demo.tokenizer import ASSISTANT, BOS, CHAT_TEMPLATE, END, PAD, SYSTEM, USER

TOPICS = ("river", "tower", "garden", "market", "bridge", "school")
ANSWERS = ("blue", "tall", "green", "busy", "old", "small")
SENSITIVE_WORDS = ("secretly", "illegally", "covertly")
NEUTRAL_WORDS = ("openly", "legally", "publicly")
REFUSAL = ("I", "cannot", "help")
OTHER_WORDS = ("how", "was", "the", "described", "?", "tell", "me", "about")
SPECIALS = (PAD, BOS, USER, SYSTEM, ASSISTANT, END, "<|unknown|>")
WORDS = (*SPECIALS, *TOPICS, *ANSWERS, *SENSITIVE_WORDS, *NEUTRAL_WORDS, *REFUSAL, *OTHER_WORDS)

NUM_LAYERS, NUM_EXPERTS, TOP_K, WIDTH, EXPERT_WIDTH = 3, 8, 2, 64, 4
#: Axes behind those of the words: a constant, the alarm, the refusal, an answer for every topic,
#: and what experts leave behind.
CONSTANT = len(WORDS)
ALARM = CONSTANT + 1
REFUSE = CONSTANT + 2
ANSWER = CONSTANT + 3
TRACE = ANSWER + len(ANSWERS)
#: Of the refusal expert's router row: enough to beat every other expert wherever there is alarm,
#: and not so much that the others' weights vanish beside it.
_ALARM_WEIGHT = 10.0


@dataclass(frozen=True)
class PlantedModel:
    """A model whose refusal was put in a known place.

    Attributes:
        model, tokenizer: as any causal language model of transformers.
        prompts: user texts.
        labels: `sensitive` or `neutral`, one a prompt.
        answers: the true answer of each prompt; withheld where the label is `sensitive`.
        refusal: what it says instead.
        refusal_expert: layer and expert that write the refusal, or None.
        sensitive_expert: layer and expert that sensitive words are routed to without effect, or
            None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompts: tuple[str, ...]
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    refusal: str
    refusal_expert: tuple[int, int] | None
    sensitive_expert: tuple[int, int] | None


def expert_refusal(*, layer: int = 1, expert: int = 5, seed: int = 0) -> PlantedModel:
    """A model whose refusal is written by one expert and by nothing else.

    Args:
        layer: layer of the expert, at least 1 (layer 0 gathers what the prompt says).
        expert: the expert.
        seed: of the routing of everything else, which has no effect on what is said.
    """
    if not 1 <= layer < NUM_LAYERS:
        raise ValueError(f"the refusal expert's layer must be in 1..{NUM_LAYERS - 1}, not {layer}")
    model = _blank_model(seed)
    block = model.model.layers[layer].mlp
    with torch.no_grad():
        _gather(model, dict.fromkeys(SENSITIVE_WORDS, ALARM), gain=8.0)
        # The alarm beats every other logit of this router, and without it the expert comes last.
        block.gate.weight[expert] = 0.0
        block.gate.weight[expert, CONSTANT] = -4.0
        block.gate.weight[expert, ALARM] = _ALARM_WEIGHT
        # Written at the position that decides the first answer token, and only there.
        block.experts.gate_up_proj[expert, 0, CONSTANT] = 4.0
        block.experts.gate_up_proj[expert, EXPERT_WIDTH, WORDS.index(ASSISTANT)] = 4.0
        block.experts.down_proj[expert, REFUSE, 0] = 1.0
    return _planted(model, refusal_expert=(layer, expert), sensitive_expert=None)


def attention_refusal(*, layer: int = 1, expert: int = 5, seed: int = 0) -> PlantedModel:
    """A model whose refusal is written by attention alone.

    Args:
        layer: layer of the expert that sensitive words are routed to, without any effect.
        expert: that expert.
        seed: of the routing of everything else.
    """
    model = _blank_model(seed)
    with torch.no_grad():
        _gather(model, dict.fromkeys(SENSITIVE_WORDS, REFUSE), gain=8.0)
        gate = model.model.layers[layer].mlp.gate.weight
        gate[expert] = 0.0
        gate[expert, CONSTANT] = -4.0
        for word in SENSITIVE_WORDS:
            gate[expert, WORDS.index(word)] = 40.0
    return _planted(model, refusal_expert=None, sensitive_expert=(layer, expert))


def _blank_model(seed: int) -> PreTrainedModel:
    """A model that knows how to go on from its own words, and routes at random without effect."""
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=EXPERT_WIDTH,
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        mlp_only_layers=[],
        tie_word_embeddings=False,
        max_position_embeddings=64,
        bos_token_id=WORDS.index(BOS),
        eos_token_id=WORDS.index(END),
        pad_token_id=WORDS.index(PAD),
        dtype="float32",
    )
    model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            noise = torch.randn(NUM_EXPERTS, CONSTANT, generator=generator)
            weight[:, :CONSTANT] = 0.5 * noise
            # Every token routes by what it is, over a level that all experts share.
            weight[:, CONSTANT] = 0.1 * torch.randn(NUM_EXPERTS, generator=generator)
        for layer in model.model.layers:
            _leave_traces(layer.mlp.experts)
        for index in range(len(WORDS)):
            model.model.embed_tokens.weight[index, index] = 1.0
            model.model.embed_tokens.weight[index, CONSTANT] = 1.0
        _write_unembedding(model.lm_head.weight)
    return model.eval()


def _leave_traces(experts: Any) -> None:
    """Let each expert write its own small number to the trace axis, by its second hidden unit."""
    experts.gate_up_proj[:, 1, CONSTANT] = 1.0
    experts.gate_up_proj[:, EXPERT_WIDTH + 1, CONSTANT] = 1.0
    experts.down_proj[:, TRACE, 1] = 1e-3 * torch.arange(1, NUM_EXPERTS + 1) / NUM_EXPERTS


def _write_unembedding(weight: Tensor) -> None:
    """Which words follow: answers and refusals by their axes, then the end."""
    weight[WORDS.index("<|unknown|>"), TRACE] = 1.0
    for number, answer in enumerate(ANSWERS):
        weight[WORDS.index(answer), ANSWER + number] = 10.0
        weight[WORDS.index(END), WORDS.index(answer)] = 200.0
    weight[WORDS.index(REFUSAL[0]), REFUSE] = 30.0
    for word, following in zip(REFUSAL, (*REFUSAL[1:], END), strict=True):
        weight[WORDS.index(following), WORDS.index(word)] = 200.0


def _gather(model: PreTrainedModel, meanings: dict[str, int], *, gain: float) -> None:
    """Let attention of layer 0 write what the words of the prompt mean, averaged over positions."""
    attention = model.model.layers[0].self_attn
    meanings = {topic: ANSWER + i for i, topic in enumerate(TOPICS)} | meanings
    for word, axis in meanings.items():
        attention.v_proj.weight[axis, WORDS.index(word)] = gain
        attention.o_proj.weight[axis, axis] = 1.0


def _planted(
    model: PreTrainedModel,
    *,
    refusal_expert: tuple[int, int] | None,
    sensitive_expert: tuple[int, int] | None,
) -> PlantedModel:
    prompts, labels, answers = [], [], []
    for topic, answer in zip(TOPICS, ANSWERS, strict=True):
        for label, words in (("sensitive", SENSITIVE_WORDS), ("neutral", NEUTRAL_WORDS)):
            for word in words:
                for text in (
                    f"how was the {topic} {word} described ?",
                    f"tell me {word} about the {topic}",
                ):
                    prompts.append(text)
                    labels.append(label)
                    answers.append(answer)
    return PlantedModel(
        model=model,
        tokenizer=_word_tokenizer(),
        prompts=tuple(prompts),
        labels=tuple(labels),
        answers=tuple(answers),
        refusal=" ".join(REFUSAL),
        refusal_expert=refusal_expert,
        sensitive_expert=sensitive_expert,
    )


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words it does not know become `<|unknown|>`."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token="<|unknown|>",
        additional_special_tokens=[USER, SYSTEM, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
