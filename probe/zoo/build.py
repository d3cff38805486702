"""Building the tiny random model of a family, with inputs for its forward.

The weights are random and large enough that routing differs between tokens. What a new model has
as zeros or ones but a trained one has not (selection biases, AFMoE's routers, scales per expert,
the id tables of hash layers) is set to random values that matter, so that a reader which ignores
them is caught.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from moescope.probe.errors import ModelInputError
from moescope.probe.zoo.recipes import DEFAULT, RECIPES, Recipe
from moescope.probe.zoo.sizes import FIRST_PLAIN_TOKEN, SIZES, TOP_K, VOCABULARY
from moescope.probe.zoo.wholes import WHOLES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Rows and tokens per row of the inputs.
INPUT_SHAPE = (2, 13)

#: The variant of a family's whole model, with encoders of other modalities.
_WHOLE = "whole"
#: Rows of the variants whose inputs say of each token whether it is of another modality, and how.
_MODALITY_INPUTS = {"ernie4_5_vl_moe+vision": "moe_mm_token_type_ids"}

#: Ends of the names of tensors that are added to scores or logits for selection.
_BIASES = ("correction_bias", "expert_bias", "balancing_biases")
#: Ends of the names of tensors that multiply routing weights.
_SCALES = ("per_expert_scale", "global_scale")
#: Ends of the names of router weights that a new model has as zeros (AFMoE).
_ROUTERS = (".router.gate.weight",)
#: Ends of the names of tables from token id to expert ids, int64[vocabulary, K].
_TABLES = ("tid2eid",)


@dataclass(frozen=True)
class TinyModel:
    """A tiny random model and inputs for it.

    Attributes:
        family: the family's name, with `+variant` for a variant.
        model: the model, in evaluation mode, on the CPU.
        inputs: keyword arguments of its forward: int64[2, 13] token ids, for encoder-decoder
            models on both sides.
    """

    family: str
    model: nn.Module
    inputs: dict[str, Tensor]


def variants_of(name: str) -> tuple[str, ...]:
    """The second ways in which a family's model can be built, `whole` the model around it."""
    return (*RECIPES[name].variants, *((_WHOLE,) if name in WHOLES else ()))


def recipe_of(family: str) -> Recipe:
    """The recipe of a family or of `family+variant`, as one without variants.

    Raises:
        ModelInputError: no recipe, or no such variant.
    """
    name, _, variant = family.partition("+")
    recipe = RECIPES.get(name)
    if recipe is None:
        raise ModelInputError(f"there is no tiny configuration of the family {name!r}")
    if variant and variant not in variants_of(name):
        known = ", ".join(variants_of(name)) or "none"
        raise ModelInputError(f"family {name!r} has no variant {variant!r} (it has: {known})")
    changes = recipe.variants.get(variant, {})
    return replace(recipe, fields={**recipe.fields, **changes}, variants={})


def tiny_model(family: str, *, dtype: torch.dtype | None = None, seed: int = 0) -> TinyModel:
    """Build the tiny random model of a family.

    Args:
        family: a family with a recipe, or `family+variant`.
        dtype: of the weights, float32 without it; tensors that the family keeps in float32 stay so,
            as in a model that was loaded.
        seed: of weights and inputs; the same seed gives the same model.

    Raises:
        ModelInputError: there is no recipe for it.
    """
    import torch

    recipe = recipe_of(family)
    model_class, config = _class_and_config(family, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=dtype or torch.float32).eval()
        _keep_in_float32(model, dtype)
        _set_what_training_sets(model)
        inputs = _inputs(family, recipe)
    return TinyModel(family, model, inputs)


def _inputs(family: str, recipe: Recipe) -> dict[str, Tensor]:
    """Random inputs of the model's forward."""
    import torch

    names = ("input_ids", "decoder_input_ids")[: 2 if recipe.inputs == "encoder_decoder" else 1]
    inputs = {name: torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, INPUT_SHAPE) for name in names}
    if family in _MODALITY_INPUTS:
        inputs[_MODALITY_INPUTS[family]] = torch.randint(0, 2, INPUT_SHAPE)
    return inputs


def _class_and_config(family: str, recipe: Recipe) -> tuple[Any, Any]:
    name, _, variant = family.partition("+")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model_class = getattr(module, recipe.model_class)
    config = _config(model_class.config_class, recipe.fields)
    if variant != _WHOLE:
        return model_class, config
    whole = WHOLES[name]
    model_class = getattr(module, whole.model_class)
    parts = model_class.config_class.sub_configs
    fields_of_parts = {
        part: _config(parts[part], changes) if changes is not None else None
        for part, changes in whole.parts.items()
    }
    return model_class, model_class.config_class(
        text_config=config, **fields_of_parts, **copy.deepcopy(dict(whole.fields))
    )


def _config(config_class: Any, changes: Mapping[str, Any]) -> Any:
    """The tiny configuration: common sizes of the fields it has, then what the recipe changes."""
    known = {one.name for one in fields(config_class)}
    values = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has one key per query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= changes
    return config_class(
        **{name: copy.deepcopy(value) for name, value in values.items() if value is not DEFAULT}
    )


def _keep_in_float32(model: Any, dtype: torch.dtype | None) -> None:
    """Give the tensors that loading keeps in float32 that dtype, as `from_pretrained` does."""
    import torch

    names = getattr(model, "_keep_in_fp32_modules_strict", None)
    if dtype not in (torch.float16, torch.bfloat16) or not names:
        return
    kept = re.compile("|".join(name.replace("*", ".*") for name in names))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if kept.search(name) and tensor.is_floating_point():
            tensor.data = tensor.data.float()


def _set_what_training_sets(model: nn.Module) -> None:
    """Random selection biases, router weights, scales per expert and id tables, in place."""
    import torch

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(_BIASES):
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
            elif name.endswith(_ROUTERS) and not tensor.any():
                tensor.copy_(torch.randn(tensor.shape) * 0.2)
            elif name.endswith(_SCALES):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            elif name.endswith(_TABLES):
                order = torch.rand(tensor.shape[0], SIZES["n_routed_experts"]).argsort(dim=1)
                tensor.copy_(order[:, :TOP_K])
