"""How the dashboard looks beyond its theme: icon, logo, and rules that no theme has."""

from __future__ import annotations

from typing import Final

_DARK: Final = ((1, 1), (6, 6), (11, 1), (1, 11))
_LIGHT: Final = ((6, 1), (1, 6), (11, 6), (6, 11), (11, 11))


def _squares(places: tuple[tuple[int, int], ...], color: str) -> str:
    cells = "".join(f'<rect x="{x}" y="{y}" width="4" height="4" rx="1"/>' for x, y in places)
    return f'<g fill="{color}">{cells}</g>'


_CELLS: Final = _squares(_DARK, "#4a7bc8") + _squares(_LIGHT, "#a9c3e6")

ICON: Final = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{_CELLS}</svg>'
"""Routed cells: some chosen, some not."""

LOGO: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 118 24">'
    f'<g transform="translate(0 4)">{_CELLS}</g><text x="25" y="18" font-family="sans-serif" '
    'font-size="16.5" font-weight="600" fill="#4a7bc8">moescope</text></svg>'
)
"""The icon and the name, in a blue that can be read on light and on dark."""

STYLE: Final = """
/* Less empty space at the top. */
[data-testid=stMainBlockContainer] { padding: 3rem 3rem 4rem; }
@media (max-width: 900px) { [data-testid=stMainBlockContainer] { padding: 3rem 1rem 4rem; } }
/* Rows of controls wrap in a narrow window instead of squeezing what is written in them. */
[data-testid=stHorizontalBlock] { flex-wrap: wrap; }
[data-testid=stColumn] { min-width: min(8.5rem, 100%); }
[data-testid=stColumn]:has(.st-key-steps) { min-width: 6rem; }
.st-key-side_by_side [data-testid=stColumn]:has([data-testid=stPlotlyChart]),
.st-key-side_by_side [data-testid=stColumn]:has([data-testid=stDataFrame]) {
  min-width: min(24rem, 100%); }
"""
