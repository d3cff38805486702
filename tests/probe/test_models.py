"""Loading: what is refused before weights are read, device maps, memory, classes that generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moescope.probe import load_model, record
from moescope.probe.errors import ModelInputError
from moescope.probe.memory import free_memory
from moescope.probe.models import estimate_memory
from moescope.probe.zoo import tiny_model as zoo_model

INPUTS = torch.arange(2, 26).reshape(2, 12)


@pytest.fixture
def save(tmp_path: Path, byte_tokenizer: Any) -> Callable[[Any], Path]:
    """Writes a model and the byte tokenizer as a plain directory."""

    def write(model: Any, **changes: Any) -> Path:
        model.save_pretrained(tmp_path / "model")
        byte_tokenizer.save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return tmp_path / "model"

    return write


def test_dtype_and_revision_are_taken(tiny_model: Callable[..., Any], save: Any) -> None:
    folder = save(tiny_model("olmoe"))
    bundle = load_model(str(folder), dtype="bfloat16", device="cpu")
    assert bundle.model.dtype == torch.bfloat16 and bundle.device == torch.device("cpu")
    with pytest.raises(ModelInputError, match="dtype 'int3' is unknown"):
        load_model(str(folder), dtype="int3")
    with pytest.raises(ModelInputError, match="a device or a device map, not both"):
        load_model(str(folder), device="cpu", device_map="auto")


def test_a_device_map_spreads_the_model_and_records_the_same(
    tiny_model: Callable[..., Any], save: Any
) -> None:
    """The last layer lies on disk and is brought in for each forward."""
    model = tiny_model("olmoe")
    folder = save(model)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
             "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
             "model.layers.2": "disk"}  # fmt: skip
    bundle = load_model(str(folder), device_map=parts)
    assert bundle.model.hf_device_map == parts
    assert bundle.model.model.layers[2].mlp.gate.weight.device.type == "meta"
    with record(model, norms=True) as whole, torch.no_grad():
        model(input_ids=INPUTS)
    with record(bundle.model, norms=True) as spread, torch.no_grad():
        bundle.model(input_ids=INPUTS.to(bundle.device))
    for layer in (0, 1, 2):
        assert torch.equal(whole[layer].expert_ids, spread[layer].expert_ids)
        assert torch.equal(whole[layer].weights, spread[layer].weights)
        one, other = whole[layer].norms, spread[layer].norms
        assert one is not None and other is not None
        assert torch.equal(one.output_norm, other.output_norm)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "jamba"])
def test_the_estimate_is_what_the_loaded_model_has(family: str, save: Any) -> None:
    model: Any = zoo_model(family).model
    folder = save(model)
    needed = estimate_memory(str(folder))
    assert needed.parameters == sum(parameter.numel() for parameter in model.parameters())
    held = [*model.parameters(), *model.buffers()]
    assert needed.parameter_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert needed.cache_bytes_per_token == (cache_size(model, 48) - cache_size(model, 16)) / 32
    assert needed.active_parameters is not None
    assert 0 < needed.active_parameters < needed.parameters
    halved = estimate_memory(str(folder), dtype="bfloat16")
    assert halved.parameter_bytes < needed.parameter_bytes
    assert any(f"{needed.parameters:,} parameters" in line for line in needed.lines())


def cache_size(model: Any, length: int) -> int:
    """Bytes of the cache of a real forward."""
    with torch.no_grad():
        cache = model(input_ids=torch.arange(2, 2 + length)[None], use_cache=True).past_key_values
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor)
    )


def test_active_parameters_leave_the_idle_experts_out(
    tiny_model: Callable[..., Any], save: Any
) -> None:
    model = tiny_model("olmoe")
    needed = estimate_memory(str(save(model)))
    experts = sum(
        parameter.numel()
        for layer in model.model.layers
        for parameter in layer.mlp.experts.parameters()
    )
    assert needed.active_parameters == needed.parameters - experts * 6 // 8
    assert needed.trace_bytes_per_token == 3 * 2 * 6


def test_what_cannot_fit_is_refused_before_its_weights_are_read(
    tiny_model: Callable[..., Any], save: Any
) -> None:
    free = free_memory("cpu")
    assert free is not None and free > 0
    folder = save(tiny_model("olmoe"), hidden_size=16384, intermediate_size=16384,
                  num_experts=512, num_hidden_layers=128)  # fmt: skip
    (folder / "model.safetensors").unlink()
    assert estimate_memory(str(folder)).parameter_bytes > 1e14
    with pytest.raises(ModelInputError, match=r"needs [0-9,.]+ GB for its .* cpu has .* GB free"):
        load_model(str(folder), device="cpu")


def test_code_of_the_repository_runs_only_when_asked_for(
    tiny_model: Callable[..., Any], save: Any
) -> None:
    folder = save(
        tiny_model("olmoe"), model_type="mine_moe", auto_map={"AutoConfig": "code.MineConfig"}
    )
    (folder / "code.py").write_text(
        "from pathlib import Path\nfrom transformers import OlmoeConfig\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "class MineConfig(OlmoeConfig):\n    model_type = 'mine_moe'\n"
    )
    with pytest.raises(ModelInputError, match="allow it with --trust-remote-code"):
        load_model(str(folder), device="cpu")
    assert not (folder / "ran").exists()


def test_a_vision_language_checkpoint_loads_the_class_that_generates(save: Any) -> None:
    tiny = zoo_model("qwen3_vl_moe+whole")
    assert type(tiny.model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    bundle = load_model(str(save(tiny.model)), device="cpu")
    assert type(bundle.model) is type(tiny.model)
    ids = torch.arange(5, 15)[None]
    with record(bundle.model) as trace, torch.no_grad():
        out = bundle.model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2,
                                    do_sample=False)  # fmt: skip
    assert out.shape == (1, 12)
    assert all(len(trace[info.layer].expert_ids) == 11 for info in trace.layers)


def test_doctor_says_the_memory_before_loading(tiny_model: Callable[..., Any], save: Any) -> None:
    from typer.testing import CliRunner

    from moescope.app.cli import app

    folder = save(tiny_model("olmoe"))
    (folder / "model.safetensors").unlink()
    result = CliRunner().invoke(app, ["doctor", str(folder), "--device", "cpu"])
    assert result.exit_code != 0
    assert "are active per token" in result.output and "a trace at level topk" in result.output
