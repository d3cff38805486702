"""The zoo: every family is found, and every tiny model is what its rows rest on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moescope.probe.errors import ModelInputError
from moescope.probe.zoo import families, tiny_model
from moescope.probe.zoo.recipes import RECIPES
from moescope.probe.zoo.walk import NOT_ROUTED
from moescope.probe.zoo.wholes import WHOLES

pytestmark = pytest.mark.families

ROWS = [row for family in families() for row in family.rows]

#: Routers and experts by class name; Granite Docling's router says how finely an image is read.
CLASSES = re.compile(r"^class \w*(?:Expert|MoE|MOE|Router|TopK|TopkRouter)\w*\(", re.MULTILINE)
NOT_EXPERTS = {"granite_docling"}


def test_every_family_whose_code_names_experts_is_found() -> None:
    import transformers

    models = Path(str(transformers.__file__)).parent / "models"
    named = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if CLASSES.search(path.read_text("utf-8"))
    }
    found = families()
    assert named - NOT_EXPERTS <= {family.name for family in found}
    assert len(named) > 70
    assert [family.name for family in found] == sorted({family.name for family in found})


def test_every_recipe_is_of_an_installed_family_and_the_others_say_why() -> None:
    found = {family.name: family for family in families()}
    assert set(RECIPES) <= set(found) and set(WHOLES) <= set(RECIPES)
    without = {name: family.reason for name, family in found.items() if not family.rows}
    assert without == NOT_ROUTED
    assert all(len(found[name].rows) == 1 + len(found[name].variants) for name in RECIPES)


def test_a_family_without_a_recipe_is_reported_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RECIPES, "mixtral")
    (mixtral,) = [family for family in families() if family.name == "mixtral"]
    assert mixtral.rows == ()
    assert mixtral.reason == "no tiny configuration of it is known yet"
    with pytest.raises(ModelInputError, match="no tiny configuration of the family 'mixtral'"):
        tiny_model("mixtral")


def test_an_unknown_variant_names_those_there_are() -> None:
    with pytest.raises(ModelInputError, match=r"no variant 'x' \(it has: nonorm, 4groups\)"):
        tiny_model("deepseek_v3+x")
    with pytest.raises(ModelInputError, match=r"no variant 'x' \(it has: none\)"):
        tiny_model("olmoe+x")


@pytest.mark.parametrize("row", ROWS)
def test_a_tiny_model_is_tiny_and_runs(row: str) -> None:
    state = torch.random.get_rng_state()
    tiny = tiny_model(row, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is kept"
    assert sum(one.numel() for one in tiny.model.parameters()) < 3_000_000
    assert not tiny.model.training
    assert tiny.inputs["input_ids"].shape == (2, 13)
    with torch.no_grad():
        output = tiny.model(**tiny.inputs)[0]
    assert output.shape[:2] == (2, 13) and bool(torch.isfinite(output).all())
    for name, tensor in [*tiny.model.named_parameters(), *tiny.model.named_buffers()]:
        if name.endswith(("correction_bias", "expert_bias", "balancing_biases", "global_scale")):
            assert tensor.numel() == 1 or tensor.std() > 0.05, f"{name} does not matter"


def test_the_seed_decides() -> None:
    one, again, other = (tiny_model("deepseek_v3", seed=seed) for seed in (1, 1, 2))
    states = [tiny.model.state_dict() for tiny in (one, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert torch.equal(one.inputs["input_ids"], again.inputs["input_ids"])


def test_what_loading_keeps_in_float32_stays_so() -> None:
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16).model
    dtypes = {name: one.dtype for name, one in model.state_dict().items()}
    biases = [name for name in dtypes if name.endswith("e_score_correction_bias")]
    assert biases and all(dtypes[name] == torch.float32 for name in biases)
    assert all(dtypes[name] == torch.bfloat16 for name in dtypes if name not in biases)
