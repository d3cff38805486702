"""The model of a run, loaded to answer on the steering page; nothing else on pages needs torch.

Hooks of steering sit on the model itself, so one model answers one request at a time: whoever asks
takes its lock. Models are read from this machine only (`moescope.app.server` sets HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.probe.errors import InputError, ModelInputError

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.models import ModelBundle
    from moescope.probe.prompts import Prompt
    from moescope.steering import SteeringPlan
    from moescope.steering.evaluation import EvaluationResult
    from moescope.steering.generate import Comparison

MODEL: Final = (
    "moescope.steering.evaluate",
    "moescope.probe.models",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
)
"""Modules that answering needs; they take seconds, so they are imported ahead."""

_DTYPES = ("float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LiveModel:
    """A loaded model, and the lock that whoever uses it holds."""

    bundle: ModelBundle
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Answers:
    """One prompt answered three ways; what needs a plan is None without one.

    Attributes:
        compared: unsteered, and steered by the plan.
        control: steered by random experts of the same layers in the same numbers.
    """

    compared: Comparison
    control: Comparison | None


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, the prompts it was made on, and how many could not be asked again."""

    result: EvaluationResult
    prompt_ids: tuple[int, ...]
    left_out: int


def is_loaded(run: state.ShownRun) -> bool:
    """Whether this server has the run's model in memory."""
    return st.session_state.get("_live_model") == _name(run)


@contextmanager
def live_model(run: state.ShownRun) -> Iterator[ModelBundle]:
    """The run's model, loaded when first asked for, for the length of a block.

    Raises:
        ModelInputError: the model is not on this machine, or cannot be loaded.
    """
    state.import_ahead(*MODEL).join()
    dtype = str(run.info.manifest.get("dtype", "auto"))
    try:
        model = _load(run.info.model, run.info.revision, dtype if dtype in _DTYPES else "auto")
    except ModelInputError as error:
        if _HUB_ID.fullmatch(run.info.model) is None:
            raise
        raise ModelInputError(
            f"{error}; the dashboard downloads nothing: fetch the model first with "
            f"`moescope doctor {_name(run)}`"
        ) from error
    st.session_state["_live_model"] = _name(run)
    with model.lock:
        yield model.bundle


def answer(
    run: state.ShownRun,
    prompt: Prompt,
    plan: SteeringPlan | None,
    *,
    max_new_tokens: int,
    control_seed: int,
) -> Answers:
    """Answer one prompt greedily: unsteered, steered, and steered by random experts.

    Raises:
        MoescopeError: the model cannot be loaded, or the plan does not fit it.
    """
    rendering = _rendering(run)
    with live_model(run) as bundle:
        from moescope.probe.routers import find_routers
        from moescope.steering.derive import random_plan
        from moescope.steering.generate import compare

        compared = compare(bundle, [prompt], plan, max_new_tokens=max_new_tokens, **rendering)
        if plan is None or not plan.interventions:
            return Answers(compared, None)
        layers = [site.info for site in find_routers(bundle.model)]
        control = random_plan(plan, layers, control_seed)
        beside = compare(bundle, [prompt], control, max_new_tokens=max_new_tokens, **rendering)
        return Answers(compared, beside)


def evaluate(
    run: state.ShownRun,
    plan: SteeringPlan,
    frame: pd.DataFrame,
    *,
    neutral_label: str,
    num_controls: int,
    progress: Callable[[int, int], None],
) -> Evaluated:
    """Answer prompts of a run unsteered, steered and with random experts, and compare.

    Raises:
        MoescopeError: the model cannot be loaded, or the plan does not fit it.
    """
    with live_model(run) as bundle:
        from moescope.steering.evaluate import evaluate_plan

        prompts = _askable(bundle, run, frame)
        result = evaluate_plan(
            bundle,
            plan,
            prompts,
            neutral_label=neutral_label,
            num_controls=num_controls,
            max_new_tokens=state.longest_answer(run),
            progress=progress,
            **_rendering(run),
        )
    numbers = tuple(prompt.prompt_id for prompt in prompts)
    return Evaluated(result, numbers, len(frame) - len(prompts))


def _askable(bundle: ModelBundle, run: state.ShownRun, frame: pd.DataFrame) -> list[Prompt]:
    """The prompts of a run that can be asked again exactly as they were.

    The store keeps a prompt's last message alone, so a prompt with earlier turns is left out: its
    text comes out otherwise than it was recorded.
    """
    from moescope.probe.rendering import render_prompt

    kept: list[Prompt] = []
    for _, row in frame.iterrows():
        prompt = prompt_of(row)
        rendered = render_prompt(bundle.tokenizer, prompt, **_rendering(run))
        if rendered.text == row["rendered_text"]:
            kept.append(prompt)
    if not kept:
        raise InputError(
            "none of these prompts can be asked again as it was recorded: all have earlier turns, "
            "of which the store keeps the last alone"
        )
    return kept


def prompt_of(row: pd.Series[Any]) -> Prompt:
    """A prompt of a run, as it can be asked again."""
    from moescope.probe.prompts import Prompt

    names = ("key", "text", "set_name", "label", "lang", "domain", "pair_id", "target", "span",
             "expected")  # fmt: skip
    return Prompt(prompt_id=int(row["prompt_id"]), **{name: row[name] for name in names})


def _rendering(run: state.ShownRun) -> dict[str, Any]:
    """How the run's prompts became text, so that new ones become text the same way."""
    arguments = run.info.manifest.get("arguments", {})
    return {
        "chat_template": arguments.get("chat_template", "auto"),
        "system": arguments.get("system"),
    }


def _name(run: state.ShownRun) -> str:
    return run.info.model if run.info.revision is None else f"{run.info.model}@{run.info.revision}"


@st.cache_resource(show_spinner=False, max_entries=1)
def _load(name: str, revision: str | None, dtype: str) -> LiveModel:
    from moescope.probe.models import load_model

    return LiveModel(load_model(name, revision=revision, dtype=dtype))
