"""The proof on models that are not what they seem: kernels, quantisers, noise, forms that err."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moescope.probe.errors import RecordingError, UnknownRoutingError
from moescope.probe.routers import RouterOutput, RouterSite, find_routers, verify_routers
from moescope.probe.routers.families import FAMILIES
from moescope.probe.routers.forms import TupleForm
from moescope.probe.zoo import TinyModel, tiny_model

pytestmark = pytest.mark.families

NO_INFLUENCE = "masking the most used expert does not change the output"


def verified(tiny: TinyModel) -> list[tuple[bool, str | None]]:
    sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in tiny.model.modules())
    return [(site.info.verified, site.info.reason) for site in sites]


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_each_implementation_of_the_experts_is_named_and_proved(name: str) -> None:
    tiny = tiny_model("olmoe")
    tiny.model.set_experts_implementation(name)
    sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    assert [(site.info.implementation, site.info.verified) for site in sites] == [(name, True)] * 3


def test_somebodys_implementation_that_ignores_the_router_is_named_and_caught() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def first_expert_only(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up = nn.functional.linear(hidden, self.gate_up_proj[0]).chunk(2, dim=-1)
        return nn.functional.linear(self.act_fn(gate) * up, self.down_proj[0])

    ALL_EXPERTS_FUNCTIONS.register("first_expert_only", first_expert_only)
    try:
        tiny = tiny_model("olmoe")
        tiny.model.set_experts_implementation("first_expert_only")
        sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["first_expert_only"]
    assert {site.info.implementation for site in sites} == {"first_expert_only"}
    assert {(site.info.verified, site.info.reason) for site in sites} == {(False, NO_INFLUENCE)}


class FusedBlock(nn.Module):
    """What the `kernels` package puts in a block's place: another class's forward."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 0.5


def test_a_kernel_in_the_blocks_place_is_refused_by_name() -> None:
    tiny = tiny_model("gpt_oss")
    block = tiny.model.model.layers[1].mlp
    block.forward = MethodType(lambda self, hidden: (hidden * 0.5, None), block)
    with pytest.raises(RecordingError, match=r"layer 1 .*router was not called.*in place of the b"):
        verified(tiny)
    block.forward = MethodType(FusedBlock.forward, block)
    (site,) = [site for site in find_routers(tiny.model) if site.info.layer == 1]
    assert site.info.implementation.startswith("kernel in place of the block (")
    assert site.info.implementation.endswith("FusedBlock.forward)")


def test_a_kernel_in_the_routers_place_is_proved_like_any_other() -> None:
    """As the hub's `SoftmaxTopKRouter`: the same results, or another order of experts."""
    tiny = tiny_model("qwen3_5_moe")
    routers = [layer.mlp.gate for layer in tiny.model.model.layers]
    routers[0].forward = MethodType(type(routers[0]).forward, routers[0])

    def backwards(self: nn.Module, hidden: Tensor) -> Any:
        logits, weights, ids = type(self).forward(self, hidden)
        return logits, weights.flip(-1), ids.flip(-1)

    routers[2].forward = MethodType(backwards, routers[2])
    sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    named = ["kernel in place of the router" in site.info.implementation for site in sites]
    assert named == [True, False, True]
    assert [site.info.verified for site in sites] == [True, True, False]
    assert sites[2].info.reason == "the rule selects other experts than the router did"


def test_mxfp4_blocks_that_select_in_a_kernel_are_refused_with_advice() -> None:
    from transformers.integrations.mxfp4 import Mxfp4GptOssMLP

    tiny = tiny_model("gpt_oss")
    block = tiny.model.model.layers[0].mlp
    tiny.model.model.layers[0].mlp = Mxfp4GptOssMLP(block.router, block.experts)
    with pytest.raises(RecordingError, match=r"layer 0 .*Mxfp4GptOssMLP.*dequantize=True"):
        find_routers(tiny.model)


def quantised_experts(experts: nn.Module) -> Any:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    class Fp8(FP8Experts):
        pass

    Fp8.__name__, Fp8.__module__ = FP8Experts.__name__, FP8Experts.__module__
    decorated = use_experts_implementation(Fp8, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    with torch.device("meta"):
        return decorated(experts.config, block_size=(16, 16))


def test_quantised_experts_are_named_and_say_nothing_about_the_weights_dtype() -> None:
    tiny = tiny_model("granitemoe", dtype=torch.bfloat16)
    for layer in tiny.model.model.layers:
        block = layer.block_sparse_moe
        block.experts = quantised_experts(block.experts)
    tiny.model.config.dtype = torch.bfloat16
    sites = find_routers(tiny.model)
    assert {site.info.implementation for site in sites} == {"FP8Experts, grouped_mm"}
    assert {site.info.rule.weight_dtype for site in sites} == {"bfloat16"}
    tiny.model.config.dtype = None
    with pytest.raises(UnknownRoutingError, match="dtype of its hidden states"):
        find_routers(tiny.model)


def test_a_router_that_quantisation_replaced_is_named() -> None:
    tiny = tiny_model("phimoe")
    for layer in tiny.model.model.layers:
        layer.mlp.router = nn.Linear(64, 8, bias=False)
    with pytest.raises(RecordingError, match="may have renamed it"):
        find_routers(tiny.model)
    tiny.model.config.quantization_config = SimpleNamespace(quant_method="bitsandbytes")
    with pytest.raises(RecordingError, match=r"no module of class PhimoeTopKRouter.*quantisation"):
        find_routers(tiny.model)


def noisy(tiny: TinyModel, size: float) -> TinyModel:
    """The same model, but no two forwards of it end alike, as with atomic additions on a GPU."""
    head = tiny.model.get_output_embeddings()
    plain = head.forward
    head.forward = lambda hidden: plain(hidden) + size * torch.rand(head.out_features)
    return tiny


def test_noise_of_the_hardware_is_no_reason_and_no_excuse() -> None:
    tiny = noisy(tiny_model("deepseek_v3"), 1e-6)
    assert verified(tiny) == [(True, None)] * 2
    block = tiny.model.model.layers[2].mlp
    original = block.experts.forward
    block.experts.forward = lambda hidden, ids, weights: original(
        hidden, torch.zeros_like(ids) + torch.arange(2), torch.full_like(weights, 0.5)
    )
    assert verified(tiny) == [(True, None), (False, NO_INFLUENCE)]


def test_a_model_in_training_or_without_numbers_is_not_proved() -> None:
    tiny = tiny_model("mixtral")
    tiny.model.train()
    with pytest.raises(RecordingError, match=r"training mode.*model.eval\(\)"):
        verified(tiny)
    tiny.model.eval()
    with torch.no_grad():
        tiny.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(RecordingError, match="not a number"):
        verified(tiny)


def test_outputs_that_are_infinite_by_design_are_not_held_against_it() -> None:
    tiny = tiny_model("mixtral")
    plain = tiny.model.lm_head.forward
    barred = torch.zeros(128).index_fill(0, torch.arange(8), -torch.inf)
    tiny.model.lm_head.forward = lambda hidden: plain(hidden) + barred
    assert verified(tiny) == [(True, None)] * 3


class RoundedForm(TupleForm):
    """Writes weights that are slightly wrong."""

    def write(self, site: RouterSite, args: Any, output: Any, weights: Tensor, ids: Tensor) -> Any:
        return super().write(site, args, output, weights.half().to(weights.dtype), ids)


class DeafForm(TupleForm):
    """Writes nothing at all."""

    def write(self, site: RouterSite, args: Any, output: Any, weights: Tensor, ids: Tensor) -> Any:
        return output


class TwistedForm(TupleForm):
    """Reads the experts in the wrong order."""

    def read(self, site: RouterSite, args: Any, output: Any) -> RouterOutput:
        found = super().read(site, args, output)
        return found._replace(expert_ids=found.expert_ids.flip(-1))


class BlindForm(TupleForm):
    """Cannot see what arrives at the experts, and writes nothing."""

    write = DeafForm.write

    def arrived(self, site: RouterSite, args: Any, kwargs: Mapping[str, Any]) -> None:
        return None


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (RoundedForm(), "the router's own selection, written, is not what the router returned"),
        (DeafForm(), NO_INFLUENCE),
        (BlindForm(), NO_INFLUENCE),
    ],
)
def test_a_form_that_writes_wrongly_is_caught(
    form: TupleForm, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "mixtral", replace(FAMILIES["mixtral"], form=form))
    assert verified(tiny_model("mixtral")) == [(False, reason)] * 3


def test_a_form_that_reads_wrongly_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mixtral", replace(FAMILIES["mixtral"], form=TwistedForm()))
    with pytest.raises(RecordingError, match=r"layer 0 .*other ids or weights"):
        verified(tiny_model("mixtral"))


def test_experts_that_all_run_have_no_routing_to_change() -> None:
    tiny = tiny_model("mixtral")
    model = tiny.model
    config = model.config.__class__.from_dict(model.config.to_dict() | {"num_experts_per_tok": 8})
    torch.manual_seed(0)
    everything = replace(tiny, model=type(model)(config).eval())
    reason = "all experts are selected for every token, so there is no routing to change"
    assert verified(everything) == [(False, reason)] * 3


@pytest.mark.parametrize(
    "row", ["laguna", "inkling", "gemma4", "afmoe", "ernie4_5_moe", "deepseek_v4+hash", "zaya"]
)
def test_weights_that_are_put_away_between_forwards_are_fetched(row: str) -> None:
    """Offloaded: biases, scales and tables have no data when hooks run, but accelerate has it."""
    accelerate = pytest.importorskip("accelerate")
    tiny = tiny_model(row)
    with torch.no_grad():
        before = [site.bias for site in find_routers(tiny.model)]
        before = [None if bias is None else bias.clone() for bias in before]
    accelerate.cpu_offload(tiny.model, torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in tiny.model.parameters())
    sites = verify_routers(tiny.model, tiny.inputs["input_ids"])
    assert all(site.info.verified for site in sites), [site.info.reason for site in sites]
    for site, bias in zip(sites, before, strict=True):
        assert (site.bias is None) == (bias is None)
        if bias is not None and site.bias is not None:
            assert torch.equal(site.bias, bias)


def test_a_bias_that_is_nowhere_leaves_the_layer_to_be_recorded_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nowhere = torch.empty(8, device="meta")
    spec = replace(FAMILIES["deepseek_v3"], bias=lambda router, block: nowhere)
    monkeypatch.setitem(FAMILIES, "deepseek_v3", spec)
    found = verified(tiny_model("deepseek_v3"))
    assert [is_verified for is_verified, _ in found] == [False, False]
    assert all("selection bias is not in memory" in str(reason) for _, reason in found)
