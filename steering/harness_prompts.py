"""Tasks for lm-evaluation-harness out of prompt sets with known answers.

Each label of a set becomes two tasks, `SET_LABEL_choice` (the likeliest of several answers) and
`SET_LABEL_answer` (the written answer, exact match), so that what a plan does to each label is seen
by itself. A task is a YAML file beside a JSONL file; `lm_eval --include_path` reads them too.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

from moescope.probe.errors import InputError
from moescope.probe.prompts import Prompt

#: Answers to choose from, the right one included.
NUM_CHOICES: Final = 4


def write_prompt_tasks(
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    num_choices: int = NUM_CHOICES,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> list[str]:
    """Write the tasks of prompts into a folder.

    Wrong choices are right answers to other prompts, drawn at random: of the same set, language
    and domain as far as these have enough, else of the same set and language, else of all prompts.
    Prompts without a known answer are left out.

    Args:
        prompts: what to ask; `expected` is right.
        folder: made when missing; files of the same names are written anew.
        num_choices: answers to choose from; fewer where there are fewer different ones.
        max_new_tokens: written answers are cut here.
        seed: of the draw; each prompt has its own, so other prompts do not change it.

    Returns:
        The names of the tasks.

    Raises:
        InputError: no prompt has a known answer, all have the same, two labels would give one
            name, a prompt has several turns, or the folder cannot be written.
    """
    known = [prompt for prompt in prompts if prompt.expected is not None]
    if not known:
        raise InputError("no prompt says what is right; tasks need prompts with the field 'answer'")
    for prompt in known:
        if prompt.messages is not None and len(prompt.messages) > 1:
            raise InputError(
                f"prompt {prompt.key or prompt.prompt_id} has several turns, and a task asks a "
                "single text; leave it out"
            )
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in known:
        name = _task_name(prompt)
        if groups[name] and groups[name][0].label != prompt.label:
            raise InputError(
                f"labels {groups[name][0].label!r} and {prompt.label!r} give the same task name "
                f"{name}; rename one"
            )
        groups[name].append(prompt)
    draw = _Choices(known, num_choices, seed)
    documents = {
        name: [_document(prompt, draw.of(prompt)) for prompt in members]
        for name, members in groups.items()
    }
    try:
        return _write(documents, Path(folder).resolve(), max_new_tokens)
    except OSError as error:
        raise InputError(
            f"tasks cannot be written into {folder} ({error.strerror or error})"
        ) from error


class _Choices:
    """Draws wrong answers for prompts."""

    def __init__(self, prompts: Sequence[Prompt], num_choices: int, seed: int) -> None:
        self._num_wrong = num_choices - 1
        self._seed = seed
        pools: dict[tuple[str | None, ...], dict[str, str]] = defaultdict(dict)
        for prompt in prompts:
            for key in _pool_keys(prompt):
                pools[key].setdefault(_plain(prompt.expected), str(prompt.expected))
        self._pools = {
            key: {plain: answers[plain] for plain in sorted(answers)}
            for key, answers in pools.items()
        }

    def of(self, prompt: Prompt) -> tuple[list[str], int]:
        """The choices of a prompt, and which of them is right."""
        others: list[str] = []
        for key in _pool_keys(prompt):
            pool = self._pools[key]
            others = [pool[plain] for plain in pool if plain != _plain(prompt.expected)]
            if len(others) >= self._num_wrong:
                break
        if not others:
            raise InputError(
                f"all prompts have the same answer {prompt.expected!r}; wrong choices are answers "
                "to other prompts"
            )
        chance = Random(f"{self._seed} {prompt.set_name} {prompt.key or prompt.prompt_id}")
        choices = chance.sample(others, min(self._num_wrong, len(others)))
        right = chance.randint(0, len(choices))
        choices.insert(right, str(prompt.expected))
        return choices, right


def _pool_keys(prompt: Prompt) -> tuple[tuple[str | None, ...], ...]:
    """Where wrong answers come from, closest first."""
    return (
        (prompt.set_name, prompt.lang, prompt.domain),
        (prompt.set_name, prompt.lang),
        (),
    )


def _plain(answer: str | None) -> str:
    return " ".join(str(answer).casefold().split())


def _task_name(prompt: Prompt) -> str:
    words = [prompt.set_name, *([] if prompt.label is None else [prompt.label])]
    return "_".join(re.sub(r"\W+", "_", word).strip("_") for word in words)


def _document(prompt: Prompt, choices: tuple[list[str], int]) -> dict[str, Any]:
    return {
        "id": prompt.key or str(prompt.prompt_id),
        "prompt": prompt.text,
        "answer": prompt.expected,
        "choices": choices[0],
        "right": choices[1],
        "lang": prompt.lang,
        "label": prompt.label,
        "domain": prompt.domain,
        "pair_id": prompt.pair_id,
    }


def _write(
    documents: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, max_new_tokens: int
) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for name, found in documents.items():
        data = folder / f"{name}.jsonl"
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in found]
        data.write_text("".join(lines), encoding="utf-8")
        for kind, own in (("choice", _CHOICE), ("answer", _answer(max_new_tokens))):
            common = _COMMON | {
                "task": f"{name}_{kind}",
                "dataset_kwargs": {
                    "data_files": {"test": str(data)}, "cache_dir": str(folder / "cache"),
                },
            }  # fmt: skip
            text = json.dumps(common | own, ensure_ascii=False, indent=1)  # JSON is YAML
            (folder / f"{name}_{kind}.yaml").write_text(text + "\n", encoding="utf-8")
            names.append(f"{name}_{kind}")
    return names


# Examples for few-shot prompts would have to come from the prompts that are asked, and their pairs
# would give answers away: there are none.
_COMMON: Final[dict[str, Any]] = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "prompt",
    "num_fewshot": 0,
    "metadata": {"version": 1},
}
_CHOICE: Final[dict[str, Any]] = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ],
}


def _answer(max_new_tokens: int) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": ["\n\n"], "do_sample": False, "max_gen_toks": max_new_tokens,
        },
        "filter_list": [
            {"name": "none", "filter": [{"function": "remove_whitespace"},
                                        {"function": "take_first"}]},
        ],
        "metric_list": [
            {
                "metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                "ignore_case": True, "ignore_punctuation": True,
            },
        ],
    }  # fmt: skip
