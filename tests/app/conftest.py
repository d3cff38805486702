"""What the dashboard's tests share: a store that was really recorded, and the app on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

MAIN = Path(__file__).resolve().parents[2] / "app" / "main.py"
QUESTIONS = {
    "en": "What happened in {place} in {year}?",
    "de": "Was geschah {year} in {place}?",
    "fr": "Que se passa-t-il à {place} en {year} ?",
}


def prompt_lines() -> list[dict[str, Any]]:
    """24 questions: 8 contents in three languages, half of them labeled sensitive."""
    contents = [(place, year) for place in ("Arlen", "Bosk") for year in (1901, 1925, 1950, 1975)]
    return [
        {
            "id": f"{lang}-{number}",
            "prompt": question.format(place=place, year=year),
            "lang": lang,
            "pair_id": f"fact-{number}",
            "label": "sensitive" if number % 2 else "neutral",
            "answer": f"the fair of {place}",
            "template": number % 4,
        }
        for number, (place, year) in enumerate(contents)
        for lang, question in QUESTIONS.items()
    ]


@pytest.fixture(scope="session")
def saved_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], byte_tokenizer: Any
) -> Path:
    """A tiny random model in a directory, as a user would have one."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("qwen3_moe", norm_topk_prob=True).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recorded_store(tmp_path_factory: pytest.TempPathFactory, saved_model: Path) -> Path:
    """A store with two runs of that model: `counts` (usage, no answers), then `base` (tokens)."""
    from moescope.probe.models import load_model
    from moescope.probe.prompts import read_prompts
    from moescope.probe.trace import TraceOptions, trace_prompts

    folder = tmp_path_factory.mktemp("store")
    file = folder / "facts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in prompt_lines()))
    bundle = load_model(str(saved_model))
    store = folder / "runs.duckdb"
    trace_prompts(bundle, read_prompts([file]), store, "counts", TraceOptions(level="usage"))
    trace_prompts(bundle, read_prompts([file]), store, "base", TraceOptions(max_new_tokens=6))
    return store


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AppTest]]:
    """Opens a page of the dashboard on a store; query parameters as keywords."""

    def opened(store: Path, page: str = "runs", **query: str) -> AppTest:
        monkeypatch.setenv("MOESCOPE_STORE", str(store))
        app = AppTest.from_file(str(MAIN), default_timeout=60)
        app.query_params.update(query)
        app.run()
        if page != "runs":
            app.query_params.update(query)
            app.switch_page(f"views/{page}.py").run()
        return app

    yield opened


def texts(app: AppTest) -> str:
    """All that the page says in words, one element a line."""
    kinds = ("title", "header", "subheader", "caption", "markdown", "info", "warning", "error")
    return "\n".join(element.value for kind in kinds for element in app.get(kind))


def figures(app: AppTest) -> list[dict[str, Any]]:
    """The figures of the page as plotly's JSON."""
    return [json.loads(element.proto.spec) for element in app.get("plotly_chart")]
