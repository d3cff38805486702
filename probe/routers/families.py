"""The supported model families: one entry each.

An entry says which class the routers are, how they hand over their decision (a form) and how their
rule is read. A family that is not here is refused by name: routing is never guessed. Other packages
add families by an entry point, see `moescope.probe.routers.registry`.

Source: transformers 5.23, `models/<family>/modeling_<family>.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moescope.probe.routers import sigmoid_rules, softmax_rules
from moescope.probe.routers.forms import (
    AtLeastTwoForm,
    ScaledProbabilityForm,
    SharedGammasForm,
    SkipClassForm,
    TableForm,
    TupleForm,
)
from moescope.probe.routers.odd_forms import (
    BlockSelectionForm,
    DenseScoreForm,
    DenseWeightsForm,
    DispatchForm,
    OneHotForm,
    ProductKeyForm,
)
from moescope.probe.routers.reading import live_tensor
from moescope.probe.routers.spec import RouterSpec

_TUPLE = TupleForm()

_Bias = Callable[[nn.Module, nn.Module], Tensor | None]


def _correction(router: nn.Module, block: nn.Module) -> Tensor | None:
    """`e_score_correction_bias` of the router, where most families have their bias."""
    del block
    return live_tensor(router, "e_score_correction_bias")


def _block_correction(router: nn.Module, block: nn.Module) -> Tensor | None:
    """`e_score_correction_bias` of the block, which hands it to the router."""
    del router
    return live_tensor(block, "e_score_correction_bias")


def _expert_bias(router: nn.Module, block: nn.Module) -> Tensor | None:
    """`expert_bias` of the block, which hands it to the router."""
    del router
    return live_tensor(block, "expert_bias")


def _statics(router: nn.Module, block: nn.Module) -> Tensor | None:
    """Ernie's `moe_statics`, [1, E]."""
    del block
    found = live_tensor(getattr(router, "moe_statics", None), "e_score_correction_bias")
    return None if found is None else found.reshape(-1)


def _balancing(router: nn.Module, block: nn.Module) -> Tensor | None:
    """Zaya's `balancing_biases`."""
    del block
    return live_tensor(router, "balancing_biases")


def encoder_or_mlp(name: str) -> str:
    """`encoder` for the routers of an encoder, else `mlp`."""
    return "encoder" if "encoder" in name.split(".") else "mlp"


def attention_or_mlp(name: str) -> str:
    """`attention` for experts in attention (JetMoE's MoA), else `mlp`."""
    return "attention" if "self_attention" in name.split(".") else "mlp"


def _only_text(name: str) -> bool:
    """Ernie VL: `text_moe`, not `vision_moe`."""
    return "text_moe" in name.split(".")


def _has_experts(config: Any) -> bool:
    """Granite with shared experts: without a number of local experts its layers are dense."""
    return getattr(config, "num_local_experts", 0) > 0


def _enables_moe(config: Any) -> bool:
    """Gemma 4: `enable_moe_block`."""
    return bool(getattr(config, "enable_moe_block", False))


def _is_moe(config: Any) -> bool:
    """Doge: `is_moe`."""
    return bool(getattr(config, "is_moe", False))


def _spec(family: str, router_class: str, read_rule: Any, **more: Any) -> RouterSpec:
    fields: dict[str, Any] = {"form": _TUPLE, **more}
    return RouterSpec(family=family, router_class=router_class, read_rule=read_rule, **fields)


_SHARED: dict[str, Any] = {"shared_name": "shared_experts", "shared_count": "n_shared_experts"}
_NUM_SHARED: dict[str, Any] = {
    "shared_name": "shared_experts",
    "shared_count": "num_shared_experts",
}
_ONE_SHARED: dict[str, Any] = {"shared_name": "shared_expert"}
_BESIDE: dict[str, Any] = {
    "shared_name": "shared_mlp", "shared_beside": True, "is_routed": _has_experts,
}  # fmt: skip

_SOFTMAX = [
    _spec("flex_olmo", "FlexOlmoTopKRouter", softmax_rules.optionally_normalized),
    _spec("mellum", "MellumTopKRouter", softmax_rules.optionally_normalized),
    _spec("olmoe", "OlmoeTopKRouter", softmax_rules.optionally_normalized),
    _spec("qwen2_moe", "Qwen2MoeTopKRouter", softmax_rules.optionally_normalized, **_ONE_SHARED),
    _spec("qwen3_moe", "Qwen3MoeTopKRouter", softmax_rules.optionally_normalized),
    _spec("qwen3_next", "Qwen3NextTopKRouter", softmax_rules.optionally_normalized, **_ONE_SHARED),
    _spec(
        "qwen3_omni_moe", "Qwen3OmniMoeThinkerTextTopKRouter", softmax_rules.optionally_normalized
    ),
    _spec(
        "qwen4_exp", "Qwen4ExpTextTopKRouter", softmax_rules.optionally_normalized, **_ONE_SHARED
    ),
    _spec("qwen3_5_moe", "Qwen3_5MoeTopKRouter", softmax_rules.always_normalized, **_ONE_SHARED),
    _spec("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", softmax_rules.always_normalized),
    _spec(
        "hunyuan_v1_moe", "HunYuanMoEV1Gate", softmax_rules.always_normalized,
        shared_name="shared_mlp",
    ),
    _spec("mixtral", "MixtralTopKRouter", softmax_rules.normalized_in_float32),
    _spec("minimax", "MiniMaxTopKRouter", softmax_rules.normalized_in_float32),
    _spec("jamba", "JambaTopKRouter", softmax_rules.never_normalized),
    _spec("deepseek_v2", "DeepseekV2TopkRouter", softmax_rules.greedy_or_grouped, **_SHARED),
    _spec(
        "deepseek_ocr2", "DeepseekOcr2TextTopkRouter", softmax_rules.greedy_or_grouped, **_SHARED
    ),
    _spec(
        "unlimited_ocr", "UnlimitedOcrTextTopkRouter", softmax_rules.greedy_or_grouped, **_SHARED
    ),
    _spec("mistral4", "Mistral4TopkRouter", softmax_rules.mistral4, **_SHARED),
    _spec("mistral_large4", "MistralLarge4TextTopkRouter", softmax_rules.mistral_large4, **_SHARED),
    _spec(
        "longcat_flash", "LongcatFlashTopkRouter", softmax_rules.longcat, bias=_correction,
        form=AtLeastTwoForm(),
    ),
    _spec(
        "ernie4_5_moe", "Ernie4_5_MoeTopKRouter", softmax_rules.ernie, bias=_statics,
        shared_name="shared_experts", shared_count="moe_num_shared_experts",
    ),
    _spec(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter", softmax_rules.ernie, bias=_statics,
        shared_name="shared_experts", shared_count="moe_num_shared_experts", shared_beside=True,
        covers=_only_text,
    ),
    _spec("phimoe", "PhimoeTopKRouter", softmax_rules.phimoe),
    _spec("zaya", "ZayaRouter", softmax_rules.zaya, bias=_balancing, form=SkipClassForm()),
    _spec(
        "gemma4", "Gemma4TextRouter", softmax_rules.gemma4, form=ScaledProbabilityForm(),
        is_routed=_enables_moe,
    ),
    _spec(
        "diffusion_gemma", "DiffusionGemmaTextRouter", softmax_rules.gemma4,
        form=ScaledProbabilityForm(), kind=encoder_or_mlp,
    ),
    _spec("dbrx", "DbrxRouter", softmax_rules.dbrx, form=BlockSelectionForm()),
    _spec(
        "switch_transformers", "SwitchTransformersTop1Router", softmax_rules.switch,
        form=OneHotForm(), kind=encoder_or_mlp,
    ),
    _spec(
        "nllb_moe", "NllbMoeTop2Router", softmax_rules.nllb, form=DenseWeightsForm(),
        kind=encoder_or_mlp,
        record_only=(
            "the experts of this version of transformers ignore which expert was chosen: whatever "
            "the router says, only the first two ever run"
        ),
    ),
]  # fmt: skip

_OF_THE_CHOSEN = [
    _spec(
        "aria", "AriaTextTopKRouter", softmax_rules.of_the_chosen, shared_name="shared_experts",
        shared_count="moe_num_shared_experts",
    ),
    _spec("gpt_oss", "GptOssTopKRouter", softmax_rules.of_the_chosen),
    _spec("granitemoe", "GraniteMoeTopKRouter", softmax_rules.of_the_chosen_in_float32),
    _spec(
        "granitemoe_swa", "GraniteMoeSWATopKRouter", softmax_rules.of_the_chosen_in_float32,
        **_BESIDE,
    ),
    _spec(
        "granitemoehybrid", "GraniteMoeHybridTopKRouter", softmax_rules.of_the_chosen_in_float32,
        **_BESIDE,
    ),
    _spec(
        "granitemoeshared", "GraniteMoeSharedTopKRouter", softmax_rules.of_the_chosen_in_float32,
        **_BESIDE,
    ),
    _spec(
        "openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter", softmax_rules.privacy_filter
    ),
    _spec("cohere2_moe", "Cohere2MoeTopKRouter", softmax_rules.cohere2, **_NUM_SHARED),
    _spec(
        "jetmoe", "JetMoeTopKGating", softmax_rules.of_the_chosen_in_float32, form=DispatchForm(),
        experts_name="input_linear", more_experts=("output_linear",), kind=attention_or_mlp,
    ),
    _spec(
        "llama4", "Llama4Router", sigmoid_rules.llama4, form=DenseScoreForm(), **_ONE_SHARED
    ),
    _spec("kolibri1", "Kolibri1TopKRouter", sigmoid_rules.kolibri, bias=_correction,
          shared_name="shared_experts"),
]  # fmt: skip

_LIKE_DEEPSEEK_V3 = [
    _spec(family, router_class, sigmoid_rules.deepseek_v3, bias=_correction, **shared)
    for family, router_class, shared in (
        ("axk1", "AXK1TopkRouter", _SHARED),
        ("bailing_hybrid", "BailingHybridTopkRouter", _SHARED),
        ("deepseek_v3", "DeepseekV3TopkRouter", _SHARED),
        ("deepseek_v32", "DeepseekV32TopkRouter", _SHARED),
        ("dots1", "Dots1TopkRouter", _SHARED),
        ("dots3_note", "Dots3NoteTextTopkRouter", _SHARED),
        ("exaone_moe", "ExaoneMoeTopkRouter", _NUM_SHARED),
        ("glm4_moe", "Glm4MoeTopkRouter", _SHARED),
        ("glm4_moe_lite", "Glm4MoeLiteTopkRouter", _SHARED),
        ("glm4v_moe", "Glm4vMoeTextTopkRouter", _SHARED),
        ("glm5_next", "Glm5NextTextTopkRouter", _SHARED),
        ("glm_moe_dsa", "GlmMoeDsaTopkRouter", _SHARED),
        ("hy_v4", "HYV4TopkRouter", _SHARED),
        ("kimi_linear", "KimiLinearTopkRouter", _SHARED),
        ("mimo_v2_flash", "MiMoV2FlashTopkRouter", {}),
        ("nemotron_h", "NemotronHTopkRouter", _SHARED),
        ("solar_open", "SolarOpenTopkRouter", _SHARED),
    )
]

_SIGMOID = [
    _spec("axk2", "AXK2TopkRouter", sigmoid_rules.axk2, bias=_correction, **_SHARED),
    _spec("beam", "BeamTopKRouter", sigmoid_rules.beam, bias=_correction),
    _spec(
        "afmoe", "AfmoeTokenChoiceRouter", sigmoid_rules.afmoe, bias=_expert_bias, **_NUM_SHARED
    ),
    _spec("hy_v3", "HYV3TopKRouter", sigmoid_rules.hy_v3, bias=_block_correction, **_NUM_SHARED),
    _spec(
        "deepseek_v4", "DeepseekV4TopKRouter", sigmoid_rules.scored_by_name, bias=_correction,
        variants=(
            _spec(
                "deepseek_v4", "DeepseekV4HashRouter", sigmoid_rules.from_table, form=TableForm(),
                **_SHARED,
            ),
        ),
        **_SHARED,
    ),
    _spec("inkling2", "Inkling2TopKRouter", sigmoid_rules.scored_by_name, bias=_correction),
    _spec(
        "inkling", "InklingTopkRouter", sigmoid_rules.inkling, bias=_correction,
        form=SharedGammasForm(), **_SHARED,
    ),
    _spec("muse_spark", "MuseSparkTopkRouter", sigmoid_rules.muse_spark, bias=_correction),
    _spec("minimax_m2", "MiniMaxM2TopKRouter", sigmoid_rules.minimax_m2, bias=_block_correction),
    _spec(
        "minimax_m3_vl", "MiniMaxM3VLTopKRouter", sigmoid_rules.scaled_in_block, bias=_correction,
        **_SHARED,
    ),
    _spec(
        "step3p7", "Step3p7TopKRouter", sigmoid_rules.scaled_in_block, bias=_correction,
        shared_name="shared_experts",
    ),
    _spec(
        "laguna", "LagunaTopKRouter", sigmoid_rules.laguna, bias=_correction,
        shared_name="shared_experts",
    ),
    _spec("lfm2_moe", "Lfm2MoeTopKRouter", sigmoid_rules.lfm2, bias=_expert_bias),
    _spec("flint", "FlintTopKRouter", sigmoid_rules.flint, **_ONE_SHARED),
]  # fmt: skip

_DOGE = _spec(
    "doge", "Linear", softmax_rules.doge, form=ProductKeyForm(), experts_name="down_embed",
    more_experts=("up_embed",),
    covers=lambda name: name.endswith(".router_gate"), is_routed=_is_moe,
    record_only=(
        "selection by product keys and the experts are one block, so nothing between them can be "
        "replaced"
    ),
)  # fmt: skip

FAMILIES: dict[str, RouterSpec] = {
    spec.family: spec
    for spec in sorted(
        [*_SOFTMAX, *_OF_THE_CHOSEN, *_LIKE_DEEPSEEK_V3, *_SIGMOID, _DOGE],
        key=lambda spec: spec.family,
    )
}
