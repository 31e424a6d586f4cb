"""The panel in a browser under gradio 4: its preview and its presets."""

from __future__ import annotations

import re
from pathlib import Path

import gradio as gr
import pytest
from on_page import PATIENCE_MS, Panel, chromium, expect

# One process can't drive two of Playwright's browsers.
pytestmark = pytest.mark.skipif(
    gr.__version__.startswith("3."), reason="tests/live opens the page under gradio 3"
)

SCRIPT = Path(__file__).parents[2] / "javascript" / "tome.js"
HOST = """
window.gradioApp = () => document;
window.onUiLoaded = then => {
    const wait = setInterval(() => {
        if (!document.querySelector("#script_img2img_tome_preview")) return;
        clearInterval(wait);
        then();
    }, 50);
};
"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def panel(make_page, browser):
    """txt2img's panel on a page with both; its script must report no error."""
    blocks, _ = make_page()
    blocks.head = f"<script>{HOST}{SCRIPT.read_text(encoding='utf-8')}</script>"
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    page, errors = browser.new_page(), []
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route(lambda address: not address.startswith(url), lambda route: route.abort())
    page.goto(url)
    page.wait_for_selector("#script_img2img_tome_preview [data-title]", state="attached")
    yield Panel(page)
    page.close()
    blocks.close()
    assert errors == []


def expect_ratios(panel, text):
    expect(panel.preview.locator("svg")).to_have_attribute("aria-label", re.compile(text))


def test_the_preview_follows_the_settings(panel):
    expect_ratios(panel, "0.80 to 0.80")
    panel.set(ratio=0.5)
    expect_ratios(panel, "0.50 to 0.50")
    panel.set(schedule="linear")
    expect(panel.element("late_ratio")).to_be_visible()
    expect_ratios(panel, "0.50 to 0.50")  # A ratio alone takes the late ratio along.
    panel.set(late_ratio=0.25)
    expect_ratios(panel, "0.50 to 0.25")
    panel.set(schedule="constant")
    expect_ratios(panel, "0.50 to 0.50")
    expect(panel.element("late_ratio")).to_be_hidden()
    expect_ratios(Panel(panel.page, "img2img"), "0.80 to 0.80")


def test_presets_are_saved_and_chosen(script, panel):
    presets = script.panel.presets
    panel.save("mine", says="Saved as 'mine'")
    assert presets.get("mine") == presets.get("Balanced")
    panel.choose_preset("Fast")
    expect(panel.preview).to_contain_text("For drafts")
    expect_ratios(panel, "0.94 to 0.94")


def test_a_late_preview_does_not_overwrite_a_chosen_preset(panel):
    held = []
    panel.page.route("**/run/predict*", lambda route: held.append(route))
    panel.element("refresh").evaluate("button => button.click()")
    panel.choose_preset("Fast")
    panel.page.wait_for_timeout(300)
    panel.page.unroute("**/run/predict*")
    preview, *others = held
    assert "Balanced" not in preview.request.post_data and "Fast" in others[0].request.post_data
    panel.page.evaluate("""() => {
        const answered = toMeAnswered;
        toMeAnswered = (...given) => {
            window.hasAnswered = true;
            return answered(...given);
        };
    }""")
    preview.continue_()
    panel.page.wait_for_function("window.hasAnswered")
    panel.page.wait_for_timeout(300)
    assert panel.preset.input_value() == "Fast"
    for request in others:
        request.continue_()
    expect_ratios(panel, "0.94 to 0.94")
    assert panel.preset.input_value() == "Fast"
