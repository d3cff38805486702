"""What many tests share: tiny random models of each supported family, and a byte tokenizer."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

#: Real recorded routing and the contract documents lie beside a developer's checkout.
SHARED = Path(__file__).resolve().parents[2] / "shared"

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker() -> None:
    """Several workers share few cores; tiny models are fastest on one."""
    import torch

    torch.set_num_threads(1)


def build_tiny_model(family: str, **changes: Any) -> Any:
    """A random model of a family: 3 layers, 8 experts, top-2, seeded, with routers that differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 16,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 256,
        "eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None,
    }  # fmt: skip
    sizes["num_local_experts" if family == "mixtral" else "num_experts"] = 8
    config = AutoConfig.for_model(family, **(sizes | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Builds tiny models; see `build_tiny_model`."""
    return build_tiny_model


def build_byte_tokenizer() -> Any:
    """One token a byte, five special tokens, a chat template; padding on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left",
        additional_special_tokens=SPECIAL[2:],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """See `build_byte_tokenizer`."""
    return build_byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_bundle() -> Any:
    """A tiny random Qwen3-MoE with the byte tokenizer, as `load_model` returns one."""
    from moescope.probe.models import ModelBundle

    return ModelBundle(
        build_tiny_model("qwen3_moe", norm_topk_prob=True),
        build_byte_tokenizer(), "tiny", None, "qwen3_moe",
    )  # fmt: skip


@pytest.fixture
def shared() -> Path:
    """The folder of real data; tests that need it are skipped where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"real recorded routing is not here ({SHARED})")
    return SHARED
