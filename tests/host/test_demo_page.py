"""The demo's page in headless Chromium, where that and Playwright are installed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ROOT = Path(__file__).parents[2]
PANEL = "#script_txt2img_tome_"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The demo, started as a person starts it."""
    command = [sys.executable, "-m", "lab.demo"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = (re.match(r"The page: (\S+)", line) for line in process.stdout)
            yield next(line[1] for line in lines if line)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser, address: str) -> Iterator[sync_api.Page]:
    """The page, loaded. It must ask no other server for anything, and report no error."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(60_000)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else complaints.append(r.url))
    page.goto(address)
    page.wait_for_selector(f"{PANEL}enabled-visible-checkbox")
    yield page
    page.close()
    assert complaints == []


def value(page: sync_api.Page, selector: str) -> str:
    return page.locator(selector).locator("textarea, input:not([type=range])").first.input_value()


def fill(page: sync_api.Page, selector: str, text: object) -> None:
    control = page.locator(selector).locator("textarea, input[type=number]").first
    control.fill(str(text))
    control.blur()


def generate(page: sync_api.Page, prompt: str = "cat", steps: int = 2) -> str:
    """Presses Generate; what is said under the pictures."""
    fill(page, "#txt2img_prompt", prompt)
    fill(page, "#txt2img_steps", steps)
    page.click("#txt2img_generate")
    page.wait_for_selector("#html_log_txt2img .performance")
    return page.inner_text("#html_log_txt2img")


def test_the_page_starts_with_what_the_model_is_made_for_and_the_panel_on(page):
    controls = ["prompt", "sampling", "steps", "width", "height", "cfg_scale", "seed"]
    assert [value(page, f"#txt2img_{name}") for name in controls] == ["cat face", "Euler", "20", "32", "32", "3", "1"]
    assert page.locator(f"{PANEL}enabled-visible-checkbox").is_checked()
    sync_api.expect(page.locator(f"{PANEL}enabled .label-wrap > span").first).to_contain_text(
        "ToMe: 94 % → 75 % of keys, level 1"
    )
    assert value(page, f"{PANEL}map_step") == "10"
    assert value(page, "#script_list") == "Compare with and without merging"
    width = page.locator("#txt2img_width input[type=number]")
    assert [width.get_attribute(name) for name in ("min", "max", "step")] == ["16", "96", "8"]


def test_generate_shows_both_pictures_their_difference_the_map_and_the_times(page):
    page.on("request", lambda r: asked.append(r.url) if r.url.endswith("/internal/progress") else None)
    asked: list[str] = []
    said = generate(page)
    assert re.search(r"without merging: \d+\.\d\d s\s+with merging: \d+\.\d\d s", said)
    assert "1024 -> 64 to 256 keys, 2 of 2 steps" in said and "merge map of step 2, layer 1" in said
    assert asked, "the bar follows the progress"
    page.wait_for_selector("#txt2img_gallery .preview img")
    assert page.locator("#txt2img_gallery .thumbnail-small").count() == 5
    sheet = page.locator("#txt2img_gallery .preview > img")
    size = sheet.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
    assert min(size) > 2 * 32 * 8
    assert sheet.bounding_box()["width"] > 500, "large enough to be looked at"
    assert "Seed: 1, Size: 32x32" in page.inner_text("#html_info_txt2img")
    page.wait_for_selector(".progressDiv", state="detached")
    sync_api.expect(page.locator(f"{PANEL}preview").first).to_contain_text("Last: 3 of 10")


def test_with_the_panel_off_one_picture_is_made(page):
    page.click(f"{PANEL}enabled-visible-checkbox")
    assert "merging" not in generate(page)
    page.wait_for_selector("#txt2img_gallery .preview img")
    assert page.locator("#txt2img_gallery .thumbnail-small").count() == 1


def test_a_batch_has_a_sheet_for_each_picture(page):
    fill(page, "#txt2img_batch_count", 2)
    generate(page)
    page.wait_for_selector("#txt2img_gallery .preview img")
    assert page.locator("#txt2img_gallery .thumbnail-small").count() == 10
    page.locator("#txt2img_gallery .thumbnail-small").nth(9).click()
    sync_api.expect(page.locator("#html_info_txt2img").first).to_contain_text("Seed: 2")
    page.locator("#txt2img_gallery .thumbnail-small").nth(5).click()
    sync_api.expect(page.locator("#html_info_txt2img").first).to_contain_text("Seed: 1")


def test_unknown_words_are_said_under_the_prompt_at_once(page):
    words = page.locator("#demo_words").first
    fill(page, "#txt2img_prompt", "qwxyz cat <b>")
    sync_api.expect(words).to_contain_text("The model does not know: qwxyz, b.")
    fill(page, "#txt2img_prompt", "cat")
    sync_api.expect(words).not_to_contain_text("does not know")
    words.locator("summary").click()
    sync_api.expect(words.locator("details p")).to_contain_text("cat")
    prompt, known = page.locator("#txt2img_prompt").bounding_box(), words.bounding_box()
    assert prompt["y"] + prompt["height"] <= known["y"] < page.locator("#txt2img_neg_prompt").bounding_box()["y"]


def test_on_a_narrow_window_nothing_is_cut_off_and_the_pictures_come_first(page):
    page.set_viewport_size({"width": 400, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    results, settings = (page.locator(f"#txt2img_{name}").bounding_box() for name in ("results", "settings"))
    assert results["y"] < settings["y"]
    assert results["x"] >= 0 and results["x"] + results["width"] <= 400
