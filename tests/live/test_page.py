"""What a person clicks, in headless Chromium."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
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
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(webui.url)
    page.locator(f"{PREFIX}enabled .label-wrap").click()
    sync_api.expect(page.locator(f"{PREFIX}preview")).to_contain_text("self-attention layers")
    yield page
    page.close()
    assert not errors


def slider(page: Any, name: str) -> Any:
    return page.locator(f"{PREFIX}{name} input[type=number]")


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


def test_choosing_a_preset_sets_its_values_and_says_what_it_is_for(page):
    page.locator(f"{PREFIX}preset input").click()
    page.locator(f"{PREFIX}preset").get_by_role("option", name="Paper (60 %)").click()
    sync_api.expect(slider(page, "ratio")).to_have_value("0.6")
    sync_api.expect(page.locator(f"{PREFIX}preset_message")).to_contain_text("paper's highest ratio")


def test_a_preset_is_saved_chosen_and_deleted(page):
    name = f"test {uuid.uuid4().hex[:8]} <b>"
    slider(page, "ratio").fill("0.35")
    slider(page, "ratio").blur()
    field = page.locator(f"{PREFIX}preset input")
    field.fill(name)
    field.press("Enter")
    page.locator(f"{PREFIX}preset_save").click()
    message = page.locator(f"{PREFIX}preset_message")
    sync_api.expect(message).to_contain_text(f"Saved as '{name}'.")
    try:
        slider(page, "ratio").fill("0.7")
        slider(page, "ratio").blur()
        field.click()
        page.locator(f"{PREFIX}preset").get_by_role("option", name=name).click()
        sync_api.expect(slider(page, "ratio")).to_have_value("0.35")
    finally:
        page.locator(f"{PREFIX}preset_delete").click()
        sync_api.expect(message).to_contain_text(f"Deleted '{name}'.")


def test_a_generation_is_summed_up_under_the_picture_and_in_the_panel(page, webui):
    for name in ("width", "height"):
        page.locator(f"#txt2img_{name} input[type=number]").fill(str(webui.side))
    page.locator("#txt2img_steps input[type=number]").fill("2")
    page.locator("#txt2img_prompt textarea").fill("cat")
    page.locator("#txt2img_generate").click()
    done = sync_api.expect(
        page.locator("#html_log_txt2img, #html_info_txt2img").filter(has_text="self-attention layers")
    )
    done.to_have_count(1, timeout=600_000)
    sync_api.expect(page.locator(f"{PREFIX}preview .tome-last")).to_contain_text("2 of 2 steps")
