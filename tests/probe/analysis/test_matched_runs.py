"""Two runs matched: the same prompts, the same tokens up to the first difference, the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescope.probe.analysis import token_slots
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.two_runs.matched_runs import MatchedRuns, match_runs, read_pairs
from moescope.probe.errors import AnalysisInputError, RunError
from moescope.probe.storage.store import Store

MakeStore = Callable[..., Store]


def match(store: Store, **changes: Any) -> MatchedRuns:
    settings = {"against": "other", "filters": None, "unit": "pair_id"} | changes
    return match_runs(store, "run", **settings)


def counted(matched: MatchedRuns) -> list[tuple[int, int, int]]:
    """Prompt of the run, prompt of the reference and position of every counted token."""
    prompts = matched.tokens.prompts
    return list(
        zip(
            matched.run.prompt_ids[prompts].tolist(),
            matched.reference.prompt_ids[matched.partners[prompts]].tolist(),
            matched.tokens.positions.tolist(),
            strict=True,
        )
    )


@pytest.fixture
def two(make_store: MakeStore, lab: SimpleNamespace) -> Callable[..., Store]:
    """Writes two runs of prompts with three tokens each, given by their fields."""

    def make(own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> Store:
        shapes = [lab.Shape(layer=0, num_experts=3, top_k=1)]
        tokens = lab.tokens_of([[0], [1], [2]])
        store = make_store(shapes, [lab.Item(tokens=tokens, fields=fields) for fields in own])
        items = [lab.Item(tokens=tokens, fields=fields) for fields in other]
        lab.write_run(store.path, shapes, items, run_id="other")
        return store

    return make


def test_prompts_are_matched_by_key_and_else_by_text(two: Callable[..., Store]) -> None:
    own = [
        {"key": "a", "rendered_text": "x"},  # by key, though the text differs
        {"key": "b", "rendered_text": "one"},  # the key is there twice in the other run
        {"rendered_text": "same"},
        {"rendered_text": "same"},  # the second with the second
        {"rendered_text": "alone"},
        {"key": "c", "set_name": "s", "rendered_text": "set"},  # keys belong to their set
    ]
    other = [
        {"rendered_text": "same"},
        {"key": "c", "set_name": "t", "rendered_text": "other"},
        {"key": "b", "rendered_text": "two"},
        {"key": "b", "rendered_text": "one"},
        {"rendered_text": "same"},
        {"key": "a", "rendered_text": "y"},
    ]
    matched = match(two(own, other))
    pairs = dict.fromkeys((a, b) for a, b, _ in counted(matched))
    assert list(pairs) == [(0, 5), (1, 3), (2, 0), (3, 4)]
    assert len(matched.tokens) == 12
    assert matched.notes == (
        "Prompts matched with run 'other': 4. Only in run 'run': 2. Only in run 'other': 2.",
    )


def test_filters_choose_prompts_after_they_are_matched(two: Callable[..., Store]) -> None:
    """The second of equal texts stays the second, also where the first is filtered out."""
    fields = [{"rendered_text": "same", "lang": lang} for lang in ("de", "en")]
    matched = match(two(fields, fields), filters=Filters(fields={"lang": ("en",)}))
    assert counted(matched) == [(1, 1, 0), (1, 1, 1), (1, 1, 2)]
    assert matched.notes == ("Prompts matched with run 'other': 1.",)


def test_tokens_count_up_to_the_first_difference(
    two: Callable[..., Store], lab: SimpleNamespace
) -> None:
    fields = [{"key": name} for name in "abc"]
    store = two(fields, fields)
    lab.edit(
        store,
        "UPDATE tokens SET token_id = 99 WHERE run_id = 'other' AND prompt_id = 0 AND position = 1",
        # The last token of an answer does not pass the model.
        "UPDATE tokens SET is_routed = false "
        "WHERE run_id = 'other' AND prompt_id = 1 AND position = 2",
        "DELETE FROM tokens WHERE run_id = 'other' AND prompt_id = 2 AND position > 0",
    )
    matched = match(store)
    assert counted(matched) == [(0, 0, 0), (1, 1, 0), (1, 1, 1), (2, 2, 0)]
    assert matched.notes[1] == (
        "Tokens of matched prompts left out: 5 of 9, those from the first difference to run "
        "'other' on."
    )


@pytest.fixture(scope="module")
def shuffled(
    make_store: MakeStore, lab: SimpleNamespace, random_items: list[Any]
) -> Iterator[Store]:
    """The other run has its 12 prompts in another order, and further ones between."""
    shapes = lab.RANDOM_SHAPES
    own = [
        replace(item, fields={**item.fields, "key": str(index)})
        for index, item in enumerate(random_items[:12])
    ]
    other = []
    for index in (4, 5, 6, 7, 8, 9, 10, 3, 11, 2, 0, 1):
        further = replace(random_items[20 + index], fields={"key": f"further {index}"})
        other += [own[index], further]
    store = make_store(shapes, own)
    lab.write_run(store.path, shapes, other, run_id="other")
    yield from lab.held_open(store)


@pytest.mark.parametrize(
    ("filters", "slots_per_read", "num_blocks"),
    [
        (Filters(), 1, 12),
        (Filters(), 10**9, 4),
        (Filters(tokens="generated", layers=(2,)), 40, None),
    ],
)
def test_the_rows_are_those_of_sql(
    shuffled: Store,
    filters: Filters,
    slots_per_read: int,
    num_blocks: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_slots, "SLOTS_PER_READ", slots_per_read)
    store = shuffled
    matched = match(store, filters=filters)
    assert num_blocks in (None, len(matched.blocks))
    found = []
    for pair in read_pairs(matched, weights=True):
        layer = matched.run.routers[pair.router].layer
        sides = ((pair.run, pair.run_weights), (pair.reference, pair.reference_weights))
        for side, (experts, weights) in enumerate(sides):
            for rank, token in zip(*np.nonzero(experts < 8), strict=True):
                prompt = int(matched.run.prompt_ids[pair.prompts[token]])
                found.append((side, prompt, layer, int(rank), int(experts[rank, token]),
                              float(weights[rank, token])))  # fmt: skip
    where = "t.phase = 'generated' AND layer = 2" if filters.layers else "true"
    rows = store.query(
        "SELECT CASE WHEN r.run_id = 'run' THEN 0 ELSE 1 END AS side, p.key::INT AS prompt, layer, "
        "rank, expert, weight FROM routing r JOIN prompts p USING (run_id, prompt_id) "
        "JOIN tokens t USING (run_id, prompt_id, position) "
        "WHERE p.key NOT LIKE 'further%' AND NOT t.is_special AND t.segment != 'template' "
        f"AND {where}"
    )
    assert sorted(found) == sorted(map(tuple, rows.itertuples(index=False)))


def test_routers_are_matched_by_layer_and_kind(make_store: MakeStore, lab: SimpleNamespace) -> None:
    def items(*layers: int) -> list[Any]:
        slots = {layer: [(1, 1.0)] for layer in layers}
        return [lab.Item(tokens=[lab.Token(slots=slots)])]

    def shapes(*layers: int, **changes: Any) -> list[Any]:
        given = {"num_experts": 4, "top_k": 1} | changes
        return [lab.Shape(layer=layer, **given) for layer in layers]

    store = make_store(shapes(0, 1, 2), items(0, 1, 2))
    lab.write_run(store.path, shapes(1, 2, 5), items(1, 2, 5), run_id="other")
    matched = match(store)
    assert [router.layer for router in matched.run.routers] == [1, 2]
    assert matched.notes[1:] == (
        "Routers only in run 'run', left out: mlp layers 0.",
        "Routers only in run 'other', left out: mlp layers 5.",
    )
    # What the filters leave out is not missing.
    assert len(match(store, filters=Filters(layers=(1, 2))).notes) == 1
    lab.write_run(store.path, shapes(1, kind="attention"), items(1), run_id="attention")
    with pytest.raises(
        AnalysisInputError, match=r"no router: mlp layers 0, 1, 2 against attention"
    ):
        match(store, against="attention")
    lab.write_run(store.path, shapes(1, num_experts=5), items(1), run_id="larger")
    with pytest.raises(AnalysisInputError, match=r"layer 1 has 4 experts in run 'run' and 5 in"):
        match(store, against="larger")


def test_runs_that_cannot_be_compared(two: Callable[..., Store], lab: SimpleNamespace) -> None:
    store = two([{"key": "a", "rendered_text": "x"}], [{"key": "b", "rendered_text": "y"}])
    with pytest.raises(AnalysisInputError, match="compared with itself"):
        match(store, against="run")
    with pytest.raises(RunError, match="no run 'final'; it has run, other"):
        match(store, against="final")
    with pytest.raises(AnalysisInputError, match="none of these prompts in common"):
        match(store)
    lab.edit(store, "UPDATE prompts SET key = 'a'")
    assert len(match(store).tokens) == 3
    with pytest.raises(AnalysisInputError, match="no field 'units'"):
        match(store, unit="units")
    lab.edit(store, "UPDATE tokens SET token_id = token_id + 7 WHERE run_id = 'other'")
    with pytest.raises(AnalysisInputError, match="share 1 prompts but no token"):
        match(store)
    lab.edit(store, "UPDATE tokens SET token_id = -1 WHERE run_id = 'other'")
    with pytest.raises(AnalysisInputError, match="token ids of one of them are not known"):
        match(store)
    lab.edit(
        store,
        "UPDATE tokens SET token_id = position",
        "UPDATE tokens SET token_id = 9 WHERE run_id = 'other' AND position = 2",
        "UPDATE tokens SET in_span = true WHERE position = 2",
    )
    with pytest.raises(AnalysisInputError, match="in common are not among: span"):
        match(store, filters=Filters(tokens="span"))
    shapes = [lab.Shape(layer=0, num_experts=3, top_k=1)]
    items = [lab.Item(tokens=lab.tokens_of([[0]]))]
    lab.write_run(store.path, shapes, items, run_id="counts", record_level="usage")
    with pytest.raises(AnalysisInputError, match="'counts' holds usage but no routing per token"):
        match(store, against="counts")


def test_an_unfinished_reference_is_said(tmp_path: Path, lab: SimpleNamespace) -> None:
    shapes = [lab.Shape(layer=0, num_experts=3, top_k=1)]
    items = [lab.Item(tokens=lab.tokens_of([[0]]))]
    store = lab.write_run(tmp_path / "store.duckdb", shapes, items)
    lab.write_run(store.path, shapes, items, run_id="other", status="running")
    assert (
        match(store).notes[0] == "Run 'other': The run is running: 1 of 1 planned prompts so far."
    )
