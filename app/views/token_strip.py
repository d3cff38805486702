"""The tokens of a prompt and its answer as a strip of buttons, one of them chosen.

A component of its own, because no widget of Streamlit shows text token by token. Tokens are handed
over as data and put into the page as text, never as markup: they come from models and stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import streamlit as st

_CSS: Final = """
.strip { display: flex; flex-wrap: wrap; gap: 3px 2px; max-height: 15rem; overflow-y: auto;
  padding: 2px; font-family: var(--st-code-font); font-size: 0.86rem; line-height: 1.35; }
.strip button { all: unset; box-sizing: border-box; cursor: pointer; white-space: pre;
  padding: 1px 3px; border-radius: 3px; min-width: 0.7em; text-align: center;
  color: var(--st-text-color); border-bottom: 2px solid transparent; }
.strip button[data-segment=user] { background: var(--st-blue-background-color); }
.strip button[data-segment=system] { background: var(--st-violet-background-color); }
.strip button[data-segment=thinking] { background: var(--st-yellow-background-color); }
.strip button[data-segment=answer] { background: var(--st-green-background-color); }
.strip button[data-segment=template] { background: var(--st-gray-background-color);
  color: var(--st-gray-text-color); }
.strip button[data-phase=generated] { border-bottom-color: var(--st-green-color); }
.strip button:hover { outline: 1px solid var(--st-text-color); }
.strip button:focus-visible { outline: 2px solid var(--st-primary-color); }
.strip button[aria-pressed=true] { background: var(--st-primary-color);
  color: var(--st-background-color); }
.legend { font-family: var(--st-font); font-size: 0.78rem; color: var(--st-gray-text-color);
  display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; margin-top: 0.35rem; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px;
  margin-right: 0.35em; vertical-align: -1px; }
"""

# The strip is drawn again only when the tokens change; otherwise the chosen button alone does, so
# that the keyboard keeps its place.
_JS: Final = """
const COLORS = { user: 'blue', system: 'violet', thinking: 'yellow', answer: 'green',
  template: 'gray' };

// Not scrollIntoView: that would move the page, too.
function keepInView(strip, button) {
  const box = strip.getBoundingClientRect();
  const own = button.getBoundingClientRect();
  if (own.top < box.top) strip.scrollTop -= box.top - own.top;
  if (own.bottom > box.bottom) strip.scrollTop += own.bottom - box.bottom;
}

export default function ({ data, parentElement, setTriggerValue }) {
  const strip = parentElement.querySelector('.strip');
  const content = JSON.stringify(data.tokens);
  if (strip.drawn !== content) {
    strip.drawn = content;
    strip.replaceChildren(...data.tokens.map((token) => {
      const button = document.createElement('button');
      button.textContent = token.token;
      button.dataset.segment = token.segment;
      button.dataset.phase = token.phase;
      button.dataset.position = token.position;
      button.title = `position ${token.position}, ${token.segment}, ${token.phase}`;
      return button;
    }));
    const legend = parentElement.querySelector('.legend');
    const present = Object.keys(COLORS).filter((name) =>
      data.tokens.some((token) => token.segment === name));
    legend.replaceChildren(...present.map((name) => {
      const item = document.createElement('span');
      const color = document.createElement('i');
      color.style.background = `var(--st-${COLORS[name]}-background-color)`;
      color.style.border = `1px solid var(--st-${COLORS[name]}-color)`;
      item.append(color, name);
      return item;
    }));
  }
  for (const button of strip.children) {
    const chosen = Number(button.dataset.position) === data.chosen;
    button.setAttribute('aria-pressed', chosen);
    if (chosen) keepInView(strip, button);
  }
  strip.onclick = (event) => {
    const button = event.target.closest('button');
    if (button) setTriggerValue('picked', Number(button.dataset.position));
  };
}
"""

_STRIP: Final = st.components.v2.component(
    "moescope_token_strip",
    html='<div class="strip" role="group" aria-label="Tokens"></div><div class="legend"></div>',
    css=_CSS,
    js=_JS,
)
_MARKS: Final = str.maketrans({"\n": "↵", "\t": "⇥"})


@dataclass(frozen=True, kw_only=True)
class StripToken:
    """One token: its position in the sequence, its text, phase and segment."""

    position: int
    token: str
    phase: str
    segment: str


def token_strip(
    tokens: Sequence[StripToken], *, chosen: int, key: str, on_pick: Callable[[int], None]
) -> None:
    """Draw the strip.

    Args:
        tokens: in the order of the sequence.
        chosen: the position that is marked.
        key: unique on the page.
        on_pick: told the position of a token that was clicked, before the page is drawn again.
    """

    def picked() -> None:
        position = st.session_state[key].picked
        if position is not None:
            on_pick(int(position))

    shown = [asdict(token) | {"token": token.token.translate(_MARKS)} for token in tokens]
    _STRIP(data={"tokens": shown, "chosen": chosen}, key=key, on_picked_change=picked)
