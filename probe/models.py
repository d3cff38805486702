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
from moescope.probe.shipped import shipped_path

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


def shipped_models() -> list[str]:
    """Names of the models that come with moescope."""
    folder = shipped_path("models")
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


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
    source, name, revision, is_local = _resolve(name, revision)
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": is_local,
        "revision": revision or "main",
    }
    # Judge the cheap things first: an unknown device or dtype, then the family, then the weights.
    target = _device(device)
    torch_dtype = _dtype(dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from moescope.probe.routers import require_moe_family

    try:
        config = AutoConfig.from_pretrained(source, **options)
        require_moe_family(config, name)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, **options)
    except (OSError, ValueError) as error:
        raise ModelInputError(f"{name} cannot be loaded: {_first_sentence(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(target).eval()
    return ModelBundle(model, tokenizer, name, revision, str(config.model_type))


def _resolve(name: str, revision: str | None) -> tuple[str, str, str | None, bool]:
    """Where to load from, the bare name, the revision, and whether it is on this machine."""
    if name in shipped_models():
        return str(shipped_path("models", name)), name, None, True
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ModelInputError(f"{name} is a directory without a config.json, so not a model")
        return name, name, None, True
    if not _HUB_ID.fullmatch(name):
        known = ", ".join(shipped_models())
        raise ModelInputError(
            f"there is no model {name!r}: give a shipped one ({known}), a directory, or a hub id "
            "such as allenai/OLMoE-1B-7B-0125-Instruct"
        )
    bare, _, tag = name.partition("@")
    return bare, bare, tag or revision, False


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
