"""What a person clicks, in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
sync_api.expect.set_options(timeout=30_000)
PREFIX = "#script_txt2img_tome_"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, webui: Any) -> Iterator[Any]:
    """The page with the panel unfolded, which switches merging on. Its own scripts must report no error."""
    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    page.set_default_timeout(30_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(webui.url)
    page.locator(f"{PREFIX}enabled .label-wrap").click()
    sync_api.expect(words(page, "preview")).to_contain_text("self-attention layers")
    yield page
    page.close()
    assert not errors


def slider(page: Any, name: str) -> Any:
    return page.locator(f"{PREFIX}{name} input[type=number]")


def words(page: Any, name: str) -> Any:
    """A piece of HTML; gradio gives its name to two elements, one in the other."""
    return page.locator(f"{PREFIX}{name}").first


def title(page: Any) -> Any:
    return page.locator(f"{PREFIX}enabled .label-wrap > span").first


def test_the_title_says_what_is_set_and_the_preview_what_will_happen(page):
    sync_api.expect(title(page)).to_contain_text("ToMe: 50 %, level 1")
    slider(page, "ratio").fill("0.25")
    slider(page, "ratio").blur()
    sync_api.expect(title(page)).to_contain_text("ToMe: 25 %, level 1")


def test_folding_the_panel_switches_merging_off_and_the_title_says_so(page):
    page.locator(f"{PREFIX}enabled .label-wrap").click()
    sync_api.expect(title(page)).not_to_contain_text("%")


def test_controls_without_effect_are_hidden(page):
    sync_api.expect(page.locator(f"{PREFIX}late_ratio")).to_be_hidden()
    page.locator(f"{PREFIX}schedule").get_by_text("linear").click()
    sync_api.expect(page.locator(f"{PREFIX}late_ratio")).to_be_visible()
    sync_api.expect(page.locator(f"{PREFIX}switch_at")).to_be_hidden()
    page.locator(f"{PREFIX}schedule").get_by_text("step").click()
    sync_api.expect(page.locator(f"{PREFIX}switch_at")).to_be_visible()
