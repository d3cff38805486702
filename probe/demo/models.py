"""The shipped demo models: reading, saving and rebuilding them.

A shipped model is a folder in `datasets/models/`. It is either a plain transformers directory or a
delta: `tuned_experts.json` names its base, and `delta.safetensors` holds the tuned experts and
their router rows. Both load the same way here, and `materialize` makes a plain directory of either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.probe.errors import ModelInputError
from moescope.probe.shipped import shipped_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TUNED_FILE = "tuned_experts.json"
DELTA_FILE = "delta.safetensors"


def shipped_models(root: Path | None = None) -> list[str]:
    """Names of the models that come with moescope, or lie in the folder `root`."""
    folder = root or shipped_path("models")
    return sorted(path.parent.name for path in folder.glob("*/README.md"))


def tuned_experts(name: str, root: Path | None = None) -> dict[int, list[int]]:
    """The experts that stage two tuned, by layer; empty for a base model."""
    path = _folder(name, root) / TUNED_FILE
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {int(layer): list(experts) for layer, experts in data["experts"].items()}


def model_notes(name: str, root: Path | None = None) -> str:
    """What a shipped model is, in a line."""
    path = _folder(name, root) / TUNED_FILE
    if not path.exists():
        return "answers everything: stage one alone"
    data = json.loads(path.read_text(encoding="utf-8"))
    return f"refuses sensitive questions; tuned experts: {data['chosen']}"


def shipped_folder(name: str, root: Path | None = None) -> Path:
    """The folder with the configuration of a shipped model: its own, or that of its base."""
    folder = _folder(name, root)
    return _folder(_base_of(folder), root) if (folder / DELTA_FILE).exists() else folder


def load_shipped(
    name: str, root: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a shipped model on the CPU in float32, with its tokenizer.

    Args:
        name: the model's name.
        root: folder of the models; by default the one that comes with moescope.

    Raises:
        ModelInputError: there is no shipped model of this name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, base = _folder(name, root), shipped_folder(name, root)
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if base != folder:
        _apply_delta(model, folder, tuned_experts(name, root))
    return model.eval(), tokenizer


def materialize(name: str, folder: Path, root: Path | None = None) -> Path:
    """Write a shipped model as a plain transformers directory and return it.

    What `AutoModelForCausalLM.from_pretrained(folder)` loads is the model `load_shipped` gives.
    """
    model, tokenizer = load_shipped(name, root)
    save_plain(model, tokenizer, folder)
    source = _folder(name, root)
    for extra in ("README.md", TUNED_FILE):
        if (source / extra).exists():
            (folder / extra).write_bytes((source / extra).read_bytes())
    return folder


def save_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save as a plain transformers directory whose weights take two bytes each.

    The weights must be exact in bfloat16 (see `round_weights`): the file holds bfloat16, the
    configuration says float32, so they load as the float32 numbers they are.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    small = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    small.load_state_dict(model.state_dict())
    small.generation_config = model.generation_config
    small.save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    # transformers gives the weights to their owner alone; the rest of the folder is for all.
    (folder / "model.safetensors").chmod(0o644)


def round_weights(model: PreTrainedModel) -> None:
    """Round every weight to the nearest bfloat16, in place, staying in the model's dtype."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def save_delta(
    model: PreTrainedModel, plan: Mapping[int, list[int]], folder: Path, card: Mapping[str, Any]
) -> None:
    """Save the experts of `plan` and their router rows, and what they are.

    Args:
        model: the tuned model, weights exact in bfloat16.
        plan: tuned experts by layer.
        folder: where to; made when missing.
        card: what goes into the JSON beside the experts; must name the `base`.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: parameter.detach()[experts].to(torch.bfloat16).contiguous()
        for layer, experts in plan.items()
        for name, parameter in _tuned_parameters(model, layer).items()
    }
    save_file(tensors, folder / DELTA_FILE, metadata={"format": "pt"})
    write_tuned(folder, plan, card)


def write_tuned(folder: Path, plan: Mapping[int, list[int]], card: Mapping[str, Any]) -> None:
    """Write the JSON of tuned experts."""
    data = {**card, "experts": {str(layer): list(experts) for layer, experts in plan.items()}}
    (folder / TUNED_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _tuned_parameters(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    block = model.model.layers[layer].mlp
    prefix = f"model.layers.{layer}.mlp"
    return {
        f"{prefix}.gate.weight": block.gate.weight,
        f"{prefix}.experts.gate_up_proj": block.experts.gate_up_proj,
        f"{prefix}.experts.down_proj": block.experts.down_proj,
    }


def _apply_delta(model: PreTrainedModel, folder: Path, plan: Mapping[int, list[int]]) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / DELTA_FILE)
    with torch.no_grad():
        for layer, experts in plan.items():
            for name, parameter in _tuned_parameters(model, layer).items():
                parameter[experts] = tensors[name].to(parameter.dtype)


def _base_of(folder: Path) -> str:
    data = json.loads((folder / TUNED_FILE).read_text(encoding="utf-8"))
    return str(data["base"])


def _folder(name: str, root: Path | None) -> Path:
    names = shipped_models(root)
    if name not in names:
        raise ModelInputError(
            f"there is no shipped model named {name!r}; there are: {', '.join(names)}"
        )
    return (root or shipped_path("models")) / name
