"""What the tiny model of each family needs beyond the common sizes.

A recipe names the model class and the configuration fields that differ from
`moescope.probe.zoo.sizes.SIZES`. A family that routes in a second way has variants, which change
the recipe of the family. Adding a family is one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

#: Leaves a configuration field at the family's own default.
DEFAULT: Final = object()


@dataclass(frozen=True)
class Recipe:
    """How the tiny model of one family is made.

    Attributes:
        model_class: class in transformers, the family's text model with its head where it has one.
        fields: configuration fields, over the common sizes; `DEFAULT` leaves a field as the
            family has it.
        inputs: what its forward takes: `tokens`; or `encoder_decoder`, tokens for both sides.
        variants: name -> fields that are different in this variant.
    """

    model_class: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    inputs: Literal["tokens", "encoder_decoder"] = "tokens"
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_ALTERNATING = ["linear_attention", "full_attention", "linear_attention"]


_SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
_GROUPED = {"topk_method": "group_limited_greedy"}

RECIPES: Final[dict[str, Recipe]] = {
    "afmoe": Recipe("AfmoeForCausalLM"),
    "aria": Recipe("AriaTextForCausalLM"),
    "axk1": Recipe("AXK1ForCausalLM"),
    "axk2": Recipe(
        "AXK2ForCausalLM", variants={"nogroup": {"n_group": None, "topk_group": None}}
    ),
    "bailing_hybrid": Recipe("BailingHybridForCausalLM", {"layer_types": _ALTERNATING}),
    "beam": Recipe("BeamForCausalLM"),
    "cohere2_moe": Recipe(
        "Cohere2MoeForCausalLM",
        {"logit_scale": 1.0},
        variants={"sigmoid": {"expert_selection_fn": "sigmoid"}},
    ),
    "dbrx": Recipe(
        "DbrxForCausalLM",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
        },
        variants={
            "nonorm": {"ffn_config": {
                "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2,
                "moe_normalize_expert_weights": None,
            }},
            "norm2": {"ffn_config": {
                "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2,
                "moe_normalize_expert_weights": 2.0,
            }},
        },
    ),
    "deepseek_ocr2": Recipe("DeepseekOcr2TextModel", variants={"groups": _GROUPED}),
    "deepseek_v2": Recipe("DeepseekV2ForCausalLM", variants={"groups": _GROUPED}),
    "deepseek_v3": Recipe(
        "DeepseekV3ForCausalLM",
        variants={
            "nonorm": {"norm_topk_prob": False},
            "4groups": {"n_group": 4, "topk_group": 2},
        },
    ),
    "deepseek_v32": Recipe("DeepseekV32ForCausalLM"),
    "deepseek_v4": Recipe(
        "DeepseekV4ForCausalLM",
        {
            "num_key_value_heads": 1, "hc_mult": 2, "hc_sinkhorn_iters": 4,
            "mlp_layer_types": ["moe", "moe", "moe"],
            "layer_types": [
                "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
            ],
            "compress_rates": {
                "compressed_sparse_attention": 2, "heavily_compressed_attention": 4,
            },
        },
        variants={"hash": {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}},
    ),
    "diffusion_gemma": Recipe(
        "DiffusionGemmaEncoderTextModel",
        {"global_head_dim": 16, "layer_types": _SLIDING_THEN_FULL},
    ),
    "doge": Recipe(
        "DogeForCausalLM", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}
    ),
    "dots1": Recipe("Dots1ForCausalLM"),
    "dots3_note": Recipe(
        "Dots3NoteForCausalLM",
        {"layer_types": ["indexed_attention", "indexed_attention", "indexed_attention"]},
    ),
    "ernie4_5_moe": Recipe("Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Recipe(
        "Ernie4_5_VLMoeTextModel",
        {
            "moe_intermediate_size": [32, 16],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2],
            },
        },
        variants={"vision": {}},
    ),
    "exaone_moe": Recipe("ExaoneMoeForCausalLM"),
    "flex_olmo": Recipe("FlexOlmoForCausalLM"),
    "flint": Recipe("FlintForCausalLM"),
    "gemma4": Recipe(
        "Gemma4ForCausalLM",
        {
            "enable_moe_block": True, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128, "layer_types": _SLIDING_THEN_FULL,
        },
    ),
    "glm4_moe": Recipe("Glm4MoeForCausalLM"),
    "glm4_moe_lite": Recipe("Glm4MoeLiteForCausalLM"),
    "glm4v_moe": Recipe(
        "Glm4vMoeTextModel",
        {"rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        }},
    ),
    "glm5_next": Recipe(
        "Glm5NextTextModel",
        {
            "qk_rope_head_dim": 0, "head_dim": DEFAULT, "index_kpool": 2, "hc_mult": 2,
            "hc_sinkhorn_iters": 4,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
    ),
    "glm_moe_dsa": Recipe("GlmMoeDsaForCausalLM"),
    "gpt_oss": Recipe("GptOssForCausalLM", {"max_position_embeddings": DEFAULT}),
    "granitemoe": Recipe("GraniteMoeForCausalLM"),
    "granitemoe_swa": Recipe("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Recipe("GraniteMoeHybridForCausalLM", {"layer_types": _ALTERNATING}),
    "granitemoeshared": Recipe("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Recipe("HunYuanMoEV1ForCausalLM"),
    "hy_v3": Recipe("HYV3ForCausalLM"),
    "hy_v4": Recipe("HYV4ForCausalLM", {"hc_mult": 2}),
    "inkling": Recipe("InklingForCausalLM", {"logits_mup_width_multiplier": 1.0}),
    "inkling2": Recipe("Inkling2ForCausalLM"),
    "jamba": Recipe(
        "JambaForCausalLM",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "jetmoe": Recipe("JetMoeForCausalLM", {"kv_channels": 16}),
    "kimi_linear": Recipe("KimiLinearForCausalLM", {"layer_types": _ALTERNATING}),
    "kolibri1": Recipe("Kolibri1ForCausalLM"),
    "laguna": Recipe(
        "LagunaForCausalLM",
        variants={"softcap": {"moe_router_logit_softcapping": 2.0}},
    ),
    "lfm2_moe": Recipe(
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention", "conv"]},
        variants={"nobias": {"use_expert_bias": False, "norm_topk_prob": False}},
    ),
    "llama4": Recipe(
        "Llama4ForCausalLM",
        {"moe_layers": [1, 2], "num_experts_per_tok": 1, "attention_chunk_size": 8},
        variants={"top2": {"num_experts_per_tok": 2}},
    ),
    "longcat_flash": Recipe(
        "LongcatFlashForCausalLM",
        {"num_layers": 2, "moe_topk": 3, "zero_expert_num": 4, "head_dim": 8},
    ),
    "mellum": Recipe("MellumForCausalLM"),
    "mimo_v2_flash": Recipe("MiMoV2FlashForCausalLM"),
    "minimax": Recipe("MiniMaxForCausalLM", {"block_size": 8}),
    "minimax_m2": Recipe("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Recipe(
        "MiniMaxM3VLForCausalLM",
        {
            "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
            "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 8,
        },
    ),
    "mistral4": Recipe("Mistral4ForCausalLM", {"max_position_embeddings": DEFAULT}),
    "mistral_large4": Recipe(
        "MistralLarge4TextModel", {"max_position_embeddings": DEFAULT}
    ),
    "mixtral": Recipe("MixtralForCausalLM"),
    "muse_spark": Recipe("MuseSparkTextModel", {"moe_hidden_size": 32}),
    "nemotron_h": Recipe(
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "num_hidden_layers": 4, "n_groups": 2,
        },
        variants={"latent": {"moe_latent_size": 16}},
    ),
    "nllb_moe": Recipe(
        "NllbMoeForConditionalGeneration",
        {
            "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_sparse_step": 2, "decoder_sparse_step": 2, "init_std": 0.2,
        },
        inputs="encoder_decoder",
    ),
    "olmoe": Recipe("OlmoeForCausalLM"),
    "openai_privacy_filter": Recipe(
        "OpenAIPrivacyFilterForTokenClassification", {"max_position_embeddings": DEFAULT}
    ),
    "phimoe": Recipe("PhimoeForCausalLM"),
    "qwen2_moe": Recipe("Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Recipe("Qwen3_5MoeForCausalLM", {"layer_types": _ALTERNATING}),
    "qwen3_moe": Recipe("Qwen3MoeForCausalLM", variants={"nonorm": {"norm_topk_prob": False}}),
    "qwen3_next": Recipe("Qwen3NextForCausalLM", {"layer_types": _ALTERNATING}),
    "qwen3_omni_moe": Recipe("Qwen3OmniMoeThinkerTextModel"),
    "qwen3_vl_moe": Recipe(
        "Qwen3VLMoeTextModel",
    ),
    "qwen4_exp": Recipe(
        "Qwen4ExpForCausalLM",
        {
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
            "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
        },
    ),
    "solar_open": Recipe("SolarOpenForCausalLM"),
    "step3p7": Recipe(
        "Step3p7TextModel",
    ),
    "switch_transformers": Recipe(
        "SwitchTransformersForConditionalGeneration",
        {
            "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1, "d_ff": 32, "d_kv": 16,
        },
        inputs="encoder_decoder",
        variants={"capacity3": {"expert_capacity": 3}},
    ),
    "unlimited_ocr": Recipe("UnlimitedOcrTextModel", variants={"groups": _GROUPED}),
    "zaya": Recipe("ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 32}),
}  # fmt: skip
