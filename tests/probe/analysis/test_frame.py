"""Tables describe themselves, are written whole, and every analysis can be asked by strings."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from moescope.probe.analysis import (
    ANALYSES,
    AnalysisTable,
    Column,
    Context,
    Parameter,
    field_values,
    find_analysis,
    known_fields,
    prompt_list,
    table_as_json,
    write_table,
)
from moescope.probe.analysis.export import check_suffix
from moescope.probe.analysis.filters import Filters
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

ARGUMENTS: dict[str, dict[str, Any]] = {
    "load": {},
    "balance": {"by": "lang"},
    "balance-loss": {"batch_size": "4", "bootstrap": "20"},
    "specialization": {"by": "topic", "bootstrap": "20"},
    "vocabulary": {"min_count": "3"},
    "expert-tokens": {"min_count": "3"},
    "information": {"factor": "token,lang", "shuffles": "2"},
    "coactivation": {},
    "partners": {},
    "transitions": {},
    "transition-strength": {"shuffles": "1"},
    "languages": {"bootstrap": "20", "draws": "2"},
    "language-pairs": {"bootstrap": "20", "draws": "2"},
    "language-scores": {"score": "label=a", "draws": "2"},
    "delta-experts": {"reference": "en", "bootstrap": "20"},
    "contrast": {"a": ["label=a"], "b": ["label=b", "lang=en,de"], "candidates": "4",
                 "bootstrap": "20"},
    "saturation": {"against": "other"},
    "drift": {"against": "other"},
    "prompts": {},
    "prompt": {"prompt_id": "3"},
    "token": {"prompt_id": "3", "position": "1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def five_languages(make_store: Callable[..., Store], lab: SimpleNamespace) -> Store:
    """Passages of four tokens in five languages, each with a mix of two experts of its own."""
    items = [
        lab.Item(
            tokens=lab.tokens_of([[expert], [7], [expert], [passage]]),
            fields={"lang": lang, "pair_id": f"p{passage}", "label": "ab"[expert > passage]},
        )
        for passage in range(4)
        for expert, lang in enumerate(("de", "en", "es", "fr", "zh"))
    ]
    return make_store([lab.Shape(layer=0, num_experts=8, top_k=1)], items)


@pytest.fixture(scope="module")
def two_runs(
    random_store: Store,
    random_items: list[Any],
    lab: SimpleNamespace,
    tmp_path_factory: pytest.TempPathFactory,
) -> Store:
    """The random run and, as `other`, the same with the routing of layer 2 in layer 1."""
    path = tmp_path_factory.mktemp("two") / "store.duckdb"
    shutil.copy(random_store.path, path)
    shapes = [lab.Shape(layer=layer, num_experts=8, top_k=2) for layer in (1, 2, 4)]
    turned = [
        replace(
            item,
            tokens=[
                replace(token, slots={**token.slots, 1: token.slots[2]}) for token in item.tokens
            ],
        )
        for item in random_items
    ]
    return lab.write_run(path, shapes, turned, run_id="other")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tables(random_store: Store, five_languages: Store, two_runs: Store) -> dict[str, AnalysisTable]:
    """Every analysis, asked the way the command line asks."""
    stores = {"language-scores": five_languages, "saturation": two_runs, "drift": two_runs}
    answers = {}
    for name, analysis in ANALYSES.items():
        store = stores.get(name, random_store)
        arguments = analysis.parse(ARGUMENTS[name])
        answers[name] = analysis.function(store, "run", filters=analysis.filters, **arguments)
    return answers


def example(frame: pd.DataFrame) -> AnalysisTable:
    columns = tuple(Column(name=name, unit="", range="", definition="") for name in frame.columns)
    context = Context(model="m", revision=None, run_id="r", num_prompts=1, num_tokens=2,
                      parameters={"seed": 0}, filters={}, selection="all")  # fmt: skip
    return AnalysisTable(name="t", title="T", frame=frame, columns=columns, context=context)


def test_every_analysis_answers_with_described_columns_and_n(
    tables: dict[str, AnalysisTable],
) -> None:
    assert set(tables) == set(ANALYSES)
    for name, table in tables.items():
        assert table.name == name
        assert len(table.frame)
        for column in table.columns:
            assert column.definition.endswith("."), column
            assert column.range, column
        assert (table.context.model, table.context.revision) == ("planted", "r1")
        assert table.context.num_prompts > 0
        assert table.context.num_tokens > 0
    levels = ("chance", "expected", "base_rate", "expert_rate", "floor", "shuffled", "p_max")
    for name in ANALYSES.keys() - {"prompts", "prompt"}:
        described = [column.name for column in tables[name].columns]
        assert any(level in column for column in described for level in levels), name


@pytest.mark.parametrize("name", ANALYSES)
def test_parameters_are_those_of_the_function(name: str) -> None:
    analysis = ANALYSES[name]
    taken = inspect.signature(analysis.function).parameters
    keyword_only = {key: taken[key] for key in list(taken)[2:]}
    assert set(keyword_only) == {"filters", *(parameter.name for parameter in analysis.parameters)}
    for parameter in analysis.parameters:
        default = keyword_only[parameter.name].default
        assert parameter.required == (default is inspect.Parameter.empty)
        if not parameter.required:
            assert parameter.default == default


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        (Parameter(name="x", type="integer", default=1, help=""), "12", 12),
        (Parameter(name="x", type="number", default=1, help=""), "0.5", 0.5),
        (Parameter(name="x", type="flag", default=1, help=""), "no", False),
        (Parameter(name="x", type="text", default=1, help=""), ["one"], "one"),
        (Parameter(name="x", type="conditions", default=1, help=""), "a=b", {"a": ("b",)}),
        (Parameter(name="x", type="choice", default=1, help="", choices=("u", "v")), "v", "v"),
    ],
)
def test_strings_become_values(parameter: Parameter, text: Any, value: object) -> None:
    assert parameter.parse(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "match"),
    [
        ("integer", "1.5", "x is '1.5'; it must be a whole number"),
        ("number", "many", "x is 'many'; it must be a number"),
        ("flag", "perhaps", "x is 'perhaps'; it is true or false"),
        ("choice", "w", "x is 'w'; it is one of u, v"),
        ("text", ["a", "b"], "x is given 2 times"),
    ],
)
def test_malformed_strings_are_refused(kind: Any, text: Any, match: str) -> None:
    parameter = Parameter(name="x", type=kind, default=None, help="", choices=("u", "v"))
    with pytest.raises(AnalysisInputError, match=match):
        parameter.parse(text)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(AnalysisInputError, match="no analysis 'loads'; there are load, balance"):
        find_analysis("loads")
    with pytest.raises(AnalysisInputError, match="no parameter 'field'; it has: by"):
        find_analysis("load").parse({"field": "lang"})
    with pytest.raises(AnalysisInputError, match="'specialization' needs by: the field"):
        find_analysis("specialization").parse({})


def test_a_table_must_describe_its_columns() -> None:
    table = example(pd.DataFrame({"x": [1], "y": [2]}))
    assert table.column("y").name == "y"
    with pytest.raises(KeyError, match="has no column 'z'; it has x, y"):
        table.column("z")
    with pytest.raises(ValueError, match=r"describes \['x'\] but holds \['y'\]"):
        AnalysisTable(name="t", title="T", frame=pd.DataFrame({"y": [1]}),
                      columns=table.columns[:1], context=table.context)  # fmt: skip


@pytest.mark.parametrize("name", ANALYSES)
def test_exports_hold_the_same_rows(
    name: str, tables: dict[str, AnalysisTable], tmp_path: Path
) -> None:
    table = tables[name]
    csv = pd.read_csv(write_table(table, tmp_path / "deep" / "table.csv"))
    parquet = pd.read_parquet(write_table(table, tmp_path / "table.parquet"))
    document = json.loads(write_table(table, tmp_path / "table.json").read_text())
    assert list(csv.columns) == list(parquet.columns) == [column.name for column in table.columns]
    assert len(csv) == len(parquet) == len(document["rows"]) == len(table.frame)
    for column in table.frame.select_dtypes("number").columns:
        expected = table.frame[column].astype("float64").to_numpy()
        rows = np.array([row[column] for row in document["rows"]], dtype=np.float64)
        for found in (csv[column], parquet[column], rows):
            np.testing.assert_allclose(np.asarray(found, dtype=np.float64), expected, rtol=1e-12)
    about = json.loads(pq.read_schema(tmp_path / "table.parquet").metadata[b"moescope"])
    assert about == {key: value for key, value in document.items() if key != "rows"}
    assert about["context"]["run_id"] == "run"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "deep", "table.json", "table.parquet"
    ]  # fmt: skip


def test_missing_values_stay_missing(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [0.0, np.nan, np.inf], "n": pd.array([1, None, 3], dtype="Int64"),
                          "t": pd.array(["a", None, "c"], dtype="str")})  # fmt: skip
    rows = table_as_json(example(frame))["rows"]
    assert [row["x"] for row in rows] == [0.0, None, None]
    assert [row["n"] for row in rows] == [1, None, 3]
    assert [row["t"] for row in rows] == ["a", None, "c"]
    path = write_table(example(frame), tmp_path / "table.csv")
    assert path.read_text() == "x,n,t\n0.0,1,a\n,,\ninf,3,c\n"


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    table = example(pd.DataFrame({"x": [1]}))
    with pytest.raises(AnalysisInputError, match=r"must end in \.csv, \.parquet, \.json"):
        check_suffix("table.xlsx")
    with pytest.raises(AnalysisInputError, match="does not say a format"):
        write_table(table, tmp_path / "table")
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    with pytest.raises(AnalysisInputError, match=r"folder\.csv cannot be written"):
        write_table(table, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(AnalysisInputError, match="cannot be written"):
        write_table(table, tmp_path / "file" / "table.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_table(example(pd.DataFrame({"x": range(1_000)})), path)
    write_table(example(pd.DataFrame({"x": [1]})), path)
    assert path.read_text() == "x\n1\n"


def test_fields_and_their_values_are_listed(random_store: Store) -> None:
    fields = known_fields(random_store, "run")
    assert {"lang", "label", "outcome", "topic", "a/b~c"} <= set(fields)
    assert not {"run_id", "prompt_id", "meta"} & set(fields)
    assert field_values(random_store, "run", "lang") == {"de": 24, "en": 24, "zh": 24}
    assert field_values(random_store, "run", "topic") == {"0": 24, "1": 24, "2": 24}
    assert field_values(random_store, "run", "outcome") == {}


def test_prompts_are_listed(random_store: Store) -> None:
    table = prompt_list(random_store, "run", filters=Filters(fields={"lang": ("en",)}))
    assert table.frame["prompt_id"].tolist() == list(range(1, 72, 3))
    assert set(table.frame["lang"]) == {"en"}
    assert table.frame["response"].isna().all()
