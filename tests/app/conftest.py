"""What the dashboard's tests share: a store that was really recorded, and the app on it."""

from __future__ import annotations

import json
from collections.abc import Callable
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
CONTENTS = [(place, year) for place in ("Arlen", "Bosk") for year in (1901, 1925, 1950, 1975)]


def question(number: int, lang: str) -> dict[str, Any]:
    place, year = CONTENTS[number]
    return {
        "id": f"{lang}-{number}",
        "prompt": QUESTIONS[lang].format(place=place, year=year),
        "lang": lang,
        "pair_id": f"fact-{number}",
        "label": "sensitive" if number % 2 else "neutral",
        "answer": f"the fair of {place}",
        "template": number % 4,
    }


@pytest.fixture(scope="session")
def saved_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], byte_tokenizer: Any
) -> Path:
    """A tiny random model in a directory, as a user would have one."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("qwen3_moe", norm_topk_prob=True, max_position_embeddings=512).save_pretrained(
        folder
    )
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recorded_store(tmp_path_factory: pytest.TempPathFactory, saved_model: Path) -> Path:
    """Three runs of that model, the last one complete in every respect.

    `plain`: prompts without any field, the last one long; `counts`: level usage, no answers;
    `base`: 24 questions (8 contents in 3 languages) with tokens and answers.
    """
    from moescope.probe.models import load_model
    from moescope.probe.prompts import read_prompts
    from moescope.probe.trace import TraceOptions, trace_prompts

    folder = tmp_path_factory.mktemp("store")
    facts, plain = folder / "facts.jsonl", folder / "plain.jsonl"
    lines = [question(number, lang) for number in range(len(CONTENTS)) for lang in QUESTIONS]
    facts.write_text("\n".join(json.dumps(line) for line in lines))
    texts = ["One.", "Two.", "A long one. " * 30]
    plain.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    bundle = load_model(str(saved_model))
    store = folder / "runs.duckdb"
    answers = TraceOptions(max_new_tokens=6)
    trace_prompts(bundle, read_prompts([plain]), store, "plain")
    trace_prompts(bundle, read_prompts([facts]), store, "counts", TraceOptions(level="usage"))
    trace_prompts(bundle, read_prompts([facts]), store, "base", answers)
    return store


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Opens a page of the dashboard on a store; query parameters as keywords."""

    def opened(store: Path, page: str = "runs", **query: str) -> AppTest:
        monkeypatch.setenv("MOESCOPE_STORE", str(store))
        app = AppTest.from_file(str(MAIN), default_timeout=60)
        app.query_params.update(query)
        app.run()
        if page != "runs":
            app.query_params.clear()
            app.query_params.update(query)
            app.switch_page(f"views/{page}.py").run()
        return app

    return opened


@pytest.fixture
def texts() -> Callable[[AppTest], str]:
    """All that a page says in words, one element a line, as it reads without Markdown's escapes."""

    def said(app: AppTest) -> str:
        kinds = ("title", "header", "subheader", "caption", "markdown", "text",
                 "info", "warning", "error", "success")  # fmt: skip
        lines = [str(element.value) for kind in kinds for element in app.get(kind)]
        return "\n".join(lines).replace("\\", "")

    return said


@pytest.fixture
def figures() -> Callable[[AppTest], list[dict[str, Any]]]:
    """The figures of a page as plotly's JSON."""

    def drawn(app: AppTest) -> list[dict[str, Any]]:
        return [json.loads(element.proto.spec) for element in app.get("plotly_chart")]

    return drawn
