"""The prompts of a run, how one of them was routed, and one of its tokens in detail.

The latter two read `routing`, so the run must hold it (`--record topk`). Nothing is averaged here.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moescope.probe.analysis.columns import EXPERT, KIND, LAYER
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.frame import AnalysisTable, Column
from moescope.probe.analysis.selection import Selection, select
from moescope.probe.analysis.token_filters import router_condition
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

_POSITION = Column(
    name="position",
    unit="tokens",
    range="0 or more",
    definition="Position in the sequence without padding, prompt and answer together.",
)
_TOKEN = Column(name="token", unit="", range="text", definition="The input token, as text.")
_RANK = Column(
    name="rank",
    unit="",
    range="[0, K-1]; missing when neither scores nor weights are known",
    definition="0 is the expert with the highest selection score; without scores, with the "
    "largest weight, ties to the lowest id.",
)
_WEIGHT = Column(
    name="weight",
    unit="",
    range="0 or more",
    definition="Routing weight: what multiplied the expert's output; 0 for a dropped slot.",
)

LIST_COLUMNS = (
    Column(
        name="prompt_id",
        unit="",
        range="0 or more",
        definition="Order of the prompt over the files of the run.",
    ),
    Column(name="key", unit="", range="text; may be missing", definition="The file's id."),
    Column(name="text", unit="", range="text", definition="What the user wrote."),
    Column(name="set_name", unit="", range="text", definition="The prompt set it comes from."),
    *(
        Column(
            name=name,
            unit="",
            range="text; may be missing",
            definition=f"The field {name} of the prompt file.",
        )
        for name in ("label", "lang", "domain", "pair_id")
    ),
    Column(name="num_tokens", unit="tokens", range="1 or more", definition="Tokens of the prompt."),
    Column(
        name="num_generated", unit="tokens", range="0 or more", definition="Tokens of the answer."
    ),
    Column(
        name="response",
        unit="",
        range="text; missing when nothing was generated",
        definition="What the model wrote.",
    ),
    Column(
        name="outcome",
        unit="",
        range="correct, other, partial, refused or broken; missing without a response",
        definition="How the answer was judged.",
    ),
)

PROMPT_COLUMNS = (
    _POSITION,
    _TOKEN,
    Column(
        name="phase", unit="", range="prompt or generated", definition="Phase of the input token."
    ),
    Column(
        name="segment",
        unit="",
        range="system, user, template, thinking or answer",
        definition="What part of the conversation the token belongs to.",
    ),
    Column(
        name="is_special",
        unit="",
        range="true or false",
        definition="Whether it is a special token.",
    ),
    LAYER,
    KIND,
    Column(
        name="top_expert",
        unit="",
        range="[0, E-1]; missing when rank is not known",
        definition="The expert of rank 0.",
    ),
    Column(
        name="top_weight",
        unit="",
        range="0 or more; missing when rank is not known",
        definition="Routing weight of the expert of rank 0.",
    ),
    Column(
        name="weight_sum",
        unit="",
        range="0 or more",
        definition="Sum of the token's routing weights at this router.",
    ),
    Column(
        name="weight_entropy",
        unit="share of ln K",
        range="[0, 1]; 1 when all selected experts weigh the same; missing without weights",
        definition="Entropy of the token's routing weights, divided by their sum, over ln of the "
        "number of its slots (not the router's entropy over all E experts).",
    ),
    Column(
        name="num_slots", unit="slots", range="1 or more", definition="Experts the token selected."
    ),
    Column(
        name="experts",
        unit="",
        range="expert ids in order of rank",
        definition="The experts the token selected.",
    ),
)

TOKEN_COLUMNS = (
    LAYER,
    KIND,
    _RANK,
    EXPERT,
    _WEIGHT,
    Column(
        name="weight_share",
        unit="share of the token's routing weight",
        range="[0, 1]; missing when all weights are 0 or unknown",
        definition="Routing weight over the sum of the token's weights at this router.",
    ),
    Column(
        name="weight_share_chance",
        unit="share of the token's routing weight",
        range="1 / number of slots",
        definition="Weight share if all selected experts weighed the same.",
    ),
)


def prompt_list(store: Store, run_id: str, *, filters: Filters | None = None) -> AnalysisTable:
    """One row per prompt: its text, fields, lengths and outcome.

    Args:
        store: where the run lies.
        run_id: the run.
        filters: its fields choose prompts; what it says of tokens and routers does not apply.

    Raises:
        AnalysisInputError: for an unknown field, or when no prompt is left.
    """
    kept = Filters(fields=(filters or Filters()).fields, content_only=False)
    selection = select(store, run_id, kept)
    names = [column.name for column in LIST_COLUMNS]
    frame = store.query(
        f"SELECT {', '.join(names)} FROM prompts WHERE run_id = ? ORDER BY prompt_id", [run_id]
    )
    frame = frame[frame["prompt_id"].isin(selection.prompt_ids)].reset_index(drop=True)
    texts = [name for name in names if name not in ("prompt_id", "num_tokens", "num_generated")]
    return AnalysisTable(
        name="prompts",
        title="Prompts and answers",
        frame=frame.astype(dict.fromkeys(texts, "str")),
        columns=LIST_COLUMNS,
        context=selection.context(
            num_prompts=len(frame),
            num_tokens=int(frame["num_tokens"].sum() + frame["num_generated"].sum()),
            parameters={},
        ),
        notes=selection.notes,
    )


def prompt_routing(
    store: Store, run_id: str, *, prompt_id: int, filters: Filters | None = None
) -> AnalysisTable:
    """One row per routed token and router of a prompt.

    Args:
        store: where the run lies.
        run_id: the run.
        prompt_id: the prompt.
        filters: its layers and kind are kept; its prompt and token conditions do not apply here,
            because every token is shown.

    Raises:
        AnalysisInputError: when the run has no such prompt, or holds no routing rows.
    """
    selection = _one_prompt(store, run_id, prompt_id, filters)
    frame = store.query(
        f"""
        WITH slots AS (
            SELECT position, layer, kind, rank, expert, weight,
                   sum(weight) OVER (PARTITION BY position, layer, kind) AS total
            FROM routing
            WHERE run_id = ? AND prompt_id = ? AND {router_condition(selection.routers)}
        ), used AS (
            SELECT position, layer, kind,
                   min(expert) FILTER (rank = 0) AS top_expert,
                   min(weight) FILTER (rank = 0) AS top_weight,
                   sum(weight) AS weight_sum,
                   -sum(CASE WHEN total > 0 AND weight > 0
                        THEN weight / total * ln(weight / total) END) / nullif(ln(count(*)), 0)
                       AS weight_entropy,
                   count(*) AS num_slots,
                   list(expert ORDER BY rank, expert) AS experts
            FROM slots GROUP BY ALL
        )
        SELECT t.position, t.token, t.phase, t.segment, t.is_special, u.layer, u.kind,
               u.top_expert, u.top_weight, u.weight_sum, u.weight_entropy, u.num_slots, u.experts
        FROM used u JOIN tokens t ON t.position = u.position
        WHERE t.run_id = ? AND t.prompt_id = ?
        ORDER BY u.kind, t.position, u.layer
        """,
        [run_id, prompt_id, run_id, prompt_id],
    )
    _require_rows(frame, selection, f"prompt {prompt_id}")
    frame["top_expert"] = frame["top_expert"].astype("Int64")
    for name in ("top_weight", "weight_sum", "weight_entropy"):
        frame[name] = frame[name].astype(np.float64)
    return AnalysisTable(
        name="prompt",
        title=f"Routing of prompt {prompt_id}",
        frame=frame,
        columns=PROMPT_COLUMNS,
        context=selection.context(
            num_prompts=1,
            num_tokens=int(frame["position"].nunique()),
            parameters={"prompt_id": prompt_id},
        ),
        notes=selection.notes,
    )


def token_routing(
    store: Store, run_id: str, *, prompt_id: int, position: int, filters: Filters | None = None
) -> AnalysisTable:
    """One row per slot of one token: its experts and weights at every router.

    Args:
        store: where the run lies.
        run_id: the run.
        prompt_id: the prompt.
        position: the token, counted from 0 over prompt and answer.
        filters: its layers and kind are kept; its prompt and token conditions do not apply here.

    Raises:
        AnalysisInputError: when there is no such prompt or routed token, or no routing rows.
    """
    selection = _one_prompt(store, run_id, prompt_id, filters)
    frame = store.query(
        f"""
        SELECT layer, kind, rank, expert, weight,
               weight / nullif(sum(weight) OVER same, 0) AS weight_share,
               1 / count(*) OVER same AS weight_share_chance
        FROM routing
        WHERE run_id = ? AND prompt_id = ? AND position = ?
              AND {router_condition(selection.routers)}
        WINDOW same AS (PARTITION BY layer, kind)
        ORDER BY kind, layer, rank, expert
        """,
        [run_id, prompt_id, position],
    )
    _require_rows(frame, selection, f"position {position} of prompt {prompt_id}")
    frame["rank"] = frame["rank"].astype("Int64")
    for name in ("weight", "weight_share", "weight_share_chance"):
        frame[name] = frame[name].astype(np.float64)
    token = store.query(
        "SELECT token FROM tokens WHERE run_id = ? AND prompt_id = ? AND position = ?",
        [run_id, prompt_id, position],
    )["token"].iloc[0]
    return AnalysisTable(
        name="token",
        title=f"Experts of token {token!r} at position {position} of prompt {prompt_id}",
        frame=frame,
        columns=TOKEN_COLUMNS,
        context=selection.context(
            num_prompts=1,
            num_tokens=1,
            parameters={"prompt_id": prompt_id, "position": position},
        ),
        notes=selection.notes,
        summary={"token": str(token)},
    )


def _one_prompt(store: Store, run_id: str, prompt_id: int, filters: Filters | None) -> Selection:
    """All tokens at the routers that the filters keep, once the prompt is known to exist."""
    kept = filters or Filters()
    selection = select(
        store, run_id, Filters(layers=kept.layers, kind=kept.kind, content_only=False)
    )
    ids = selection.prompt_ids
    if prompt_id not in ids:
        raise AnalysisInputError(
            f"run {run_id!r} has no prompt {prompt_id}; its prompts are {ids[0]} to {ids[-1]}"
        )
    selection.require_routing("this view")
    return selection


def _require_rows(frame: pd.DataFrame, selection: Selection, what: str) -> None:
    if frame.empty:
        raise AnalysisInputError(
            f"{what} in run {selection.run_id!r} has no routing; a routed position is right"
        )
