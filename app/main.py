"""The dashboard's frame: navigation, the run picker beside every page, errors as sentences.

Streamlit runs this file for every interaction (`moescope dashboard` starts it). A page is a file in
`views/` and one line in `SECTIONS`; Streamlit puts this folder first on `sys.path`, so no module
in it may be named after a library.
"""

from __future__ import annotations

from typing import Final

import streamlit as st

from moescope.app.views.layout import errors_as_sentences, open_page
from moescope.app.views.sidebar import pick_run

SECTIONS: Final = {
    "Store": (("runs", "Runs", ":material/database:"),),
    "Routing": (
        ("prompt", "One prompt", ":material/notes:"),
        ("specialization", "Specialization", ":material/category:"),
        ("load", "Load and balance", ":material/balance:"),
        ("languages", "Languages by layer", ":material/translate:"),
        ("analyses", "All analyses", ":material/query_stats:"),
    ),
    "Cause and change": (
        ("refusal", "Refusal experts", ":material/compare_arrows:"),
        ("steering", "Steering", ":material/tune:"),
    ),
}
"""Section -> (module in views/ and path of the page, its title, its icon)."""


def show_dashboard() -> None:
    """Draw the frame and the page that the address asks for."""
    open_page()
    pages = {
        section: [
            st.Page(f"views/{name}.py", title=title, icon=icon, url_path=name)
            for name, title, icon in entries
        ]
        for section, entries in SECTIONS.items()
    }
    page = st.navigation(pages, expanded=True)
    with errors_as_sentences():
        if pick_run():
            page.run()


if __name__ == "__main__":
    show_dashboard()
