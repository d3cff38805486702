"""Tasks of lm-evaluation-harness: finding them by name, and what a plan may ask of them.

The harness (package `lm_eval`) is an extra; nothing here imports it before it is used.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from moescope.probe.errors import InputError, PlanError
from moescope.steering.interventions import Replay
from moescope.steering.plan import SteeringPlan
from moescope.steering.report import scope_in_words

_WITH_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
_LOUD = ("lm_eval", "datasets", "huggingface_hub", "httpx", "httpx2", "evaluate")


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks, loaded with their data.

    Attributes:
        given: what was asked for, as `simple_evaluate` takes it: tasks and groups of tasks.
        tasks: every single task by name.
        manager: the harness' index of tasks; it would read its own again for each call.
    """

    given: tuple[Any, ...]
    tasks: dict[str, Any]
    manager: Any


def require_harness() -> str:
    """The version of lm_eval.

    Raises:
        InputError: it is not installed.
    """
    try:
        import_module("lm_eval")
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness cannot be imported ({error}); install it with "
            "pip install 'moescope[lm-eval]'"
        ) from error
    from importlib.metadata import version

    return version("lm_eval")


def load_tasks(names: Sequence[str], include: Sequence[str | Path] = ()) -> HarnessTasks:
    """Load tasks, groups or tags by name, with their data.

    Data that are not on this machine are downloaded by the harness; tasks of your own folders with
    local data need no network.

    Args:
        names: tasks, groups or tags.
        include: folders with more tasks (YAML files), which win over the harness' own.

    Raises:
        InputError: no such folder or task, a task that cannot be loaded, or one that is not for
            language models or runs what the model wrote.
    """
    require_harness()
    for folder in include:
        if not Path(folder).is_dir():
            raise InputError(f"{folder} is no folder; tasks are YAML files in a folder")
    if not names:
        raise InputError("name at least one task")
    with quiet():
        manager = _manager(names, [str(folder) for folder in include])
        given: list[Any] = []
        tasks: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            loaded = _load(manager, name)
            own = loaded["groups"].get(name)
            given += [own] if own is not None else loaded["tasks"].values()
            if twice := sorted(set(tasks) & set(loaded["tasks"])):
                raise InputError(f"task {twice[0]} is asked for twice; name it once")
            tasks |= loaded["tasks"]
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name} runs code that the model writes; moescope does not")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} needs images; moescope runs tasks on text")
    return HarnessTasks(tuple(given), tasks, manager)


def check_tasks(plan: SteeringPlan, tasks: HarnessTasks) -> None:
    """Refuse what a plan cannot mean in these tasks, before anything runs.

    Raises:
        PlanError: the plan is for certain prompts of a run, or replays one; or it tells prompt and
            answer apart, and a task scores whole texts, which have neither.
    """
    whole = [name for name, task in tasks.tasks.items()
             if task.OUTPUT_TYPE == "loglikelihood_rolling"]  # fmt: skip
    for number, one in enumerate(plan.interventions, start=1):
        if one.prompt_ids is not None:
            raise PlanError(
                f"intervention {number} is for certain prompts (prompt_ids), and the requests of "
                "a task are not prompts of a run; leave prompt_ids out"
            )
        if isinstance(one, Replay):
            raise PlanError(
                f"intervention {number} replays run {one.run!r}, and the requests of a task are "
                "not prompts of a run; use another action"
            )
        if whole and one.tokens != "all":
            raise PlanError(
                f"intervention {number} acts on tokens {scope_in_words(one.tokens)!r}, and task "
                f"{whole[0]} scores whole texts, which are neither prompt nor answer; "
                "use tokens 'all'"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness' log lines, bars and prints out of what commands print.

    Also its look at the machine, which runs `pip` and others for seconds after every call.
    """
    evaluator = import_module("lm_eval.evaluator")
    modules = [import_module(name) for name in _WITH_BARS]
    datasets = import_module("datasets")
    with ExitStack() as stack:
        for name in _LOUD:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        for module in modules:
            stack.callback(setattr, module, "tqdm", module.tqdm)
            module.__dict__["tqdm"] = partial(_without_bar, module.tqdm)
        stack.callback(setattr, evaluator, "add_env_info", evaluator.add_env_info)
        evaluator.__dict__["add_env_info"] = lambda _results: None
        if not datasets.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _without_bar(bar: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A progress bar of the harness that is not shown; it asks for it outright."""
    return bar(*args, **{**options, "disable": True})


def _manager(names: Sequence[str], include: list[str]) -> Any:
    """The harness' index; its own 14,000 tasks take seconds to read, so only where needed."""
    from lm_eval.tasks import TaskManager

    if include:
        own = TaskManager(include_path=include, include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    manager = TaskManager(include_path=include or None)
    for name in names:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=4, cutoff=0.5)
            said = f"; near it: {', '.join(near)}" if near else ""
            raise InputError(f"the harness has no task {name!r}{said}")
    return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
    """A task with its data, or all of a group."""
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        is_download = isinstance(error, ConnectionError) or "Offline" in type(error).__name__
        hint = "; its data must be downloaded, which needs a network" if is_download else ""
        raise InputError(f"task {name} cannot be loaded: {reason}{hint}") from error
    return loaded
