"""Every format and version is read into the same routing, and says what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.probe.analysis import Filters, expert_load, load_balance, prompt_routing
from moescope.probe.analysis.counts import read_counts
from moescope.probe.analysis.selection import select
from moescope.probe.errors import AnalysisInputError
from moescope.probe.interchange.report import LACKS, ImportReport
from moescope.probe.storage import Store, verify_run

Import = Callable[..., ImportReport]
NUMBER = 21


@pytest.fixture(scope="module", params=range(NUMBER))
def case(request: pytest.FixtureRequest, golden: ModuleType) -> Any:
    assert len(golden.GOLDEN) == NUMBER
    return golden.GOLDEN[request.param]


@pytest.fixture(scope="module")
def stored(
    case: Any, import_files: Import, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ImportReport]:
    folder = tmp_path_factory.mktemp("golden")
    store = folder / "store.duckdb"
    files = folder / "files"
    files.mkdir()
    report = import_files(store, case.format, case.write(files), **case.options)
    return store, report


def test_the_report_says_version_and_what_is_lacking(
    case: Any, stored: tuple[Path, ImportReport]
) -> None:
    store, report = stored
    assert (report.format, report.version) == (case.format, case.version)
    assert tuple(report.lacks) == case.lacks
    assert set(report.lacks) <= set(LACKS)
    run = Store(store).run("r")
    assert run.manifest["lacks"] == report.lacks
    assert run.manifest["import"]["version"] == case.version
    assert (run.source, run.status) == (f"import:{case.format}", "complete")
    assert next(iter(report.lines())).startswith(case.format)


def test_counts_are_those_of_the_routing(
    case: Any, stored: tuple[Path, ImportReport], golden: ModuleType
) -> None:
    store, _ = stored
    usage = Store(store).query(
        "SELECT moe_layer + CASE WHEN l.kind = 'mtp' THEN 1 ELSE 0 END AS layer, expert, "
        "sum(num_tokens) AS n FROM usage JOIN layers l USING (run_id, layer, kind) "
        "GROUP BY ALL ORDER BY ALL"
    )
    found = np.zeros((golden.LAYERS, golden.EXPERTS), np.int64)
    found[usage["layer"], usage["expert"]] = usage["n"]
    expected = golden.COUNTS.copy()
    if case.routed == 7:  # the first token was not captured
        for layer in range(golden.LAYERS):
            expected[layer, golden.IDS[0, layer]] -= 1
    assert found.tolist() == expected.tolist()
    assert verify_run(Store(store), "r") == []


def test_slots_are_those_of_the_routing(
    case: Any, stored: tuple[Path, ImportReport], golden: ModuleType
) -> None:
    store, _ = stored
    slots = Store(store).query("SELECT * FROM routing ORDER BY prompt_id, position, layer, rank")
    assert len(slots) == case.slots
    assert Store(store).has_routing("r") == bool(case.slots)
    if not case.slots:
        return
    assert slots["rank"].notna().all() == case.is_ranked
    assert slots["weight"].notna().all() == case.has_weights
    position = slots.groupby(["prompt_id", "layer"], sort=False)
    assert position["position"].nunique().sum() == 2 * case.routed
    expected = golden.IDS[8 - case.routed :]
    found = slots["expert"].to_numpy().reshape(-1, 2, 2)
    assert np.sort(found, axis=-1).tolist() == np.sort(expected, axis=-1).tolist()
    if case.is_ranked:
        assert found.tolist() == expected.tolist()
        weights = slots["weight"].to_numpy().reshape(-1, 2)
        assert (weights[:, 0] > weights[:, 1]).all()
    tokens = Store(store).query("SELECT count(*) AS n, sum(is_routed::INT) AS r FROM tokens")
    assert tokens.to_numpy().tolist() == [[8, case.routed]] or case.format in (
        "vllm",
        "sglang-reply",
    )


def test_an_analysis_that_needs_what_is_lacking_says_so(
    case: Any, stored: tuple[Path, ImportReport]
) -> None:
    store = Store(stored[0])
    table = load_balance(store, "r")
    assert len(table.frame) == 2
    assert "not have: " in table.notes[0] and case.lacks[0] in table.notes[0]
    importance = expert_load(store, "r").frame["importance"]
    assert importance.notna().all() == case.has_weights
    if not case.has_weights:
        with pytest.raises(AnalysisInputError, match="has no routing weights"):
            selection = select(store, "r", Filters())
            read_counts(
                selection, np.zeros(len(selection.prompts), np.int64), quantities=("weight_sum",)
            )
    if "positions" in case.lacks:
        with pytest.raises(AnalysisInputError, match=r"topk|single tokens|routing"):
            prompt_routing(store, "r", prompt_id=0)
