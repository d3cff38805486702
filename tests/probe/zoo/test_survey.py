"""The survey: every family's row is asserted, every "no" with its reason, and it can say no."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moescope.probe.errors import ModelInputError
from moescope.probe.routers import verify_routers
from moescope.probe.zoo import families, tiny_model
from moescope.probe.zoo.capture import without_weights
from moescope.steering import survey_bench
from moescope.steering.survey import DTYPES, SurveyRow, examine, survey
from moescope.steering.survey_bench import Bench, CheckError
from moescope.steering.survey_checks import ACTIONS, CHECKS, RECORDING, STEERING

pytestmark = pytest.mark.families

ROWS = [row for family in families() for row in family.rows]
PAGE = Path(__file__).resolve().parents[3] / "docs" / "families.md"

_ONE_BLOCK = "product keys and the experts are one block, so nothing between them can be replaced"
_IGNORED = "ignore which expert was chosen: whatever the router says, only the first two ever run"
_ONE_EACH = "sends each token to exactly one expert, up to the expert's capacity"

#: Row, or family with its variants -> check -> its reason; everything else must hold.
EXPECTED: dict[str, dict[str, str]] = {
    "doge": dict.fromkeys(("verified", *ACTIONS), _ONE_BLOCK),
    "nllb_moe": dict.fromkeys(("verified", *ACTIONS), _IGNORED),
    "jetmoe": {"top_k": "2 query heads for each token; no token can use more than 2"},
    "switch_transformers": {"top_k": _ONE_EACH, "top_p": _ONE_EACH},
    "switch_transformers+capacity3": {
        "force": "6 of 26 tokens .* it takes 3 of each sequence",
        "top_k": _ONE_EACH,
        "top_p": _ONE_EACH,
    },
}


@cache
def surveyed(row: str, dtype: str) -> SurveyRow:
    return examine(row, dtype)


def page_rows() -> dict[str, dict[str, str]]:
    """Family -> column -> cell of the published table."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(lines) if line.startswith("| family | class |"))
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[start:]]
    return {row[0]: dict(zip(cells[0], row, strict=False)) for row in cells[2:]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_everything_holds_but_what_is_known_not_to(row: str, dtype: str) -> None:
    found = surveyed(row, dtype)
    assert found.reason is None and found.outcomes is not None and found.layers
    assert list(found.outcomes) == list(CHECKS)
    expected = EXPECTED.get(row, EXPECTED.get(row.partition("+")[0], {}))
    assert set(found.failed) == set(expected), found.failed
    for check, reason in expected.items():
        assert re.search(reason, found.failed[check]), found.failed[check]


@pytest.mark.parametrize("row", ROWS)
def test_the_page_says_what_the_survey_found(row: str) -> None:
    published = page_rows()[row]
    found = surveyed(row, "float32")
    assert published["class"] == found.model_class
    for check, outcome in (found.outcomes or {}).items():
        assert published[check].startswith("yes" if outcome.held else "no ("), check


def test_every_family_that_is_found_has_a_row() -> None:
    published = page_rows()
    assert set(published) == {row for one in families() for row in (one.rows or (one.name,))}


def test_a_family_without_a_tiny_model_is_a_row_with_its_reason() -> None:
    (row,) = survey(["bamba"])
    assert row.outcomes is None and row.reason is not None and "no router" in row.reason
    with pytest.raises(ModelInputError, match="no family with routed experts called 'llama'"):
        list(survey(["llama"]))


def test_a_family_stands_for_its_variants_and_progress_is_told() -> None:
    told: list[tuple[int, int, str]] = []
    rows = list(survey(["lfm2_moe"], dtypes=["float32"], progress=lambda *one: told.append(one)))
    assert [row.family for row in rows] == ["lfm2_moe", "lfm2_moe+nobias"]
    assert told == [(0, 2, "lfm2_moe"), (1, 2, "lfm2_moe+nobias"), (2, 2, "")]


def bench(row: str) -> Bench:
    tiny = tiny_model(row)
    return Bench(tiny, verify_routers(tiny.model, tiny.inputs["input_ids"]))


@pytest.mark.parametrize("check", ["mask", "force", "bias", "scale", "drop", "top_k", "top_p"])
def test_steering_that_does_nothing_is_caught(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(survey_bench, "steer", nothing)
    with pytest.raises(CheckError):
        STEERING[check](bench("mixtral"))


@pytest.mark.parametrize("what", ["ids", "weights"])
def test_a_record_of_other_weights_or_ids_is_caught(what: str) -> None:
    def change(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = args
        return (hidden, (ids + 1) % 8, weights) if what == "ids" else (hidden, ids, weights * 2)

    shared = bench("mixtral")
    shared.sites[1].experts.register_forward_pre_hook(change)
    with pytest.raises(CheckError, match=f"layer 1 .* the recorded {what} are not those"):
        RECORDING["recorded"](shared)


def test_a_hook_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = bench("mixtral")
    real = survey_bench.steer

    @contextmanager
    def leaky(model: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        model.register_forward_hook(lambda *_: None)
        with real(model, *args, **kwargs) as report:
            yield report

    monkeypatch.setattr(survey_bench, "steer", leaky)
    with pytest.raises(CheckError, match="leaves a hook behind"):
        STEERING["after an error"](shared)


def test_an_expert_without_weights_is_missed_only_where_it_has_tokens() -> None:
    shared = bench("mixtral")
    site = shared.sites[-1]
    with without_weights([(site, shared.most[site.info.module])]):
        assert not torch.equal(shared.output(), shared.base)
    assert torch.equal(shared.output(), shared.base), "the weights were not put back"
