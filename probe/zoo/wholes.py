"""Whole models around the text parts of the zoo: those of families that also see or hear.

The inputs of the zoo are text, so the encoders do not run; what is shown is that routers are found
and read inside the larger model, whose text configuration is one level down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class Whole:
    """The whole model of a family; its text part is the family's recipe.

    Attributes:
        model_class: class in transformers.
        parts: sub-configuration -> its fields, over the common sizes; None for a part left out.
        fields: other fields of the whole configuration.
    """

    model_class: str
    parts: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


#: A vision encoder of one layer for images of 2 x 2 patches.
_VISION: Final = {"depth": 1, "num_hidden_layers": 1, "image_size": 28, "out_hidden_size": 64,
                  "num_position_embeddings": 16}  # fmt: skip

#: Placeholders of images and the like, below the ids that the zoo's inputs use.
_PLACEHOLDERS: Final = {"image_token_id": 3, "video_token_id": 4}

WHOLES: Final[dict[str, Whole]] = {
    "ernie4_5_vl_moe": Whole(
        "Ernie4_5_VLMoeForConditionalGeneration", {"vision_config": _VISION}, _PLACEHOLDERS
    ),
    "gemma4": Whole(
        "Gemma4ForConditionalGeneration", {"vision_config": None, "audio_config": None}
    ),
    "glm4v_moe": Whole(
        "Glm4vMoeForConditionalGeneration", {"vision_config": _VISION}, _PLACEHOLDERS
    ),
    "glm5_next": Whole(
        "Glm5NextForConditionalGeneration",
        {"vision_config": {**_VISION, "projection_intermediate_size": 32}},
        _PLACEHOLDERS,
    ),
    "inkling": Whole(
        "InklingForConditionalGeneration",
        {"vision_config": _VISION, "audio_config": {}},
        {"image_token_id": 3, "audio_token_id": 4},
    ),
    "llama4": Whole(
        "Llama4ForConditionalGeneration",
        {"vision_config": {
            **_VISION, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32,
        }},
        {"image_token_index": 3},
    ),
    "minimax_m3_vl": Whole(
        "MiniMaxM3SparseForConditionalGeneration",
        {"vision_config": _VISION},
        {"projector_hidden_size": 64, "image_token_index": 3, "video_token_index": 4},
    ),
    "qwen3_5_moe": Whole(
        "Qwen3_5MoeForConditionalGeneration", {"vision_config": _VISION}, _PLACEHOLDERS
    ),
    "qwen3_omni_moe": Whole(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "vision_config": {**_VISION, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
                "downsample_hidden_size": 8, "output_dim": 64, "num_mel_bins": 16,
            },
        },
        {**_PLACEHOLDERS, "audio_token_id": 3, "vision_start_token_id": 1},
    ),
    "qwen3_vl_moe": Whole(
        "Qwen3VLMoeForConditionalGeneration",
        {"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}},
        _PLACEHOLDERS,
    ),
    "qwen4_exp": Whole(
        "Qwen4ExpForConditionalGeneration", {"vision_config": _VISION}, _PLACEHOLDERS
    ),
    "step3p7": Whole(
        "Step3p7ForConditionalGeneration",
        {"vision_config": {**_VISION, "mlp_ratio": 1.0, "max_position_embeddings": 16}},
        {"image_token_id": 3},
    ),
}  # fmt: skip
