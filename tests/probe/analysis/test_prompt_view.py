"""The routing of one prompt and of one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from moescope.probe.analysis import Filters, prompt_routing, token_routing
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """Two tokens in two layers; at position 1 of layer 5 everything was dropped (weight 0)."""
    tokens = [
        lab.Token(slots={2: [(1, 0.2), (3, 0.6)], 5: [(0, 0.5), (2, 0.5)]}, is_special=True),
        lab.Token(
            slots={2: [(0, 0.9), (1, 0.1)], 5: [(3, 0.0), (1, 0.0)]},
            phase="generated",
            segment="answer",
        ),
    ]
    shapes = [lab.Shape(layer=layer, num_experts=4, top_k=2) for layer in (2, 5)]
    yield from lab.held_open(make_store(shapes, [lab.Item(tokens=tokens), lab.Item(tokens=tokens)]))


def test_prompt_by_hand(small: Store) -> None:
    table = prompt_routing(small, "run", prompt_id=1)
    frame = table.frame.set_index(["position", "layer"])
    assert len(frame) == 4
    assert frame["top_expert"].tolist() == [3, 0, 0, 1]
    assert frame.at[(0, 2), "experts"].tolist() == [3, 1]
    assert frame.at[(0, 2), "weight_sum"] == pytest.approx(0.8)
    expected = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / np.log(2)
    assert frame.at[(0, 2), "weight_entropy"] == pytest.approx(expected, rel=1e-6)
    assert frame.at[(0, 5), "weight_entropy"] == pytest.approx(1)
    assert np.isnan(frame.at[(1, 5), "weight_entropy"])
    assert frame["phase"].tolist() == ["prompt", "prompt", "generated", "generated"]
    assert frame["is_special"].tolist() == [True, True, False, False]
    assert (table.context.num_prompts, table.context.num_tokens) == (1, 2)


def test_token_by_hand(small: Store) -> None:
    table = token_routing(small, "run", prompt_id=0, position=0)
    frame = table.frame
    assert frame[["layer", "rank", "expert"]].to_numpy().tolist() == [
        [2, 0, 3], [2, 1, 1], [5, 0, 0], [5, 1, 2]
    ]  # fmt: skip
    assert frame["weight_share"].tolist() == pytest.approx([0.75, 0.25, 0.5, 0.5])
    assert set(frame["weight_share_chance"]) == {0.5}
    assert table.summary == {"token": "t0"}
    dropped = token_routing(small, "run", prompt_id=0, position=1).frame
    assert dropped.loc[dropped["layer"] == 5, "weight_share"].isna().all()


def test_only_the_layers_asked_for(small: Store) -> None:
    filters = Filters(layers=(5,))
    assert set(prompt_routing(small, "run", prompt_id=0, filters=filters).frame["layer"]) == {5}
    token = token_routing(small, "run", prompt_id=0, position=1, filters=filters)
    assert token.frame["expert"].tolist() == [1, 3]


def test_what_is_not_there_is_refused(
    small: Store, lab: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(AnalysisInputError, match="has no prompt 7; its prompts are 0 to 1"):
        prompt_routing(small, "run", prompt_id=7)
    with pytest.raises(AnalysisInputError, match="position 9 of prompt 1 in run 'run'"):
        token_routing(small, "run", prompt_id=1, position=9)
    path = tmp_path_factory.mktemp("usage") / "store.duckdb"
    item = lab.Item(tokens=lab.tokens_of([[0]]))
    shapes = [lab.Shape(layer=0, num_experts=2, top_k=1)]
    usage_only = lab.write_run(path, shapes, [item], record_level="usage")
    with pytest.raises(AnalysisInputError, match="no routing per token, which this view needs"):
        prompt_routing(usage_only, "run", prompt_id=0)
