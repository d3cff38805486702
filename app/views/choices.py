"""Widgets that several pages share; what they choose stands in the address of the page.

A link copied from the browser opens the same page with the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import streamlit as st

if TYPE_CHECKING:
    import pandas as pd

    from moescope.app.state import ShownRun
    from moescope.probe.analysis import Filters

Option = TypeVar("Option")

SCOPES: Final[Mapping[str, str]] = {
    "all": "prompt and answer",
    "prompt": "prompt",
    "generated": "answer",
    "last_prompt": "last prompt token",
}
"""Token scopes that every analysis understands, in words."""


def linked_choice(
    label: str,
    options: Sequence[Option],
    *,
    key: str,
    default: Option | None = None,
    words: Callable[[Option], str] = str,
    help: str | None = None,
    placeholder: str | None = None,
) -> Option:
    """A select box whose choice is kept across pages and in the address.

    Args:
        label: over the box.
        options: at least one; their `str` stands in the address.
        key: of the widget and of the parameter in the address.
        default: chosen when the address names none; the first option without it.
        words: an option as people read it.
        help: shown on request.
        placeholder: shown while nothing is chosen.
    """
    first = options[0] if default is None or default not in options else default
    if st.session_state.get(key) not in options:
        asked = st.query_params.get(key)
        named = [option for option in options if str(option) == asked]
        st.session_state[key] = named[0] if named else first
    chosen = st.selectbox(
        label,
        options,
        key=key,
        format_func=words,
        help=help,
        placeholder=placeholder,
        persist_state="session",
        filter_mode="contains",
    )
    st.query_params[key] = str(chosen)
    return chosen


def prompt_in_a_line(row: pd.Series[Any]) -> str:
    """A prompt as one entry of a list: number, language, label, outcome, text."""
    marks = [row[name] for name in ("lang", "label", "outcome") if row[name] is not None]
    text = " ".join(row["text"].split())
    return f"{row['prompt_id']} · {' · '.join(marks)}{' · ' if marks else ''}{text[:120]}"


def scopes_of(run: ShownRun) -> list[str]:
    """The scopes that a run can answer."""
    scopes = ["all", "prompt", "generated"] if run.has_answers else ["prompt"]
    return [*scopes, "last_prompt"] if run.has_tokens else scopes


def choose_scope(key: str, scopes: Sequence[str], default: str) -> str:
    """Which tokens count."""
    return linked_choice(
        "Tokens",
        scopes,
        key=key,
        default=default,
        words=lambda scope: SCOPES[scope],
        help="Tokens of the chat template and special tokens never count, except that the last "
        "prompt token may be one: it decides the first token of the answer.",
    )


def conditions(fields: Mapping[str, Sequence[str]], *, key: str) -> dict[str, tuple[str, ...]]:
    """Prompt fields and the values kept of each, behind a button that says what is set."""
    kept = {name: st.session_state.get(f"{key}_{name}") or [] for name in fields}
    chosen = sum(bool(values) for values in kept.values())
    label = f"Filter ({chosen})" if chosen else "Filter"
    with st.popover(label, icon=":material/filter_alt:", width="stretch"):
        for name, values in fields.items():
            st.multiselect(name, values, key=f"{key}_{name}", persist_state="session")
    return {name: tuple(values) for name, values in kept.items() if values}


def make_filters(**given: Any) -> Filters:
    """`Filters` without importing the analyses before a page needs them."""
    from moescope.probe.analysis import Filters

    return Filters(**given)
