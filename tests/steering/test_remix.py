"""Re-mixing: neighbours and scores by hand, where it acts, its references, its refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from moescope.probe import Store, record, trace_prompts
from moescope.probe.errors import InputError, MoescopeError, PlanError, RunError
from moescope.probe.generation import pad_left
from moescope.probe.prompts import Prompt
from moescope.probe.rendering import render_prompt
from moescope.probe.trace import TraceOptions
from moescope.probe.zoo import tiny_model as tiny_of_zoo
from moescope.steering.remix import Remix, remix, remixed_scores
from moescope.steering.remix_store import (
    References,
    mean_input_embedding,
    neighbours,
    references_from_run,
    references_of,
)

PROMPTS = [
    Prompt(prompt_id=at, text=text, set_name="typed", key=f"k{at}")
    for at, text in enumerate(("Where is the ring?", "Hello", "What happened in 1868?"))
]
TEXT_PROMPT = [Prompt(prompt_id=9, text="Where is the king?", set_name="typed")]


def vectors(*rows: list[float]) -> torch.Tensor:
    return functional.normalize(torch.tensor(rows), dim=1)


def of_model(model: Any, num: int = 3, seed: int = 0, **changes: Any) -> References:
    """Random references that fit a tiny model of three layers and eight experts."""
    made = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {
        "keys": tuple(f"r{at}" for at in range(num)),
        "embeddings": functional.normalize(torch.rand(num, 4, generator=made), dim=1),
        "scores": {at: torch.randn(num, 8, generator=made).softmax(-1) for at in range(3)},
        "embed": lambda text: torch.arange(1.0, 5.0) + len(text),
    }
    del model
    return References(**(fields | changes))


@pytest.fixture(scope="module")
def olmoe(tiny_model: Any) -> Any:
    return tiny_model("olmoe", eos_token_id=None)


# Neighbours


def test_similarities_weight_the_nearest_by_hand() -> None:
    stored = vectors([1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [-1.0, 0.0])
    weights, ids = neighbours(
        vectors([1.0, 0.0]), stored, num_neighbours=2, kernel="similarity", bandwidth=0.5
    )
    assert ids.tolist() == [[0, 2]]  # cosines 1, 0, 0.6, -1
    assert torch.allclose(weights, torch.tensor([[1 / 1.6, 0.6 / 1.6]]))
    weights, ids = neighbours(
        vectors([1.0, 0.0]), stored, num_neighbours=4, kernel="similarity", bandwidth=0.5
    )
    assert ids.tolist() == [[0, 2, 1, 3]]
    assert torch.allclose(weights, torch.tensor([[1 / 1.6, 0.6 / 1.6, 0.0, 0.0]]))


def test_a_gaussian_weights_by_the_squared_distance() -> None:
    stored = vectors([0.0, 1.0], [3.0, 4.0])
    weights, ids = neighbours(
        vectors([1.0, 0.0]), stored, num_neighbours=2, kernel="gaussian", bandwidth=0.7
    )
    near, far = math.exp(-0.8 / 0.98), math.exp(-2.0 / 0.98)  # d^2 = 2 - 2 cos; 2 h^2 = 0.98
    assert ids.tolist() == [[1, 0]]
    assert torch.allclose(weights, torch.tensor([[near, far]]) / (near + far))


@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(["similarity", "gaussian"]))
def test_weights_are_shares_and_fall_with_the_distance(num: int, seed: int, kernel: Any) -> None:
    made = torch.Generator().manual_seed(seed)
    stored = functional.normalize(torch.rand(6, 3, generator=made) + 0.01, dim=1)
    queries = functional.normalize(torch.rand(4, 3, generator=made) + 0.01, dim=1)
    weights, ids = neighbours(queries, stored, num_neighbours=num, kernel=kernel, bandwidth=0.3)
    assert torch.allclose(weights.sum(1), torch.ones(4))
    assert (weights[:, 1:] <= weights[:, :-1]).all()
    left_out = torch.ones(4, 6, dtype=torch.bool).scatter(1, ids, False)
    cosine = queries @ stored.T
    assert (cosine.masked_fill(~left_out, -2).amax(1) <= cosine.gather(1, ids)[:, -1]).all()


def test_neighbours_that_cannot_be_had_are_refused() -> None:
    stored, opposite = vectors([1.0, 0.0]), vectors([-1.0, 0.0])
    with pytest.raises(InputError, match="2 neighbours"):
        neighbours(stored, stored, num_neighbours=2, kernel="similarity", bandwidth=1.0)
    with pytest.raises(InputError, match="bandwidth"):
        neighbours(stored, stored, num_neighbours=1, kernel="gaussian", bandwidth=0.0)
    with pytest.raises(InputError, match="resembles no reference"):
        neighbours(opposite, stored, num_neighbours=1, kernel="similarity", bandwidth=1.0)
    weights, _ = neighbours(opposite, stored, num_neighbours=1, kernel="gaussian", bandwidth=0.01)
    assert weights.tolist() == [[1.0]]


# Scores


def test_scores_by_hand() -> None:
    own = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    near = torch.tensor([[0.0, 0.2, 0.0, 0.8]])
    assert torch.equal(remixed_scores(own, near), near)
    half = remixed_scores(own, near, mix=0.5)
    assert torch.allclose(half, torch.tensor([[0.2, 0.25, 0.1, 0.45]]))
    core = remixed_scores(own, near, mix=0.5, core_experts=2)
    assert torch.allclose(core, torch.tensor([[0.2, 0.25, 0.2, 0.1]]))


# Where it acts


def test_only_the_last_prompt_token_of_the_last_layers_is_remixed(olmoe: Any) -> None:
    batch = pad_left([[7, 91, 33, 120], [201, 14]], 257)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    references = of_model(olmoe)
    settings = Remix(num_layers=1, core_experts=None)
    expected = references.neighbour_scores(["a", "bb"], [2])[2]
    with torch.no_grad(), record(olmoe) as plain:
        olmoe(**inputs)
    with torch.no_grad(), record(olmoe) as trace, remix(olmoe, references, ["a", "bb"], settings):
        olmoe(**inputs)
    for layer in (0, 1):
        assert torch.equal(trace[layer].weights, plain[layer].weights)
    last = torch.tensor([False, False, False, True] * 2)
    assert torch.equal(trace[2].weights[~last], plain[2].weights[~last])
    assert torch.equal(trace[2].expert_ids[~last], plain[2].expert_ids[~last])
    best = expected.topk(2, dim=-1)
    assert torch.equal(trace[2].expert_ids[last], best.indices)
    assert torch.allclose(trace[2].weights[last], best.values)  # OLMoE: not renormalized


def test_gpt_oss_gets_what_its_softmax_over_the_chosen_would_give() -> None:
    tiny = tiny_of_zoo("gpt_oss")
    with torch.no_grad(), record(tiny.model) as plain:
        tiny.model(**tiny.inputs)
    info = plain.layers[-1]
    scores = torch.rand(1, info.num_experts).softmax(-1)
    references = of_model(
        tiny.model, num=1, scores={one.layer: scores for one in plain.layers}
    )  # fmt: skip
    settings = Remix(num_neighbours=1, layers=(info.layer,))
    num = len(tiny.inputs["input_ids"])
    remixing = remix(tiny.model, references, ["a"] * num, settings)
    with torch.no_grad(), record(tiny.model) as trace, remixing:
        tiny.model(**tiny.inputs)
    best = scores[0].log().topk(info.top_k)
    assert trace[info.layer].expert_ids[-1].tolist() == best.indices.tolist()
    assert torch.allclose(trace[info.layer].weights[-1], best.values.softmax(-1))


def test_samples_of_one_prompt_share_its_text(olmoe: Any) -> None:
    inputs = {"input_ids": torch.tensor([[7, 91], [33, 120]])}
    with remix(olmoe, of_model(olmoe), ["a", "bb"]) as report:
        olmoe.generate(
            **inputs, attention_mask=torch.ones(2, 2), do_sample=True, max_new_tokens=3,
            num_return_sequences=2, pad_token_id=257,
        )  # fmt: skip
    # 3 layers, 4 sequences: the last prompt token, and the two generated ones that are read.
    assert [row.requested for row in report.rows] == [4, 4, 4, 8, 8, 8]
    assert report.share == 1.0


def test_nothing_is_left_behind_also_on_failure(olmoe: Any) -> None:
    def hooks() -> list[Any]:
        return [[*one._forward_hooks, *one._forward_pre_hooks] for one in olmoe.modules()]

    before, ids = hooks(), torch.tensor([[7, 91], [33, 120]])
    with torch.no_grad():
        plain = olmoe(input_ids=ids).logits
        remixing = remix(olmoe, of_model(olmoe), ["a", "b", "c"])
        with pytest.raises(MoescopeError, match="3 texts, and the number of seq"), remixing:
            olmoe(input_ids=ids)
        assert hooks() == before
        assert torch.equal(olmoe(input_ids=ids).logits, plain)


# References


def test_references_are_the_last_prompt_tokens_scores(tiny_bundle: Any) -> None:
    found = references_of(tiny_bundle, PROMPTS)
    assert found.keys == ("k0", "k1", "k2")
    ids = torch.tensor([render_prompt(tiny_bundle.tokenizer, PROMPTS[1]).token_ids])
    with torch.no_grad(), record(tiny_bundle.model) as trace:
        tiny_bundle.model(input_ids=ids)
    for layer in (0, 1, 2):
        assert torch.allclose(found.scores[layer][1], trace[layer].logits[-1].softmax(-1))
    weight = tiny_bundle.model.get_input_embeddings().weight
    mean = weight[torch.tensor(tiny_bundle.tokenizer("Hello")["input_ids"])].mean(0)
    assert torch.allclose(found.embeddings[1], functional.normalize(mean, dim=0))
    assert found.without(["k1"]).keys == ("k0", "k2")
    assert torch.equal(found.without(["k1"]).scores[2], found.scores[2][[0, 2]])


def test_a_run_gives_the_same_references(tiny_bundle: Any, tmp_path: Path) -> None:
    options = TraceOptions(level="probs", max_new_tokens=2)
    trace_prompts(tiny_bundle, PROMPTS, tmp_path / "s.duckdb", "base", options)
    store = Store(tmp_path / "s.duckdb")
    outcomes = store.query("SELECT outcome FROM prompts ORDER BY prompt_id")["outcome"].tolist()
    embed = mean_input_embedding(tiny_bundle)
    found = references_from_run(store, "base", embed, outcomes=sorted(set(outcomes)))
    direct = references_of(tiny_bundle, PROMPTS)
    assert found.keys == direct.keys
    assert torch.allclose(found.embeddings, direct.embeddings)
    for layer in (0, 1, 2):
        assert torch.allclose(found.scores[layer], direct.scores[layer], atol=1e-5)
    assert "correct" not in outcomes
    with pytest.raises(RunError, match="ended correct"):
        references_from_run(store, "base", embed)
    with remix(tiny_bundle.model, found, ["Where is the king?"]) as report:
        ids = render_prompt(tiny_bundle.tokenizer, TEXT_PROMPT[0]).token_ids
        tiny_bundle.model(input_ids=torch.tensor([ids]))
    assert report.share == 1.0


# Refusals


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for wrong in (
        {"mix": 0.0}, {"mix": 1.2}, {"num_neighbours": 0}, {"num_layers": 0}, {"layers": ()},
        {"core_experts": 0}, {"kernel": "cubic"},
    ):  # fmt: skip
        with pytest.raises(PlanError):
            Remix(**wrong)


def test_references_and_models_that_do_not_fit_are_refused(olmoe: Any, tiny_bundle: Any) -> None:
    def refused(references: References, settings: Remix | None = None) -> str:
        with (
            pytest.raises((PlanError, InputError)) as error,
            remix(olmoe, references, ["a"], settings),
        ):
            pass
        return str(error.value)

    fitting = of_model(olmoe)
    assert "layer 7 has no" in refused(fitting, Remix(layers=(7,)))
    assert "no scores of this layer" in refused(of_model(olmoe, scores={0: torch.rand(3, 8)}))
    assert "another model" in refused(
        of_model(olmoe, scores={at: torch.rand(3, 6) for at in range(3)})
    )
    assert "4 neighbours" in refused(fitting, Remix(num_neighbours=4))
    assert "zero or not a number" in refused(of_model(olmoe, embed=lambda _: torch.zeros(4)))
    assert "dimensions" in refused(of_model(olmoe, embed=lambda _: torch.ones(3)))
    assert "one vector" in refused(of_model(olmoe, embed=lambda _: torch.ones(1, 4)))
    with pytest.raises(InputError, match="no reference prompt"):
        references_of(tiny_bundle, [])
    with pytest.raises(InputError, match="no reference is left"):
        fitting.without(fitting.keys)
    with pytest.raises(InputError, match="has no token"):
        mean_input_embedding(tiny_bundle)("")


@pytest.mark.parametrize("family", ["deepseek_v3", "phimoe", "doge"])
def test_routers_without_a_softmax_to_replace_are_refused(family: str) -> None:
    tiny = tiny_of_zoo(family)
    remixing = remix(tiny.model, of_model(tiny.model), ["a"])
    with pytest.raises(PlanError, match=r"re-mixed|recorded but not steered"), remixing:
        pass
