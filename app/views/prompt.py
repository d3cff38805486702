"""Page: how one prompt and its answer were routed, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, experts, layout, prompt_rows
from moescope.app.views.token_strip import StripToken, token_strip

if TYPE_CHECKING:
    import pandas as pd

    from moescope.probe.analysis import AnalysisTable

_PROMPT: Final = "prompt"
_TOKEN: Final = "token"
_COLOR: Final = "color"
_EXPERT: Final = "token_expert"
_STRIP_PICKS: Final = "_strip_picks"
_MOST_LISTED: Final = 1_000
_MOST_TOKENS: Final = 256
_COLORS: Final = {
    "top_weight": "weight of the first expert",
    "weight_entropy": "entropy of the weights",
    "weight_sum": "sum of the weights",
}


def show() -> None:
    """Draw the page."""
    layout.heading(
        "Routing of one prompt", "Which experts does each token go to, and with which weights?"
    )
    run = state.shown_run()
    prompt_id = _choose_prompt(run)
    if prompt_id is None:
        return
    _show_texts(run, prompt_id)
    if not run.has_tokens:
        st.info(
            "This run holds counts per prompt, not the routing of each token: record it with "
            "`--record topk` to see tokens here. The other pages work on counts."
        )
        return
    _show_routing(run, prompt_id)


def _choose_prompt(run: state.ShownRun) -> int | None:
    """The prompt picker: search, filters, list, neighbors."""
    frame = state.prompts(run)
    search, narrowed, picker, steps = st.columns([3, 1.9, 6, 1.3], vertical_alignment="bottom")
    with search:
        words = st.text_input(
            "Search", key="search", placeholder="words of prompt or answer", persist_state="session"
        )
    with narrowed:
        kept = choices.conditions(state.comparable_fields(run), key="prompts")
    found = prompt_rows.matching_prompts(frame, words, kept)
    if found.empty:
        st.info("No prompt of this run matches; change the search or the filter.")
        return None
    listed = found.head(_MOST_LISTED).set_index("prompt_id", drop=False)
    ids = listed["prompt_id"].tolist()
    label = f"Prompt ({len(found):,} of {len(frame):,})"
    if len(found) > len(ids):
        label += f", the first {len(ids):,} are listed"
    with picker:
        chosen = choices.linked_choice(
            label,
            ids,
            key=_PROMPT,
            words=lambda prompt_id: choices.prompt_in_a_line(listed.loc[prompt_id]),
        )
    place = ids.index(chosen)
    last = len(ids) - 1
    with steps, st.container(horizontal=True, key="steps"):
        _step_button("←", "Previous prompt", ids[max(place - 1, 0)], disabled=place == 0)
        _step_button("→", "Next prompt", ids[min(place + 1, last)], disabled=place == last)
    return int(chosen)


def _step_button(label: str, about: str, target: int, *, disabled: bool) -> None:
    def step() -> None:
        st.session_state[_PROMPT] = target

    st.button(label, help=about, on_click=step, disabled=disabled, key=about)


def _show_texts(run: state.ShownRun, prompt_id: int) -> None:
    """Prompt, answer and what was expected, as they are."""
    frame = state.prompts(run)
    row = frame[frame["prompt_id"] == prompt_id].iloc[0]
    asked, answered = st.columns(2)
    with asked, st.container(border=True, height="stretch"):
        st.caption("Prompt")
        st.text(row["text"])
    with answered, st.container(border=True, height="stretch"):
        if row["response"] is None:
            st.caption("Answer")
            st.markdown(":gray[No answer was generated in this run.]")
        else:
            experts.show_outcome("Answer", row["outcome"])
            st.text(row["response"] or "(empty)")
        if row["expected"] is not None:
            st.caption(f"Known right answer: {layout.escaped(row['expected'])}")


@st.fragment
def _show_routing(run: state.ShownRun, prompt_id: int) -> None:
    """Strip, map and detail; a click draws only this part again."""
    with layout.errors_as_sentences():
        table = _choose_part(state.analyze(run, "prompt", prompt_id=prompt_id))
        tokens = table.frame.drop_duplicates("position").sort_values("position")
        # Imported tokens may have no text: their number is what there is to click on.
        numbered = "#" + tokens["position"].astype(str)
        tokens = tokens.assign(token=tokens["token"].where(tokens["token"] != "", numbered))
        position = _choose_token(tokens)
        kind = experts.choose_kind(table)
        has_weights = bool(table.frame["top_weight"].notna().any())
        if has_weights:
            _show_map(table, prompt_id, position, kind)
        else:
            st.info(
                "The source of this run has no routing weights, so there is nothing to color or "
                "to draw as bars; which experts a token used stands below."
            )
        _show_token(run, prompt_id, position, kind, has_weights=has_weights)
        with st.expander("Table: tokens and layers"):
            layout.show_table(table, key="prompt_table")


def _choose_part(table: AnalysisTable) -> AnalysisTable:
    """The tokens to show of a prompt that has too many for one picture; else all of them."""
    positions = sorted(table.frame["position"].unique().tolist())
    if len(positions) <= _MOST_TOKENS:
        return table
    starts = range(0, len(positions), _MOST_TOKENS)
    parts = {part: positions[start : start + _MOST_TOKENS] for part, start in enumerate(starts)}
    asked = st.query_params.get(_TOKEN, "")
    named = [part for part, found in parts.items() if asked in map(str, found)]
    part = choices.linked_choice(
        f"Part of {len(positions):,} tokens",
        list(parts),
        key="part",
        default=named[0] if named else None,
        words=lambda part: f"tokens {parts[part][0]:,} to {parts[part][-1]:,}",
    )
    shown = table.frame[table.frame["position"].isin(parts[part])]
    title = f"{table.title}, tokens {parts[part][0]} to {parts[part][-1]}"
    return dataclasses.replace(table, frame=shown, title=title)


def _choose_token(tokens: pd.DataFrame) -> int:
    """Strip and select box, which show and set the same position."""
    texts = dict(zip(tokens["position"].tolist(), tokens["token"].tolist(), strict=True))
    prompt_part = tokens.loc[tokens["phase"] == "prompt", "position"].tolist()
    start = prompt_part[-1] if prompt_part else None
    columns = ["position", "token", "phase", "segment"]
    strip = [StripToken(**row) for row in tokens[columns].to_dict("records")]  # type: ignore[arg-type]
    above = st.container()
    picker, color, about = st.columns([2, 2, 3], vertical_alignment="bottom")
    with picker:
        position: int = choices.linked_choice(
            "Token", list(texts), key=_TOKEN, default=start,
            words=lambda position: f"{position}: {texts[position]!r}",
        )  # fmt: skip
    with above:
        token_strip(strip, chosen=position, key="token_strip", on_pick=_pick_in_strip)
    with color:
        choices.linked_choice("Color", list(_COLORS), key=_COLOR, words=lambda name: _COLORS[name])
    about.caption("Click a token above or a cell below; or choose a token here.")
    return position


def _pick(position: int) -> None:
    st.session_state[_TOKEN] = position


def _pick_in_strip(position: int) -> None:
    _pick(position)
    st.session_state[_STRIP_PICKS] = st.session_state.get(_STRIP_PICKS, 0) + 1


def _show_map(table: AnalysisTable, prompt_id: int, position: int, kind: str | None) -> None:
    from moescope.probe.figures import prompt_heatmap

    color = st.session_state[_COLOR]
    figure = prompt_heatmap(table, color=color, kind=kind)
    place = sorted(table.frame["position"].unique().tolist()).index(position)
    layers = len(figure.data[0].y)
    layout.frame_cells(figure, (place - 0.5, place + 0.5), (-0.5, layers - 0.5))

    def clicked(point: Mapping[str, Any]) -> None:
        _pick(int(point["customdata"][0]))

    layout.show_clickable(
        figure,
        # A pick in the strip makes a new map: the old one still holds its last cell as selected,
        # and a click there would depend on whether the browser has taken it back by then.
        key=f"prompt_map_{prompt_id}_{st.session_state.get(_STRIP_PICKS, 0)}",
        alt=f"{table.title}: tokens by layers, {_COLORS[color]} as color",
        on_click=clicked,
    )


def _show_token(
    run: state.ShownRun, prompt_id: int, position: int, kind: str | None, *, has_weights: bool
) -> None:
    """The experts and weights of the chosen token by layer."""
    from moescope.probe.figures import token_bars

    table = state.analyze(run, "token", prompt_id=prompt_id, position=position)
    bars, rows = layout.side_by_side([3, 2])

    def clicked(point: Mapping[str, Any]) -> None:
        st.session_state[_EXPERT] = (int(point["y"]), int(point["customdata"][0]))

    with bars:
        if has_weights:
            layout.show_clickable(
                token_bars(table, kind=kind),
                # Another key for another expert: a new chart, without the paleness of a selection.
                key=f"token_bars_{prompt_id}_{position}_{st.session_state.get(_EXPERT)}",
                alt=f"{table.title}: routing weight by layer",
                on_click=clicked,
            )
        experts.show_links(table.frame, key=_EXPERT)
    with rows:
        layout.show_table(table, key="token_table", height=420)


if __name__ == "__main__":
    show()
