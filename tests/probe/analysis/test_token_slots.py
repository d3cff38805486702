"""Tokens and slots as arrays: the same rows as SQL finds, whatever the block size."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from moescope.probe.analysis import token_slots
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.selection import select, unit_labels
from moescope.probe.analysis.token_slots import read_slots, read_tokens
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

FILTERS = [
    Filters(),
    Filters(content_only=False),
    Filters(tokens="generated", layers=(1,)),
    Filters(tokens="last_prompt"),
    Filters(tokens={"first_generated": 2}, fields={"lang": ("de", "zh")}),
    Filters(tokens="span", fields={"topic": ("1",)}),
]


CASES = [(filters, slots) for filters in FILTERS for slots in (40, 10**9)]
# A read for every prompt.
CASES += [(FILTERS[2], 1), (FILTERS[5], 1)]


@pytest.mark.parametrize(
    ("filters", "slots_per_read"), CASES, ids=[f"{slots}-{f.describe()}" for f, slots in CASES]
)
def test_the_rows_are_those_of_sql(
    random_store: Store, filters: Filters, slots_per_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_slots, "SLOTS_PER_READ", slots_per_read)
    selection = select(random_store, "run", filters, fields=["pair_id"])
    tokens = read_tokens(selection, ["token_id", "next_token_id", "previous_token_id"])
    ids = selection.prompt_ids[tokens.prompts]
    found = set()
    for block in read_slots(selection, tokens, weights=True, ranked="this test"):
        for router in selection.routers:
            experts, weights = block.experts[router], block.weights[router]
            for row, rank in zip(*np.nonzero(experts < router.num_experts), strict=True):
                token = block.tokens.start + row
                found.add((int(ids[token]), int(tokens.positions[token]), router.layer, int(rank),
                           int(experts[row, rank]), float(weights[row, rank])))  # fmt: skip
    layers = [router.layer for router in selection.routers]
    expected = random_store.query(
        "SELECT prompt_id, position, layer, rank, expert, weight FROM routing WHERE run_id = 'run' "
        "ORDER BY ALL"
    )
    counted = set(zip(ids.tolist(), tokens.positions.tolist(), strict=True))
    assert found == {
        tuple(row)
        for row in expected.itertuples(index=False)
        if (row.prompt_id, row.position) in counted and row.layer in layers
    }
    ordered = random_store.query(
        "SELECT prompt_id, position, token_id FROM tokens ORDER BY ALL"
    ).set_index(["prompt_id", "position"])["token_id"].to_dict()  # fmt: skip
    for index, key in enumerate(zip(ids.tolist(), tokens.positions.tolist(), strict=True)):
        near = [ordered.get((key[0], key[1] + step), -1) for step in (-1, 0, 1)]
        names = ("previous_token_id", "token_id", "next_token_id")
        assert [tokens.columns[name][index] for name in names] == near


def test_blocks_hold_whole_units(random_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_slots, "SLOTS_PER_READ", 1)
    selection = select(random_store, "run", Filters(), fields=["pair_id"])
    tokens = read_tokens(selection)
    unit_P = unit_labels(selection.prompts, "pair_id")
    seen = [
        set(unit_P[tokens.prompts[block.tokens]].tolist())
        for block in read_slots(selection, tokens, unit_P=unit_P)
    ]
    assert len(seen) == 24
    assert not any(a & b for i, a in enumerate(seen) for b in seen[:i])
    assert tokens.num_prompts == 72
    scattered = np.arange(len(unit_P)) % 2
    assert len(list(read_slots(selection, tokens, unit_P=scattered))) == 1


def test_tokens_with_fewer_slots_are_filled_up(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    tokens = lab.tokens_of([[2], [0, 1, 3], [1, 2]])
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=3)], [lab.Item(tokens=tokens)])
    selection = select(store, "run", Filters())
    (block,) = read_slots(selection, read_tokens(selection), weights=True)
    experts, weights = (next(iter(kept.values())) for kept in (block.experts, block.weights))
    assert experts.tolist() == [[2, 4, 4], [0, 1, 3], [1, 2, 4]]
    assert weights[0].tolist() == [1, 0, 0]


def test_what_the_run_lacks_is_named(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    shapes = [lab.Shape(layer=0, num_experts=2, top_k=1)]
    usage = make_store(shapes, [lab.Item(tokens=lab.tokens_of([[0]]))], record_level="usage")
    with pytest.raises(AnalysisInputError, match="no routing per token"):
        read_tokens(select(usage, "run", Filters()))
    store = make_store(shapes, [lab.Item(tokens=lab.tokens_of([[0]]))])
    with pytest.raises(AnalysisInputError, match="no routed token among"):
        read_tokens(select(store, "run", Filters(tokens="generated")))
