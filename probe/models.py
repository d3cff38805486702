"""Loading a model and its tokenizer by name: a shipped one, a local directory, or a hub id.

Only a hub id that the user typed ever causes a network request. The configuration is read and
judged first, so that a dense model is refused before its weights are loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.probe.errors import ModelInputError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelBundle:
    """A loaded model with its tokenizer.

    Attributes:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer, padding on the left.
        name: as the user gave it, without the revision.
        revision: hub revision, or None.
        family: transformers' `model_type`.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    family: str

    @property
    def device(self) -> Any:
        """Where inputs go."""
        return self.model.device


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelBundle:
    """Load a Mixture-of-Experts model.

    Args:
        name: `demo` or another shipped model, a directory, or a hub id (`org/name[@revision]`).
        device: `auto` takes a GPU where there is one.
        dtype: `auto` takes the checkpoint's.
        revision: hub revision; also after an `@` in the name.
        trust_remote_code: allow code from the model's repository to run.

    Raises:
        ModelInputError: no such model, a dense model, or an unsupported family.
    """
    # The cheap things first: device and dtype, then the name, then the family, then the weights.
    target = _device(device)
    torch_dtype = _dtype(dtype)
    from moescope.probe.demo.models import load_shipped, shipped_models

    if name in shipped_models():
        model, tokenizer = load_shipped(name)
        if torch_dtype != "auto":
            model = model.to(torch_dtype)
    else:
        source = _source(name, revision, shipped_models())
        name, revision = source.name, source.revision
        model, tokenizer = _load(source, torch_dtype, trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(target).eval()
    return ModelBundle(model, tokenizer, name, revision, str(model.config.model_type))


@dataclass(frozen=True)
class _Source:
    """Where a model that is not shipped lies: a directory, or the hub."""

    name: str
    revision: str | None
    is_local: bool


def _source(name: str, revision: str | None, shipped: list[str]) -> _Source:
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ModelInputError(f"{name} is a directory without a config.json, so not a model")
        return _Source(name, None, is_local=True)
    if not _HUB_ID.fullmatch(name):
        raise ModelInputError(
            f"there is no model {name!r}: give a shipped one ({', '.join(shipped)}), a directory, "
            "or a hub id such as allenai/OLMoE-1B-7B-0125-Instruct"
        )
    bare, _, tag = name.partition("@")
    return _Source(bare, tag or revision, is_local=False)


def _load(source: _Source, dtype: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer of a directory or the hub; the family is judged before the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from moescope.probe.routers import require_moe_family

    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": source.is_local,
        "revision": source.revision or "main",
    }
    try:
        config = AutoConfig.from_pretrained(source.name, **options)
        require_moe_family(config, source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.name, **options)
        model = AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ModelInputError(
            f"{source.name} cannot be loaded: {_first_sentence(error)}"
        ) from error
    return model, tokenizer


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelInputError(f"device {device!r} is not there; use auto or cpu") from error
    return device


def _dtype(dtype: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return "auto"
    if dtype not in known:
        raise ModelInputError(f"dtype {dtype!r} is unknown; use auto, {', '.join(known)}")
    return known[dtype]


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
