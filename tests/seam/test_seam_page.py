"""The panel in a browser under gradio 4: its preview and its presets."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCRIPT = Path(__file__).parents[2] / "javascript" / "tome.js"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    # One process can't drive two of Playwright's browsers.
    pytest.mark.skipif(
        gr.__version__.startswith("3."), reason="tests/live opens the page under gradio 3"
    ),
]

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
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield launched
        launched.close()


@pytest.fixture
def panel(load, browser):
    """The page with both tabs' panels; its script must report no error."""
    script = load()
    with gr.Blocks() as blocks:
        for is_img2img in (False, True):
            instance = script.ToMe()
            instance.is_img2img = is_img2img
            instance.ui(is_img2img)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    code, errors = HOST + SCRIPT.read_text(encoding="utf-8"), []

    def add_script(route):
        reply = route.fetch()
        route.fulfill(
            response=reply, body=reply.text().replace("<head>", f"<head><script>{code}</script>", 1)
        )

    page = browser.new_page()
    page.set_default_timeout(180_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route(lambda address: not address.startswith(url), lambda route: route.abort())
    page.route(url, add_script)
    page.goto(url)
    page.wait_for_selector("#script_img2img_tome_preview [data-title]", state="attached")
    of = lambda name: page.locator(f"#script_txt2img_tome_{name}").first  # noqa: E731
    yield SimpleNamespace(page=page, of=of, presets=script.panel.presets)
    page.close()
    blocks.close()
    assert errors == []


def wait_for_ratios(panel, text):
    panel.page.wait_for_selector(f"#script_txt2img_tome_preview [aria-label*='{text}']")


def test_the_preview_follows_the_settings(panel):
    wait_for_ratios(panel, "0.80 to 0.80")
    ratio = panel.of("ratio").locator("input[type=number]").first
    ratio.fill("0.5")
    ratio.blur()
    wait_for_ratios(panel, "0.50 to 0.50")
    panel.of("schedule").get_by_label("linear").check()
    panel.of("late_ratio").wait_for(state="visible")
    wait_for_ratios(panel, "0.50 to 0.50")  # A ratio alone takes the late ratio along.
    late_ratio = panel.of("late_ratio").locator("input[type=number]").first
    late_ratio.fill("0.25")
    late_ratio.blur()
    wait_for_ratios(panel, "0.50 to 0.25")
    panel.of("schedule").get_by_label("constant").check()
    wait_for_ratios(panel, "0.50 to 0.50")
    panel.of("late_ratio").wait_for(state="hidden")
    other = panel.page.locator("#script_img2img_tome_preview svg").first
    assert "0.80 to 0.80" in other.get_attribute("aria-label"), "each tab has its own"


def test_presets_are_saved_and_chosen(panel):
    def wait_for(text):
        panel.of("preset_message").get_by_text(re.compile(text)).first.wait_for()

    preset = panel.of("preset").locator("input").first
    preset.fill("mine")
    preset.press("Enter")
    panel.of("preset_save").click()
    wait_for("Saved as 'mine'")
    assert panel.presets.get("mine") == panel.presets.get("Balanced")
    preset.blur()
    preset.click()
    preset.fill("Fast")
    panel.page.locator("ul.options").get_by_label("Fast", exact=True).click()
    panel.of("preview").get_by_text(re.compile("For drafts")).first.wait_for()
    wait_for_ratios(panel, "0.94 to 0.94")


def test_a_late_preview_does_not_overwrite_a_chosen_preset(panel):
    held = []
    panel.page.route("**/run/predict*", lambda route: held.append(route))
    panel.of("refresh").evaluate("button => button.click()")
    preset = panel.of("preset").locator("input").first
    preset.click()
    panel.page.locator("ul.options").get_by_label("Fast", exact=True).click()
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
    assert preset.input_value() == "Fast"
    for request in others:
        request.continue_()
    wait_for_ratios(panel, "0.94 to 0.94")
    assert preset.input_value() == "Fast"
