"""The dashboard as a reader meets it: the real server in headless Chromium."""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moescope.app.server import running
from moescope.probe.storage.store import Store

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("MOESCOPE_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--disable-default-apps", "--no-first-run",
]  # fmt: skip
TITLES = {
    "One prompt": "Routing of one prompt",
    "Specialization": "Specialization",
    "Load and balance": "Load and balance",
    "Languages by layer": "Languages by layer",
    "All analyses": "All analyses",
    "Refusal experts": "Refusal experts",
    "Steering": "Steering",
    "Runs": "Runs",
}
FIRST_CONTENT_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip("NO BROWSER TEST RAN: Chromium is missing; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(recorded_store: Path) -> Iterator[str]:
    """Where the dashboard of the recorded store answers."""
    with running(recorded_store) as url:
        yield url


@pytest.fixture(scope="module")
def window(browser: Any, address: str) -> Iterator[Any]:
    """One window for all tests, so that its cache serves them; it asks for nothing outside."""
    outside: list[str] = []
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(90_000)
    context.on("request", lambda request: outside.append(request.url))
    yield context
    context.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in outside), outside


@pytest.fixture
def open_page(window: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens a path in a tab of its own."""
    tabs = []

    def opened(path: str, *, width: int = 1440, scheme: str = "light") -> Any:
        page = window.new_page()
        tabs.append(page)
        page.set_viewport_size({"width": width, "height": 1500})
        page.emulate_media(color_scheme=scheme)
        page.goto(address + path)
        settle(page)
        return page

    yield opened
    for page in tabs:
        page.close()


def settle(page: Any) -> None:
    """Wait until the page's script has run and its figures are drawn."""
    page.wait_for_timeout(300)
    page.wait_for_selector('[data-testid=stApp][data-test-script-state="notRunning"]')
    page.wait_for_function(
        "() => [...document.querySelectorAll('[data-testid=stPlotlyChart]')]"
        ".every((chart) => chart.querySelector('.main-svg'))"
    )
    page.wait_for_timeout(300)


def assert_no_error(page: Any) -> None:
    assert page.locator("[data-testid=stException]").count() == 0
    errors = page.locator("[data-testid=stAlertContentError]")
    assert errors.count() == 0, errors.all_inner_texts()


def click_cell(page: Any, chart: int, across: tuple[float, int], down: tuple[float, int]) -> None:
    """Click into a map: at (place of cells) from the left and from the bottom."""
    area = page.locator(".js-plotly-plot").nth(chart).locator(".nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    x = box["x"] + box["width"] * across[0] / across[1]
    y = box["y"] + box["height"] * (1 - down[0] / down[1])
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    settle(page)


def await_title(page: Any, place: int, words: str) -> None:
    """Wait until the figure at `place` says `words` in its title."""
    page.locator(".gtitle").nth(place).filter(has_text=words).wait_for(state="attached")


def test_the_first_content_appears_soon_after_the_server_is_up(
    browser: Any, recorded_store: Path, record_property: Callable[[str, object], None]
) -> None:
    seconds = []
    while not seconds or (min(seconds) > FIRST_CONTENT_WITHIN_S and len(seconds) < 3):
        with running(recorded_store) as url:
            page = browser.new_context().new_page()
            begun = time.monotonic()
            page.goto(url)
            page.get_by_role("heading", name="Runs").wait_for(timeout=30_000)
            seconds.append(time.monotonic() - begun)
            page.context.close()
    record_property("first_content_s", round(min(seconds), 2))
    assert min(seconds) < FIRST_CONTENT_WITHIN_S, seconds


def test_every_page_opens_from_the_navigation(open_page: Callable[..., Any]) -> None:
    page = open_page("/")
    for entry, title in TITLES.items():
        page.get_by_test_id("stSidebarNav").get_by_role("link", name=entry).click()
        page.get_by_role("heading", name=title, level=1).wait_for()
        settle(page)
        assert_no_error(page)
        assert "run=base" in page.url


@pytest.mark.parametrize(("width", "scheme"), [(1440, "dark"), (800, "light")])
def test_nothing_is_cut_off_in_wide_and_narrow_windows(
    open_page: Callable[..., Any], width: int, scheme: str
) -> None:
    for path in ("/prompt", "/analyses", "/refusal", "/steering"):
        page = open_page(path, width=width, scheme=scheme)
        assert_no_error(page)
        main = page.get_by_test_id("stMain")
        overflow = main.evaluate("(element) => element.scrollWidth - element.clientWidth")
        assert overflow <= 0
        cut = page.locator("[data-testid=stMain] button p").evaluate_all(
            "(all) => all.filter((one) => one.scrollWidth > one.clientWidth + 1)"
            ".map((one) => one.innerText)"
        )
        assert cut == []


def test_a_click_on_a_cell_or_a_token_shows_its_experts(open_page: Callable[..., Any]) -> None:
    page = open_page("/prompt?run=base&prompt=4")
    tokens = page.locator(".strip button").count()
    for position, within in ((6, 0.5), (11, 0.06), (tokens - 1, 0.94)):
        click_cell(page, 0, (position + within, tokens), (1.5, 3))
        await_title(page, 1, f"at position {position} of prompt 4")
        assert f"token={position}" in page.url
    page.locator(".strip button").nth(3).click()
    settle(page)
    await_title(page, 1, "at position 3 of prompt 4")
    # The browser takes a second click on the same point for a deselection; the reader does not.
    click_cell(page, 0, (tokens - 0.5, tokens), (1.5, 3))
    await_title(page, 1, f"at position {tokens - 1} of prompt 4")


def test_a_token_is_chosen_with_the_keyboard(open_page: Callable[..., Any]) -> None:
    page = open_page("/prompt?run=base&prompt=4")
    page.locator(".strip button").nth(8).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    settle(page)
    await_title(page, 1, "at position 9 of prompt 4")
    assert page.locator(".strip button[aria-pressed=true]").get_attribute("data-position") == "9"


def test_a_click_on_an_expert_of_a_token_leads_to_its_specialization(
    open_page: Callable[..., Any], recorded_store: Path
) -> None:
    page = open_page("/prompt?run=base&prompt=4&token=9")
    click_cell(page, 1, (0.05, 1), (2.5, 3))
    found = (
        Store(recorded_store)
        .query(
            "SELECT expert FROM routing WHERE run_id = 'base' AND prompt_id = 4 AND position = 9 "
            "AND layer = 2 AND rank = 0"
        )["expert"]
        .iloc[0]
    )
    page.get_by_role("button", name="Its specialization").click()
    settle(page)
    page.get_by_role("heading", name=f"Layer 2, expert {found}").wait_for()
    assert_no_error(page)


@pytest.mark.parametrize("path", ["/specialization?view=One+value", "/load", "/refusal"])
def test_a_click_on_a_map_shows_the_expert(open_page: Callable[..., Any], path: str) -> None:
    page = open_page(path)
    click_cell(page, 0, (5.2, 8), (1.5, 3))
    page.get_by_role("heading", name="Layer 1, expert 5").wait_for()
    assert_no_error(page)


def test_an_analysis_is_answered_on_its_page(open_page: Callable[..., Any]) -> None:
    page = open_page("/analyses?analysis=coactivation")
    assert page.locator(".js-plotly-plot").count() == 0
    page.get_by_role("button", name="Answer").click()
    await_title(page, 0, "selected together")
    settle(page)
    assert_no_error(page)
    assert page.get_by_test_id("stDataFrame").count() == 1


def test_a_plan_goes_from_the_contrast_to_a_steered_answer(open_page: Callable[..., Any]) -> None:
    page = open_page("/refusal")
    unconfirmed = page.get_by_text("Use experts that were not confirmed")
    if unconfirmed.count():
        unconfirmed.click()
        settle(page)
    page.get_by_role("button", name="Make plan").click()
    page.get_by_role("button", name="Steer with this plan").click()
    page.get_by_role("heading", name="Steering", level=1).wait_for()
    settle(page)
    page.get_by_role("button", name="Answer", exact=True).click()
    page.get_by_text("Random experts, seed 0").wait_for(timeout=120_000)
    settle(page)
    assert_no_error(page)
    shown = page.get_by_test_id("stMain").inner_text()
    assert "Unsteered" in shown and "Steered" in shown
    assert re.search(r"\d+ of \d+ requests held \(100\.0%\)", shown)


def test_a_table_is_downloaded_whole(
    open_page: Callable[..., Any], recorded_store: Path, tmp_path: Path
) -> None:
    from moescope.probe.analysis import load_balance

    page = open_page("/load?view=Balance")
    page.get_by_test_id("stPopoverButton").filter(has_text="Download").click()
    with page.expect_download() as waiting:
        page.get_by_test_id("stPopoverBody").get_by_role("button", name="CSV").click()
    file = waiting.value
    assert file.suggested_filename == "base-balance.csv"
    file.save_as(tmp_path / "balance.csv")
    content = (tmp_path / "balance.csv").read_bytes()
    expected = load_balance(Store(recorded_store), "base").frame
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(content)), expected, check_dtype=False)
