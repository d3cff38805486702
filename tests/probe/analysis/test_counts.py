"""Reading counts: every filter against a count made token by token in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescope.probe.analysis import counts as counts_module
from moescope.probe.analysis.counts import read_counts
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.selection import (
    group_by_value,
    read_fields,
    select,
    unit_labels,
)
from moescope.probe.errors import AnalysisInputError, RunError
from moescope.probe.storage.store import Store

SCOPES: dict[str, Filters] = {
    "default": Filters(),
    "everything": Filters(content_only=False),
    "prompt": Filters(tokens="prompt"),
    "generated": Filters(tokens="generated", content_only=False),
    "phase": Filters(phase="generated"),
    "segments": Filters(segments=("system", "template")),
    "last_prompt": Filters(tokens="last_prompt"),
    "first_generated": Filters(tokens={"first_generated": 3}),
    "span": Filters(tokens="span"),
    "span of the prompt": Filters(tokens="span", phase="prompt", content_only=False),
    "layers": Filters(layers=(2, 4)),
    "language": Filters(fields={"lang": ("en", "zh"), "topic": ("1",)}),
}


def is_counted(filters: Filters, item: Any, position: int) -> bool:
    """The definition of the filters, spelled out for one token."""
    token = item.tokens[position]
    num_prompt = sum(other.phase == "prompt" for other in item.tokens)
    if filters.scope in ("prompt", "generated") and token.phase != filters.scope:
        return False
    if filters.scope == "last_prompt":
        return position == num_prompt - 1
    if filters.scope == "first_generated" and not 0 <= position - num_prompt < 3:
        return False
    if filters.scope == "span" and not token.in_span:
        return False
    if filters.phase and token.phase != filters.phase:
        return False
    if filters.segments is not None and token.segment not in filters.segments:
        return False
    if filters.content_only:
        return not token.is_special and (
            filters.segments is not None or token.segment != "template"
        )
    return True


def brute_force(filters: Filters, items: Sequence[Any], layer: int) -> tuple[Any, Any, Any]:
    """Tokens, selections [E] and weights [E] of all prompts that the filters keep."""
    tokens, selected, weights = 0, np.zeros(8), np.zeros(8)
    for item in items:
        fields = {**item.fields, **{k: str(v) for k, v in item.fields["meta"].items()}}
        if any(fields[name] not in values for name, values in filters.fields.items()):
            continue
        for position in range(len(item.tokens)):
            if is_counted(filters, item, position):
                tokens += 1
                for expert, weight in item.tokens[position].slots[layer]:
                    selected[expert] += 1
                    weights[expert] += weight
    return tokens, selected, weights


@pytest.mark.parametrize("name", SCOPES)
def test_every_filter_counts_what_it_says(
    name: str, random_store: Store, random_items: list[Any]
) -> None:
    filters = SCOPES[name]
    selection = select(random_store, "run", filters)
    group_P = np.zeros(len(selection.prompts), dtype=np.int64)
    usage = read_counts(selection, group_P, quantities=("num_tokens", "weight_sum"))
    assert [found.router.layer for found in usage.routers] == list(filters.layers or (1, 2, 4))
    for found in usage.routers:
        tokens, selected, weights = brute_force(filters, random_items, found.router.layer)
        assert found.tokens.tolist() == [tokens]
        assert found.counts[0].tolist() == selected.tolist()
        assert found.sums["weight_sum"][0] == pytest.approx(weights, rel=1e-5)
    assert usage.num_tokens == tokens > 0


def test_reading_in_small_batches_changes_nothing(
    random_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for filters in (Filters(), Filters(tokens="span")):
        selection = select(random_store, "run", filters, fields=["lang"])
        _, group_P = group_by_value(selection, "lang")
        whole = read_counts(selection, group_P)
        with monkeypatch.context() as patch:
            patch.setattr(counts_module, "ELEMENTS_PER_READ", 24 * 3 * 5)
            pieces = read_counts(selection, group_P)
        assert whole.group_prompts.tolist() == pieces.group_prompts.tolist()
        assert whole.prompt_tokens.tolist() == pieces.prompt_tokens.tolist()
        for one, other in zip(whole.routers, pieces.routers, strict=True):
            assert (one.counts == other.counts).all()
            assert (one.tokens == other.tokens).all()


def test_groups_add_up_and_group_minus_one_is_left_out(random_store: Store) -> None:
    selection = select(random_store, "run", Filters(), fields=["lang"])
    values, group_P = group_by_value(selection, "lang")
    assert values == ["de", "en", "zh"]
    together = read_counts(selection, np.zeros_like(group_P)).routers[0]
    apart = read_counts(selection, group_P).routers[0]
    assert (apart.counts.sum(axis=0) == together.counts[0]).all()
    without = read_counts(selection, np.where(group_P == 0, -1, group_P)).routers[0]
    assert not without.counts[0].any()
    assert (without.counts[1:] == apart.counts[1:]).all()


def test_fields_are_columns_or_keys_of_meta(random_store: Store) -> None:
    frame = read_fields(random_store, "run", ["label", "topic", "a/b~c", "domain"])
    assert frame["topic"].tolist()[:4] == ["0", "0", "0", "1"]
    assert set(frame["a/b~c"]) == {"0", "1"}
    assert frame["domain"].isna().all()
    with pytest.raises(AnalysisInputError, match=r"no field 'topics'; they have key.*lang.*topic"):
        read_fields(random_store, "run", ["topics"])


def test_units_are_values_else_prompts(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    tokens = lab.tokens_of([[0]])
    # A pair_id that looks like a prompt's number must not join that prompt.
    pair_ids = ["x", None, "x", "1", None]
    items = [lab.Item(tokens=tokens, fields={"pair_id": pair_id}) for pair_id in pair_ids]
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items)
    frame = read_fields(store, "run", ["pair_id"])
    assert unit_labels(frame, "pair_id").tolist() == [0, 1, 0, 2, 3]


def test_what_the_run_cannot_answer_is_refused(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [
        lab.Item(tokens=lab.tokens_of([[0], [1]]), fields={"lang": lang}) for lang in ("en", "de")
    ]
    shapes = [lab.Shape(layer=0, num_experts=2, top_k=1)]
    store = make_store(shapes, items, record_level="usage")
    with pytest.raises(RunError, match="run"):
        select(store, "other", Filters())
    with pytest.raises(AnalysisInputError, match="no prompt with lang=fr; lang holds de, en"):
        select(store, "run", Filters(fields={"lang": ("fr",)}))
    with pytest.raises(AnalysisInputError, match="no router in layer 5; it has 0"):
        select(store, "run", Filters(layers=(5,)))
    with pytest.raises(AnalysisInputError, match="no router of kind 'encoder'; it has: mlp"):
        select(store, "run", Filters(kind="encoder"))
    with pytest.raises(AnalysisInputError, match="no routing per token, which tokens 'span' needs"):
        select(store, "run", Filters(tokens="span"))
    selection = select(store, "run", Filters(tokens="generated"))
    with pytest.raises(AnalysisInputError, match="no routed token among: generated content"):
        read_counts(selection, np.zeros(2, dtype=np.int64))


def test_router_scores_cannot_be_taken_from_single_positions(random_store: Store) -> None:
    selection = select(random_store, "run", Filters(tokens="last_prompt"))
    with pytest.raises(AnalysisInputError, match="router scores are summed over whole phases"):
        read_counts(selection, np.zeros(72, dtype=np.int64), quantities=("prob_sum",))


def test_an_unfinished_run_is_noted(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    items = [lab.Item(tokens=lab.tokens_of([[0]]))]
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items, status="running")
    notes = select(store, "run", Filters()).notes
    assert notes == ("The run is running: 1 of 1 planned prompts so far.",)
