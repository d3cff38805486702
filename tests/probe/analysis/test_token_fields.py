"""Tables split by a field of tokens: the numbers of SQL over single tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.probe.analysis import Filters, expert_load, expert_specialization, load_balance
from moescope.probe.analysis.token_fields import bucket_label, position_buckets
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

BUCKET = (
    "CASE WHEN position < 2 THEN position::TEXT WHEN position < 4 THEN '2-3' "
    "WHEN position < 8 THEN '4-7' WHEN position < 16 THEN '8-15' ELSE '16-31' END"
)


@pytest.mark.parametrize(
    ("by", "expression"),
    [("phase", "phase"), ("segment", "segment"), ("is_special", "is_special::TEXT"),
     ("position", BUCKET)],
)  # fmt: skip
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_load_by_a_field_of_tokens(
    random_store: Store, by: str, expression: str, scope: str
) -> None:
    filters = Filters(tokens=scope, content_only=False)
    frame = expert_load(random_store, "run", by=by, filters=filters).frame
    condition = "" if scope == "all" else "AND phase = 'generated'"
    expected = random_store.query(
        f"SELECT {expression} AS value, layer, expert, count(*) AS slots, "
        "sum(weight)::DOUBLE AS weight FROM routing JOIN tokens USING (run_id, prompt_id, position)"
        f" WHERE true {condition} GROUP BY ALL"
    ).set_index(["value", "layer", "expert"])
    found = frame[frame["num_slots"] > 0].set_index(["value", "layer", "expert"])
    assert found["num_slots"].to_dict() == expected["slots"].to_dict()
    totals = expected.groupby(["value", "layer"])["weight"].sum()
    for key, importance in found["importance"].items():
        share = expected.at[key, "weight"] / totals[key[:2]]
        assert importance == pytest.approx(share, rel=1e-5)
    prompts = random_store.query(
        f"SELECT {expression} AS value, count(DISTINCT prompt_id) AS n, count(*) AS tokens "
        f"FROM tokens WHERE true {condition} GROUP BY ALL"
    ).set_index("value")
    assert found.groupby("value")["num_prompts"].max().to_dict() == prompts["n"].to_dict()
    assert found.groupby("value")["num_tokens"].max().to_dict() == prompts["tokens"].to_dict()


def test_context_counts_each_prompt_once(random_store: Store) -> None:
    table = load_balance(random_store, "run", by="segment", filters=Filters(content_only=False))
    assert table.context.num_prompts == 72
    assert table.frame["num_tokens"].sum() == 3 * table.context.num_tokens
    assert list(dict.fromkeys(table.frame["value"])) == ["system", "user", "template", "answer"]


@pytest.mark.parametrize("by", ["segment", "position"])
def test_specialization_by_a_field_of_tokens(random_store: Store, by: str) -> None:
    frame = expert_specialization(random_store, "run", by=by, bootstrap=50).frame
    load = expert_load(random_store, "run", by=by).frame
    keys = ["value", "layer", "expert"]
    both = frame.merge(load, on=keys, suffixes=("", "_load"))
    assert len(both) == len(frame)
    assert both["token_share"].tolist() == pytest.approx(both["token_share_load"].tolist())
    assert (frame["low"] <= frame["token_share"] + 1e-9).all()
    assert frame["num_units"].max() == 24


def test_scores_by_position_are_refused(random_store: Store) -> None:
    with pytest.raises(AnalysisInputError, match="no field 'place'"):
        expert_load(random_store, "run", by="place")


@given(st.integers(0, 100_000))
def test_buckets_hold_their_positions(position: int) -> None:
    import numpy as np

    label = bucket_label(int(position_buckets(np.array([position]))[0]))
    first, _, last = label.partition("-")
    assert int(first) <= position <= int(last or first)
