"""Where the data that comes with moescope lies: demo models and prompt sets.

The folder `datasets/` is package data without Python in it, so it is found by path; this works in
a wheel and in an editable install alike.
"""

from __future__ import annotations

from pathlib import Path

DATASETS = Path(__file__).resolve().parent.parent / "datasets"


def shipped_path(*parts: str) -> Path:
    """The path of something below `datasets/`; it need not exist."""
    return DATASETS.joinpath(*parts)


def shipped_prompt_sets() -> list[str]:
    """Names of the prompt sets that come with moescope, usable wherever a prompt file is."""
    return sorted(path.stem for path in shipped_path("prompts").glob("*.jsonl"))
