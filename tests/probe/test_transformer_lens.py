"""`record` on a TransformerBridge, and the example of the documentation."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moescope.probe import record

bridges = pytest.importorskip("transformer_lens.model_bridge.sources.transformers")

INPUTS = torch.arange(2, 26).reshape(2, 12)
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "transformer_lens.md"


@pytest.fixture
def make_bridge(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> Callable[[str], Any]:
    """A bridge around a tiny random model, booted without network."""

    def make(family: str) -> Any:
        model = tiny_model(family)
        model.config.architectures = [type(model).__name__]
        return bridges.boot(
            f"tiny/{family}", hf_model=model, tokenizer=copy.deepcopy(byte_tokenizer), device="cpu"
        )

    return make


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_record_equals_the_bridges_own_cache(
    make_bridge: Callable[[str], Any], family: str
) -> None:
    bridge = make_bridge(family)
    with torch.no_grad():
        _, plain = bridge.run_with_cache(INPUTS)
        with record(bridge) as trace:
            _, cache = bridge.run_with_cache(INPUTS)
            assert our_hooks(bridge)
    assert [info.module for info in trace.layers] == [
        f"model.layers.{layer}.mlp.gate" for layer in range(3)
    ]
    for layer in (0, 1, 2):
        gate = f"blocks.{layer}.mlp.gate"
        assert torch.equal(trace[layer].logits, cache[f"{gate}.hook_out"])
        assert torch.equal(trace[layer].expert_ids, cache[f"{gate}.hook_expert_indices"])
    assert plain.keys() == cache.keys()
    for name in plain:
        assert torch.equal(plain[name], cache[name]), name
    assert not our_hooks(bridge)


def our_hooks(bridge: Any) -> list[Any]:
    """Hooks that moescope has left; a bridge leaves some of its own."""
    found = [
        hook
        for module in bridge.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return [hook for hook in found if str(getattr(hook, "__module__", "")).startswith("moescope")]


def test_what_a_bridges_hook_changes_is_recorded(make_bridge: Callable[[str], Any]) -> None:
    bridge = make_bridge("olmoe")

    def everything_to_five(weights: Tensor, hook: Any) -> Tensor:
        changed = weights.clone()
        changed[:, 5] = 9.0
        return changed

    with torch.no_grad(), record(bridge) as trace:
        bridge.run_with_hooks(
            INPUTS, fwd_hooks=[("blocks.1.mlp.gate.hook_expert_weights", everything_to_five)]
        )
    chosen = trace[1].expert_ids == 5
    assert chosen.any(dim=1).all() and (trace[1].weights[chosen] == 9).all()
    assert not (trace[0].expert_ids == 5).any(dim=1).all()


def test_generation_and_norms_through_a_bridge(make_bridge: Callable[[str], Any]) -> None:
    bridge = make_bridge("olmoe")
    with torch.no_grad(), record(bridge, norms=True) as trace:
        bridge.generate(INPUTS, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert [forward.shapes["model.layers.0.mlp.gate"] for forward in trace.forwards] == [
        (2, 12), (2, 1), (2, 1),
    ]  # fmt: skip
    norms = trace[2].norms
    assert norms is not None and torch.isfinite(norms.residual_change).all()
    assert (norms.output_norm > 0).all()


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), re.S))
    exec(compile(code, str(EXAMPLE), "exec"), {})
    moved = re.search(r"moves the residual stream by ([0-9.]+)", capsys.readouterr().out)
    assert moved is not None and float(moved.group(1)) > 0
