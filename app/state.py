"""What the pages share: the store, the chosen run, cached answers, the plan at hand.

A page asks `shown_run()` for the run that the sidebar chose and calls `analyze` on it. Results are
cached by store, run, state of the run and parameters; no connection or `Store` is ever kept (see
`moescope.probe.storage.locks`). This module and everything it imports at its top knows neither
torch nor scipy, so that the first page appears quickly.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app.server import STORE_VARIABLE
from moescope.probe.errors import InputError
from moescope.probe.storage.store import RunInfo, Store

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.analysis import AnalysisTable, Filters
    from moescope.steering import SteeringPlan

PROMPT_FIELDS: Final = (
    "key", "text", "rendered_text", "response", "outcome", "set_name", "label", "lang", "domain",
    "pair_id", "target", "span", "expected",
)  # fmt: skip
"""What the pages show of a prompt; further fields of a prompt file are in its meta."""

ANALYSIS: Final = ("moescope.probe.analysis", "moescope.probe.figures", "plotly.graph_objects")
"""Modules that every page but the first needs; see `import_ahead`."""

_NOT_GROUPS: Final = (
    "key", "text", "rendered_text", "response", "expected", "span", "pair_id", "detector",
    "num_tokens", "num_generated",
)  # fmt: skip
_WAIT_S: Final = 10.0
_SHOWN_RUN: Final = "_shown_run"
_PLAN: Final = "_plan"


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """The run that the pages show.

    Attributes:
        store: path of the store.
        info: the run's row in `runs`.
        recorded: prompts of the run that are in the store; fewer than planned while it runs.
    """

    store: Path
    info: RunInfo
    recorded: int

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.info.run_id

    @property
    def stamp(self) -> str:
        """Changes whenever the rows of the run do: part of every cache key."""
        return f"{self.info.created_at} {self.info.status} {self.info.finished_at} {self.recorded}"

    @property
    def has_answers(self) -> bool:
        """Whether answers were generated."""
        return int(self.info.manifest.get("arguments", {}).get("max_new_tokens") or 0) > 0

    @property
    def has_tokens(self) -> bool:
        """Whether the routing of single tokens was recorded, not only counts per prompt."""
        return self.info.record_level != "usage"


def store_path() -> Path:
    """The store that the server was started for.

    Raises:
        InputError: the server was not started by `moescope dashboard`.
    """
    given = os.environ.get(STORE_VARIABLE)
    if not given:
        raise InputError(
            f"no store was named; start the dashboard with `moescope dashboard --store FILE`, "
            f"or set {STORE_VARIABLE}"
        )
    return Path(given)


def open_store() -> Store:
    """The store, for queries now; nothing of it is kept open.

    Raises:
        StoreError: the file is missing, no store, or of another version.
        StoreBusyError: a writer kept it for too long.
    """
    return Store(store_path(), wait_s=_WAIT_S)


def choose_run(store: Store, run_id: str) -> ShownRun:
    """Make a run the one that all pages show."""
    info = store.run(run_id)
    run = ShownRun(store=store.path, info=info, recorded=recorded_prompts(store, info))
    st.session_state[_SHOWN_RUN] = run
    return run


def shown_run() -> ShownRun:
    """The run that the sidebar chose."""
    run: ShownRun = st.session_state[_SHOWN_RUN]
    return run


def all_runs() -> pd.DataFrame:
    """All runs, newest first, with the share of their planned prompts that is in the store."""
    store = open_store()
    frame = store.runs().drop(columns="manifest").iloc[::-1].reset_index(drop=True)
    shares = []
    for row in frame.to_dict("records"):
        planned = row["num_prompts"]
        if row["status"] == "complete" or not planned:
            shares.append(1.0)
        else:
            shares.append(recorded_prompts(store, store.run(row["run_id"])) / planned)
    frame.insert(list(frame).index("status") + 1, "recorded", shares)
    return frame


def recorded_prompts(store: Store, info: RunInfo) -> int:
    """How many prompts of a run are in the store."""
    if info.status == "complete" and info.num_prompts is not None:
        return info.num_prompts
    import_ahead(*ANALYSIS).join()
    from moescope.probe.analysis.selection import read_fields

    return len(read_fields(store, info.run_id, ()))


def analyze(
    run: ShownRun, name: str, *, filters: Filters | None = None, **parameters: Any
) -> AnalysisTable:
    """The answer of an analysis on a run, from the cache where it was asked before.

    Args:
        run: the run.
        name: as in `ANALYSES`.
        filters: which prompts and tokens count; the analysis' own default without them.
        parameters: of the analysis, plain data.

    Raises:
        MoescopeError: what the analysis raises.
    """
    key = json.dumps([filters and filters.to_json(), parameters], sort_keys=True)
    return _analyze(str(run.store), run.run_id, run.stamp, name, key, filters, parameters)


def prompts(run: ShownRun) -> pd.DataFrame:
    """The prompts of a run: `prompt_id`, `PROMPT_FIELDS` and comparable fields, missing as None."""
    further = [name for name in comparable_fields(run) if name not in PROMPT_FIELDS]
    return _fields(str(run.store), run.run_id, run.stamp, (*PROMPT_FIELDS, *further))


def field_values(run: ShownRun, name: str) -> pd.Series[str]:
    """One prompt field of a run as text, by prompt; also a key of `meta`."""
    return _fields(str(run.store), run.run_id, run.stamp, (name,))[name]


def prompt_counts(run: ShownRun, name: str) -> dict[str, int]:
    """How many prompts hold each value of a field, most first."""
    counts = field_values(run, name).value_counts()
    return {str(value): int(number) for value, number in counts.items()}


def has_field(run: ShownRun, name: str) -> bool:
    """Whether any prompt has a value of a field."""
    return bool(field_values(run, name).notna().any())


def comparable_fields(run: ShownRun) -> dict[str, list[str]]:
    """The prompt fields that split a run into between 2 and 60 groups, each with its values.

    Texts, keys and counts do not: they tell prompts apart, and group none.
    """
    return _comparable(str(run.store), run.run_id, run.stamp)


# What takes less is computed again, so that looking around does not fill a folder.
_WORTH_STORING_S: Final = 1.0


def forget_results() -> None:
    """Drop every cached result, so that the next look reads the store again."""
    _analyze.clear()
    _fields.clear()
    _comparable.clear()


def num_experts_of_a(table: AnalysisTable, *, confirmed_only: bool) -> int:
    """How many experts of a contrast group a uses more, and so could be masked."""
    frame = table.frame
    if confirmed_only:
        return int((frame["confirmed"] & (frame["effect"] > 0)).sum())
    return int((frame["risk_difference"] > 0).sum())


def plan_of(
    run: ShownRun, table: AnalysisTable, number: int, scope: str, confirmed_only: bool
) -> SteeringPlan:
    """A plan that masks the experts that group a of a contrast uses most beyond group b.

    Raises:
        PlanError: fewer experts than asked for fit the model's layers.
    """
    from moescope.steering.check import LayerShape
    from moescope.steering.controls import with_bottom
    from moescope.steering.derive import plan_from_contrast

    rows = open_store().layers(run.run_id)
    layers = [
        LayerShape(int(row["layer"]), row["kind"], int(row["num_experts"]), int(row["top_k"]))
        for row in rows.to_dict("records")
    ]
    first = table.frame.iloc[0]
    asked = table.context.parameters
    plan = plan_from_contrast(
        table.frame,
        num_mask=number,
        layers=layers,
        confirmed_only=confirmed_only,
        tokens=scope,  # type: ignore[arg-type]
        name=f"{table.title.removeprefix('Experts: ')}: {number} masked",
        model=run.info.model,
        provenance={
            "run": run.run_id,
            "method": asked["method"],
            "a": asked["a"],
            "b": asked["b"],
            "n_a": int(first["num_prompts_a"]),
            "n_b": int(first["num_prompts_b"]),
            "where": table.context.filters["fields"],
            "counted": table.context.selection,
            "seed": asked["seed"],
        },
    )
    return with_bottom(plan, layers, table.frame)


def longest_answer(run: ShownRun) -> int:
    """The tokens that an answer of the run could have; 32 where it generated none."""
    return int(run.info.manifest.get("arguments", {}).get("max_new_tokens") or 32)


def num_answered_otherwise(run: ShownRun, answers: Mapping[int, str], longest: int) -> int:
    """How many greedy answers differ from those that the run recorded for the same prompts.

    Args:
        run: the run.
        answers: prompt id -> what the model wrote now.
        longest: the tokens allowed for it; answers of another length are not compared.
    """
    arguments = run.info.manifest.get("arguments", {})
    sampled = arguments.get("sampling", {}).get("do_sample", False)
    if sampled or arguments.get("max_new_tokens") != longest:
        return 0
    recorded = prompts(run).set_index("prompt_id")["response"]
    return sum(text != recorded[prompt_id] for prompt_id, text in answers.items())


def is_held_out(plan: SteeringPlan, run: ShownRun, kept: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether no prompt with these values can have taken part in making a plan.

    True for plans of other runs and plans by hand, and where both kept other values of one field.
    """
    if plan.provenance.get("run") != run.run_id:
        return True
    where = plan.provenance.get("where")
    if not isinstance(where, dict):
        return False
    return any(
        isinstance(values, list) and name in kept and not set(values) & set(kept[name])
        for name, values in where.items()
    )


@st.cache_resource(show_spinner=False)
def import_ahead(*names: str) -> threading.Thread:
    """Import modules in a thread while the page is being read, once in the life of the server.

    Whoever then needs one of them joins the thread first: packages that import their parts lazily
    or in circles show themselves half made to a second thread.
    """
    thread = threading.Thread(target=lambda: [import_module(name) for name in names], daemon=True)
    thread.start()
    return thread


def keep_plan(plan: SteeringPlan) -> None:
    """Make a plan the one at hand on the steering page."""
    st.session_state[_PLAN] = plan.to_json()


def kept_plan() -> SteeringPlan | None:
    """The plan at hand, if there is one."""
    text = st.session_state.get(_PLAN)
    if text is None:
        return None
    from moescope.steering import SteeringPlan

    return SteeringPlan.parse(text, source="the plan at hand")


def drop_plan() -> None:
    """Have no plan at hand."""
    st.session_state.pop(_PLAN, None)


@st.cache_data(show_spinner=False, max_entries=200)
def _analyze(
    path: str,
    run_id: str,
    stamp: str,
    name: str,
    key: str,
    _filters: Filters | None,
    _parameters: Mapping[str, Any],
) -> AnalysisTable:
    # Streamlit leaves arguments with an underscore out of the cache key; `key` stands for them.
    import_ahead(*ANALYSIS).join()
    from moescope.probe.analysis import answer, find_analysis

    analysis = find_analysis(name)
    store = Store(path, wait_s=_WAIT_S)
    found = answer(
        store,
        run_id,
        analysis,
        filters=_filters or analysis.filters,
        arguments=_parameters,
        worth_s=_WORTH_STORING_S,
    )
    return found.table


@st.cache_data(show_spinner=False, max_entries=50)
def _fields(path: str, run_id: str, stamp: str, names: tuple[str, ...]) -> pd.DataFrame:
    import_ahead(*ANALYSIS).join()
    from moescope.probe.analysis.selection import read_fields

    frame = read_fields(Store(path, wait_s=_WAIT_S), run_id, names).astype(object)
    return frame.where(frame.notna(), None)


@st.cache_data(show_spinner=False, max_entries=20)
def _comparable(path: str, run_id: str, stamp: str) -> dict[str, list[str]]:
    import_ahead(*ANALYSIS).join()
    from moescope.probe.analysis.selection import known_fields, read_fields

    store = Store(path, wait_s=_WAIT_S)
    fields = [name for name in known_fields(store, run_id) if name not in _NOT_GROUPS]
    frame = read_fields(store, run_id, fields).drop(columns="prompt_id")
    values = {str(name): sorted(frame[name].dropna().unique()) for name in frame}
    return {name: found for name, found in values.items() if 2 <= len(found) <= 60}
