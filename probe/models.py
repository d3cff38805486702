"""Loading a model and its tokenizer by name: a shipped one, a local directory, or a hub id.

Only a hub id that the user typed ever causes a network request, and code from a model's repository
runs only when that is asked for. The configuration is read and judged first: a dense model, or one
that does not fit into memory, is refused before its weights are loaded.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.probe.errors import ModelInputError

if TYPE_CHECKING:
    from moescope.probe.memory import MemoryEstimate

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

#: Where each module of a model goes: accelerate's strategies by name, or module name -> device.
DeviceMap = str | Mapping[str, int | str]


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
        """Where inputs go: where the input embeddings are, or are brought to be used."""
        if not hasattr(self.model, "hf_device_map"):
            return self.model.device
        embeddings = self.model.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None)
        brought_to = getattr(hook, "execution_device", None)
        return embeddings.weight.device if brought_to is None else _torch_device(brought_to)


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelBundle:
    """Load a Mixture-of-Experts model.

    A vision-language checkpoint is loaded as the class that generates text from it.

    Args:
        name: `demo` or another shipped model, a directory, or a hub id (`org/name[@revision]`).
        device: `auto` takes a GPU where there is one.
        dtype: `auto` takes the checkpoint's.
        device_map: spread the model over several devices: `auto`, `balanced`, `sequential`, or a
            device for each module; then `device` must be `auto`.
        revision: hub revision; also after an `@` in the name.
        trust_remote_code: allow code from the model's repository to run.

    Raises:
        ModelInputError: no such model, a dense model, an unsupported family, or one that does not
            fit into the memory that is free.
    """
    # The cheap things first: device and dtype, then the name, then the family, then the weights.
    target = _device(device)
    if device_map is not None and device != "auto":
        raise ModelInputError("give a device or a device map, not both")
    torch_dtype = _dtype(dtype)
    from moescope.probe.demo.models import load_shipped, shipped_models

    if name in shipped_models():
        if device_map is not None:
            raise ModelInputError(f"{name} is small and shipped: it needs no device map")
        model, tokenizer = load_shipped(name)
        if torch_dtype != "auto":
            model = model.to(torch_dtype)
    else:
        source = _source(name, revision, shipped_models())
        name, revision = source.name, source.revision
        model, tokenizer = _load(
            source, torch_dtype, trust_remote_code, target=target, device_map=device_map
        )
    if device_map is None:
        model = model.to(target)
    return ModelBundle(
        model.eval(), _padding_left(tokenizer), name, revision, str(model.config.model_type)
    )


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a model without the model, padding on the left.

    Args:
        name: as for `load_model`.
        revision: as for `load_model`.
        trust_remote_code: as for `load_model`.

    Raises:
        ModelInputError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    from moescope.probe.demo.models import shipped_folder, shipped_models

    if name in shipped_models():
        source = _Source(str(shipped_folder(name)), None, is_local=True)
    else:
        source = _source(name, revision, shipped_models())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, **_options(source, trust_remote_code)
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(source.name, error) from error
    return _padding_left(tokenizer)


def _padding_left(tokenizer: Any) -> Any:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def estimate_memory(
    name: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MemoryEstimate:
    """What a model will need, from its configuration alone.

    Args:
        name: as for `load_model`.
        dtype: as for `load_model`.
        revision: as for `load_model`.
        trust_remote_code: as for `load_model`.

    Raises:
        ModelInputError: no such model, a dense model, or an unsupported family.
    """
    from moescope.probe.demo.models import shipped_folder, shipped_models

    torch_dtype = _dtype(dtype)
    if name in shipped_models():
        source = _Source(str(shipped_folder(name)), None, is_local=True)
    else:
        source = _source(name, revision, shipped_models())
    options = _options(source, trust_remote_code)
    return _estimate(source, _config(source, options), torch_dtype, options)


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


def _options(source: _Source, trust_remote_code: bool) -> dict[str, Any]:
    """What every `from_pretrained` is told."""
    return {
        "trust_remote_code": trust_remote_code,
        "local_files_only": source.is_local,
        "revision": source.revision or "main",
    }


def _load(
    source: _Source,
    dtype: Any,
    trust_remote_code: bool,
    *,
    target: str,
    device_map: DeviceMap | None,
) -> tuple[Any, Any]:
    """Model and tokenizer of a directory or the hub; family and memory are judged first."""
    from transformers import AutoTokenizer

    options = _options(source, trust_remote_code)
    config = _config(source, options)
    needed = _estimate(source, config, dtype, options)
    _require_fit(source.name, needed, "all" if device_map is not None else target)
    placement: dict[str, Any] = {}
    if device_map is not None:  # what does not fit is kept on disk, as long as the model lives
        offloaded = tempfile.TemporaryDirectory(prefix="moescope-offload-")
        placement = {"device_map": device_map, "offload_folder": offloaded.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **options)
        model = _text_class(config, source.name, options).from_pretrained(
            source.name, dtype=dtype, **placement, **options
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(source.name, error) from error
    if device_map is not None:
        weakref.finalize(model, offloaded.cleanup)
    return model, tokenizer


def _config(source: _Source, options: Mapping[str, Any]) -> Any:
    """The configuration, of a family that has routers.

    Raises:
        ModelInputError: it cannot be read, or is that of a dense or unsupported model.
    """
    from transformers import AutoConfig

    from moescope.probe.routers import require_moe_family

    try:
        config = AutoConfig.from_pretrained(source.name, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(source.name, error) from error
    require_moe_family(config, source.name)
    return config


def _text_class(config: Any, name: str, options: Mapping[str, Any]) -> Any:
    """The class that generates text from this checkpoint, or an Auto class that knows it.

    The class that the checkpoint names comes first: of a vision-language model the Auto class for
    text would load the text half alone, or nothing.
    """
    import transformers

    has_own_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if options["trust_remote_code"] and has_own_code:
        return transformers.AutoModelForCausalLM
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if found is not None and found.can_generate():
            return found
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSeq2SeqLM,
    ):
        if type(config) in auto._model_mapping:
            return auto
    raise ModelInputError(
        f"{name} (family {config.model_type!r}) has no class in transformers that generates text"
    )


def _estimate(
    source: _Source, config: Any, dtype: Any, options: Mapping[str, Any]
) -> MemoryEstimate:
    """What the model needs, from a copy of it without memory."""
    import torch

    from moescope.probe.memory import estimate, stored_size

    loaded_as = _text_class(config, source.name, options)
    config = type(config).from_dict(config.to_dict())  # building may change it
    config.dtype = _checkpoint_dtype(config) if dtype == "auto" else dtype
    quantized = getattr(config, "quantization_config", None) is not None
    with torch.device("meta"):
        if hasattr(loaded_as, "_from_config"):
            model = loaded_as._from_config(config)
        else:
            model = loaded_as.from_config(config, trust_remote_code=options["trust_remote_code"])
    stored = stored_size(Path(source.name)) if quantized and source.is_local else None
    return estimate(model.eval(), stored_bytes=stored or None)


def _checkpoint_dtype(config: Any) -> Any:
    """The dtype that the checkpoint says it has; float32 where it says none."""
    import torch

    text = config.get_text_config()
    found = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def _require_fit(name: str, needed: MemoryEstimate, where: str) -> None:
    """Refuse what cannot fit, before its weights are read."""
    from moescope.probe.memory import as_gb, free_memory

    free = free_memory(where)
    if free is None or needed.parameter_bytes <= free:
        return
    place = "all devices together have" if where == "all" else f"{where} has"
    raise ModelInputError(
        f"{name} needs {as_gb(needed.parameter_bytes)} for its {needed.parameters:,} parameters in "
        f"{needed.dtype}, and {place} {as_gb(free)} free; use a smaller dtype, spread it with a "
        "device map, or take a machine with more memory"
    )


def _cannot_load(name: str, error: Exception) -> ModelInputError:
    if "trust_remote_code" in str(error):
        return ModelInputError(
            f"{name} brings code of its own that would have to run; allow it with "
            "--trust-remote-code if you trust its authors"
        )
    return ModelInputError(f"{name} cannot be loaded: {_first_sentence(error)}")


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelInputError(f"device {device!r} is not there; use auto or cpu") from error
    return device


def _torch_device(device: Any) -> Any:
    import torch

    return torch.device(device)


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
