"""`select` against the router modules of transformers themselves, to the bit, in both dtypes.

One router of each distinct form, with 32 experts and 6 per token so that unsorted top-k shows, and
live biases and scales that are not the trivial ones.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moescope.kernels.route import Groups, RoutingRule, select, shared_weights

H, E, K, B, S = 24, 32, 6, 4, 60
T = B * S


@dataclass(frozen=True)
class Case:
    """A router class, its configuration, and the rule that should repeat it."""

    family: str
    router: str
    rule: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    bias: str | None = None
    scale: str | None = None
    num: tuple[int, int] = (E, K)
    args: str | None = None

    def __str__(self) -> str:
        extra = ",".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.family}{' ' if extra else ''}{extra}"


BIAS = "e_score_correction_bias"
GROUPED = {
    "score": "sigmoid", "selection_bias": "score", "epsilon": 1e-20, "renormalize": True,
    "scale": 1.7, "sorted_ids": False,
}  # fmt: skip
TOP2 = Groups(count=4, kept=2, score="top2_sum", fill="-inf")
TOP2_ZERO = replace(TOP2, fill="0")
MAX_ZERO = Groups(count=4, kept=2, score="max", fill="0", masks_weights=True)
SIGMOID = {"score": "sigmoid", "selection_bias": "score", "renormalize": True}
LATE = {"score": "identity", "weights": "softmax_topk", "renormalize": False}

CASES = [
    Case("qwen3_moe", "Qwen3MoeTopKRouter", {"renormalize": True}, {"norm_topk_prob": True}),
    Case("qwen3_moe", "Qwen3MoeTopKRouter", {"renormalize": False}, {"norm_topk_prob": False}),
    Case("mixtral", "MixtralTopKRouter", {"renormalize": True, "weight_dtype": "float32"}),
    Case("jamba", "JambaTopKRouter", {"renormalize": False}),
    Case("hunyuan_v1_moe", "HunYuanMoEV1Gate", {"renormalize": True}),
    Case("flint", "FlintTopKRouter", {"score": "sigmoid", "renormalize": True}),
    Case("afmoe", "AfmoeTokenChoiceRouter", {**GROUPED, "sorted_ids": True}, bias="argument"),
    Case("hy_v3", "HYV3TopKRouter", GROUPED, bias="argument"),
    Case("inkling2", "Inkling2TopKRouter", GROUPED, {"scoring_func": "sigmoid"}, bias=BIAS),
    Case("muse_spark", "MuseSparkTopkRouter", {**GROUPED, "epsilon": 1e-15}, bias=BIAS),
    Case("deepseek_v3", "DeepseekV3TopkRouter", {**GROUPED, "groups": TOP2}, bias=BIAS),
    Case("deepseek_v3", "DeepseekV3TopkRouter",
         {**GROUPED, "groups": TOP2, "renormalize": False}, {"norm_topk_prob": False}, bias=BIAS),
    Case("beam", "BeamTopKRouter",
         {**GROUPED, "groups": TOP2, "scale_in_block": True, "sorted_ids": True}, bias=BIAS),
    Case("axk2", "AXK2TopkRouter", {**GROUPED, "groups": TOP2_ZERO}, bias=BIAS),
    Case("axk2", "AXK2TopkRouter", GROUPED, {"n_group": None}, bias=BIAS),
    Case("mistral4", "Mistral4TopkRouter",
         {"renormalize": True, "epsilon": 1e-20, "scale": 1.7, "sorted_ids": False,
          "groups": TOP2_ZERO, "arithmetic": "native"}),
    Case("mistral_large4", "MistralLarge4TextTopkRouter",
         {"renormalize": True, "epsilon": 1e-20, "scale": 1.7, "sorted_ids": False,
          "groups": TOP2_ZERO}),
    Case("deepseek_v2", "DeepseekV2TopkRouter",
         {"renormalize": False, "scale": 1.7, "sorted_ids": False}, {"topk_method": "greedy"}),
    Case("deepseek_v2", "DeepseekV2TopkRouter",
         {"renormalize": False, "scale": 1.7, "sorted_ids": False, "groups": MAX_ZERO},
         {"topk_method": "group_limited_greedy"}),
    Case("deepseek_v4", "DeepseekV4TopKRouter",
         {**GROUPED, "score": "sqrtsoftplus", "arithmetic": "native"}, bias=BIAS),
    Case("deepseek_v4", "DeepseekV4HashRouter",
         {**GROUPED, "score": "sqrtsoftplus", "arithmetic": "native", "from_table": True,
          "selection_bias": "none"}),
    Case("longcat_flash", "LongcatFlashTopkRouter",
         {"renormalize": False, "selection_bias": "score", "scale": 1.7, "sorted_ids": False,
          "num_zero_experts": 8}, {"n_routed_experts": 24, "zero_expert_num": 8}, bias=BIAS),
    Case("ernie4_5_moe", "Ernie4_5_MoeTopKRouter",
         {"renormalize": True, "selection_bias": "score", "epsilon": 1e-12,
          "epsilon_is_floor": True, "weight_dtype": "hidden"}, bias="moe_statics." + BIAS),
    Case("laguna", "LagunaTopKRouter", {**SIGMOID, "weight_dtype": "hidden"},
         {"moe_router_logit_softcapping": 3.0}, bias=BIAS),
    Case("lfm2_moe", "Lfm2MoeTopKRouter",
         {**SIGMOID, "epsilon": 1e-6, "scale": 1.7, "arithmetic": "native"},
         {"use_expert_bias": True}, bias="argument"),
    Case("lfm2_moe", "Lfm2MoeTopKRouter",
         {"score": "sigmoid", "renormalize": False, "scale": 1.7, "arithmetic": "native"},
         {"use_expert_bias": False, "norm_topk_prob": False}),
    Case("minimax_m2", "MiniMaxM2TopKRouter",
         {**SIGMOID, "sorted_ids": False, "weight_dtype": "float32"}, bias="argument"),
    Case("minimax_m3_vl", "MiniMaxM3VLTopKRouter",
         {**SIGMOID, "sorted_ids": False, "weight_dtype": "float32"}, bias=BIAS),
    Case("kolibri1", "Kolibri1TopKRouter",
         {"score": "identity", "weights": "sigmoid_topk", "renormalize": True,
          "selection_bias": "logit"}, bias=BIAS),
    Case("aria", "AriaTextTopKRouter", {**LATE, "arithmetic": "native"}),
    Case("gpt_oss", "GptOssTopKRouter", {**LATE, "arithmetic": "native"}),
    Case("granitemoe", "GraniteMoeTopKRouter", {**LATE, "weight_dtype": "hidden"}),
    Case("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter",
         {**LATE, "divided_by_top_k": True}),
    Case("cohere2_moe", "Cohere2MoeTopKRouter", LATE, {"expert_selection_fn": "softmax"}),
    Case("cohere2_moe", "Cohere2MoeTopKRouter",
         {"score": "identity", "weights": "sigmoid_topk", "renormalize": True,
          "arithmetic": "native"}, {"expert_selection_fn": "sigmoid"}),
    Case("gemma4", "Gemma4TextRouter",
         {"score": "probabilities", "weights": "scaled_probability", "renormalize": True},
         scale="per_expert_scale"),
    Case("phimoe", "PhimoeTopKRouter",
         {"renormalize": False, "weights": "sparsemixer", "jitter": 0.01, "arithmetic": "native"},
         num=(16, 2)),
]  # fmt: skip


def router_of(case: Case, dtype: torch.dtype) -> Any:
    num_experts, top_k = case.num
    config = SimpleNamespace(**{
        "hidden_size": H, "num_experts": num_experts, "num_local_experts": num_experts,
        "moe_num_experts": num_experts, "n_routed_experts": num_experts,
        "num_experts_per_tok": top_k, "moe_topk": top_k, "top_k_experts": top_k, "n_group": 4,
        "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.7,
        "route_scale": 1.7, "router_scaling_factor": 1.7, "moe_norm_min": 1e-12,
        "scoring_func": "sqrtsoftplus", "vocab_size": 50, "output_multiplier": 0.7,
        "rms_norm_eps": 1e-6, "router_jitter_noise": 0.01, "input_jitter_noise": 0.0,
        "n_shared_experts": 2, "expert_capacity": 5, "router_bias": False,
        "router_ignore_padding_tokens": True, "router_dtype": "float32",
        **case.config,
    })  # fmt: skip
    module = importlib.import_module(f"transformers.models.{case.family}.modeling_{case.family}")
    router: nn.Module = getattr(module, case.router)(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            if not tensor.is_floating_point():
                rows = [torch.randperm(num_experts, generator=generator) for _ in range(50)]
                tensor.copy_(torch.stack(rows)[:, :top_k])
            else:
                size = 0.2 if BIAS in name or tensor.ndim == 1 else 1.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
                if "scale" in name:
                    tensor.add_(1.0)
    router = router.to(dtype).eval()
    for name, tensor in router.named_buffers():
        if BIAS in name:  # transformers keeps these in float32
            tensor.data = tensor.data.float()
    return router


def rule_of(case: Case, dtype: torch.dtype) -> RoutingRule:
    given = dict(case.rule)
    if given.get("weight_dtype") == "hidden":
        given["weight_dtype"] = str(dtype).removeprefix("torch.")
    return RoutingRule(num_experts=case.num[0], top_k=case.num[1], **given)


def attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_repeats_the_router_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    if case.family == "inkling2" and dtype == torch.bfloat16:
        pytest.skip("this router cannot run with bfloat16 weights")
    router = router_of(case, dtype)
    hidden = torch.randn(B, S, H, generator=torch.Generator().manual_seed(7)).to(dtype)
    flat = case.family not in ("afmoe",)
    given: list[Any] = [hidden.view(-1, H) if flat else hidden]
    inputs: dict[str, Any] = {}
    if case.bias == "argument":
        inputs["bias_E"] = torch.randn(E, generator=torch.Generator().manual_seed(8)) * 0.2
        given.append(inputs["bias_E"])
    elif case.bias is not None:
        inputs["bias_E"] = attribute(router, case.bias)
    if case.scale is not None:
        inputs["expert_scale_E"] = attribute(router, case.scale)
    if case.rule.get("from_table"):
        tokens = torch.arange(T) % 50
        given.append(tokens)
        inputs["table_ids_TK"] = router.tid2eid[tokens]
    with torch.no_grad():
        logits, weights, ids = router(*given)
        found_weights, found_ids = select(logits, rule_of(case, dtype), **inputs)
    assert torch.equal(found_ids, ids)
    assert found_weights.dtype == weights.dtype
    assert torch.equal(found_weights, weights)


WRONG = {
    "renormalize": lambda rule: replace(rule, renormalize=not rule.renormalize),
    "scale": lambda rule: replace(rule, scale=rule.scale * 1.01),
    "bias": lambda rule: replace(rule, selection_bias="none"),
    "groups": lambda rule: replace(rule, groups=None),
    "sorted": lambda rule: replace(rule, sorted_ids=True),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_rule_that_differs_in_one_thing_is_seen(wrong: str) -> None:
    case = next(one for one in CASES if one.family == "deepseek_v3")
    router = router_of(case, torch.float32)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits, weights, ids = router(hidden)
    rule = WRONG[wrong](rule_of(case, torch.float32))
    found_weights, found_ids = select(logits, rule, bias_E=attribute(router, BIAS))
    assert not (torch.equal(found_ids, ids) and torch.equal(found_weights, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_inkling_weighs_routed_and_shared_experts_together(dtype: torch.dtype) -> None:
    case = Case("inkling", "InklingTopkRouter", {
        "score": "sigmoid", "weights": "logsigmoid_shared", "selection_bias": "score",
        "renormalize": False, "scale": 1.7, "sorted_ids": False, "weight_dtype": "hidden",
    })  # fmt: skip
    router, rule = router_of(case, dtype), rule_of(case, dtype)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(7)).to(dtype)
    inputs = {
        "shared_logits_TS": (hidden.float() @ router.weight.float().T)[:, -2:],
        "expert_scale_E": router.global_scale.float().expand(E),
    }
    with torch.no_grad():
        logits, weights, ids, gammas = router(hidden)
        inputs["shared_logits_TS"] = torch.nn.functional.linear(
            hidden.float(), router.weight.float()
        )[:, -2:]
        found_weights, found_ids = select(logits, rule, bias_E=attribute(router, BIAS), **inputs)
        found_gammas = shared_weights(logits, found_ids, rule, **inputs)
    assert torch.equal(found_ids, ids)
    assert torch.equal(found_weights, weights) and found_weights.dtype == dtype
    assert torch.equal(found_gammas, gammas)


@pytest.mark.parametrize("order", [None, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dbrx_divides_by_a_norm(order: float | None, dtype: torch.dtype) -> None:
    module = importlib.import_module("transformers.models.dbrx.modeling_dbrx")
    block = SimpleNamespace(top_k=K, moe_normalize_expert_weights=order)
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights, ids = module.DbrxFFN.route_tokens_to_experts(block, logits)
    rule = RoutingRule(
        num_experts=E, top_k=K, renormalize=order is not None, norm_order=order,
        arithmetic="native",
    )  # fmt: skip
    found_weights, found_ids = select(logits, rule)
    assert torch.equal(found_ids, ids) and torch.equal(found_weights, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_llama4_weighs_by_the_sigmoid_of_the_chosen_logits(dtype: torch.dtype) -> None:
    case = Case("llama4", "Llama4Router", {
        "score": "identity", "weights": "sigmoid_all", "renormalize": False,
    })  # fmt: skip
    router = router_of(case, dtype)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(7)).to(dtype)
    with torch.no_grad():
        scores_TE, logits = router(hidden)
    weights, ids = select(logits, rule_of(case, dtype))
    assert torch.equal(torch.zeros_like(scores_TE).scatter(1, ids, weights), scores_TE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_jetmoe_gates_are_the_softmax_of_the_chosen(dtype: torch.dtype) -> None:
    module = importlib.import_module("transformers.models.jetmoe.modeling_jetmoe")
    torch.manual_seed(0)
    router = module.JetMoeTopKGating(H, E, K).to(dtype)
    hidden = torch.randn(T, H).to(dtype)
    with torch.no_grad():
        order, batch, gates, sizes, logits = router(hidden)
    rule = RoutingRule(
        num_experts=E, top_k=K, **LATE, weight_dtype=str(dtype).removeprefix("torch.")
    )
    weights, ids = select(logits, rule)
    assert torch.equal(ids.flatten()[order], torch.arange(E).repeat_interleave(torch.tensor(sizes)))
    assert torch.equal(weights.flatten()[order], gates)
    assert torch.equal(order // K, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_switch_drops_tokens_beyond_an_experts_capacity(dtype: torch.dtype) -> None:
    case = Case("switch_transformers", "SwitchTransformersTop1Router", {
        "renormalize": False, "capacity": 5, "weight_dtype": "hidden",
    }, num=(8, 1))  # fmt: skip
    router = router_of(case, dtype)
    hidden = torch.randn(B, S, H, generator=torch.Generator().manual_seed(7)).to(dtype)
    with torch.no_grad():
        one_hot, probs, logits = router(hidden)
    weights, ids = select(logits.view(-1, 8), rule_of(case, dtype), rows_per_sequence=S)
    served = one_hot.view(-1, 8).sum(-1) > 0
    assert 20 < int(served.sum()) < T - 20
    assert torch.equal(ids[served, 0], one_hot.view(-1, 8).argmax(-1)[served])
    assert torch.equal(weights[served], probs.view(-1, 1)[served])
    assert (weights[~served] == 0).all()
    assert torch.equal(ids[:, 0], logits.view(-1, 8).argmax(-1))  # whom it was meant for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_zaya_skips_with_the_last_class_and_weight_0(dtype: torch.dtype) -> None:
    module = importlib.import_module("transformers.models.zaya.modeling_zaya")
    config = SimpleNamespace(
        hidden_size=H, num_experts=8, num_experts_per_tok=1, router_hidden_size=16,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    router = module.ZayaRouter(config, 0)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.5)
    router = router.to(dtype)
    bias = router.balancing_biases.data = torch.tensor([0.0] * 8 + [0.5])
    with torch.no_grad():
        logits, weights, ids, _ = router(torch.randn(B, S, H).to(dtype))
    rule = RoutingRule(
        num_experts=9, top_k=1, renormalize=False, selection_bias="score", has_skip=True,
        arithmetic="native",
    )  # fmt: skip
    found_weights, found_ids = select(logits, rule, bias_E=bias)
    skipped = weights == 0
    assert 0 < int(skipped.sum()) < T
    assert (ids[skipped] == 0).all()  # as the router says it
    assert torch.equal(found_ids, ids.masked_fill(skipped, 8))
    assert torch.equal(found_weights, weights)


def test_a_missing_input_is_named() -> None:
    logits = torch.zeros(2, 8)
    needs: dict[str, dict[str, Any]] = {
        "bias_E": {"selection_bias": "score"}, "table_ids_TK": {"from_table": True},
        "shared_logits_TS": {"weights": "logsigmoid_shared"}, "rows_per_sequence": {"capacity": 3},
    }  # fmt: skip
    for name, given in needs.items():
        rule = RoutingRule(num_experts=8, top_k=1, renormalize=False, **given)
        with pytest.raises(ValueError, match=name):
            select(logits, rule)
        absent: Tensor | None = None
        with pytest.raises(ValueError, match=name):
            select(logits, rule, bias_E=absent)
