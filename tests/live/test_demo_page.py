"""The demo's page in headless Chromium."""

from __future__ import annotations

import re
from typing import Any

import pytest
from on_page import URL, choose, expect, set_tab

pytestmark = pytest.mark.skipif(
    bool(URL), reason="WEBUI_URL names a WebUI, and this is the demo's page"
)


def value(page: Any, name: str) -> str:
    return (
        page.locator(f"#txt2img_{name}")
        .locator("textarea, input:not([type=range])")
        .first.input_value()
    )


def generate(page: Any, says: str, **values: Any) -> str:
    """Press Generate, and wait for a text under the pictures; return all of it."""
    set_tab(page, **{"steps": 2, **values})
    page.click("#txt2img_generate")
    expect(page.locator("#html_info_txt2img").first).to_contain_text(says)
    return page.inner_text("#html_info_txt2img >> nth=0")


def test_the_page_starts_with_the_models_values_and_the_panel_on(page, panel):
    controls = ["prompt", "sampling", "steps", "width", "height", "cfg_scale", "seed"]
    values = [value(page, name) for name in controls]
    assert values == ["cat face", "Euler", "20", "32", "32", "3", "1"]
    expect(panel.switch).to_be_checked()
    expect(panel.title).to_contain_text("ToMe: 80 % of keys, level 1")
    expect(panel.number("map_step")).to_have_value("10")
    width = page.locator("#txt2img_width input[type=number]")
    assert [width.get_attribute(name) for name in ("min", "max", "step")] == ["16", "96", "8"]


def test_generate_shows_progress_both_pictures_their_difference_the_map_and_the_times(page, panel):
    # Enough steps to see the bar.
    set_tab(page, steps=20)
    page.click("#txt2img_generate")
    expect(page.locator("#results")).to_contain_text(re.compile(r"\d+/40 steps"))
    info = page.locator("#html_info_txt2img").first
    expect(info).to_contain_text("20 of 20 steps")
    expect(info).to_contain_text(re.compile("map.*step 10.*layer 1"))
    expect(info).to_contain_text("Seed: 1, Size: 32x32")
    page.wait_for_selector("#txt2img_gallery img")
    labels = page.locator("#txt2img_gallery .caption-label").all_inner_texts()
    assert [re.sub(r"\d+\.\d\d", "0.00", label) for label in labels] == [
        "without merging: 0.00 s",
        "with merging: 0.00 s",
        "difference, 10 times",
        "merge map",
    ]
    sides = page.locator("#txt2img_gallery img").first.evaluate(
        "image => [image.naturalWidth, image.naturalHeight]"
    )
    assert sides == [256, 256]
    expect(panel.preview).to_contain_text("Last: 3 of 10")


def test_with_the_panel_off_one_picture_is_made(page):
    page.click("#script_txt2img_tome_enabled-visible-checkbox")
    assert "ToMe" not in generate(page, "Seed: 7", seed=7)
    page.wait_for_selector("#txt2img_gallery img")
    assert page.locator("#txt2img_gallery .thumbnail-lg").count() == 1


@pytest.mark.parametrize("seed", [-1, ""])
def test_any_seed(page, seed):
    assert "Seed: -1" not in generate(page, "Seed: ", seed=seed)


def test_unknown_words_are_shown_under_the_prompt(page):
    words, prompt = (
        page.locator("#demo_words").first,
        page.locator("#txt2img_prompt textarea, #txt2img_prompt input"),
    )
    prompt.fill("qwxyz cat <b>")
    expect(words).to_contain_text("qwxyz, b")
    prompt.fill("cat")
    expect(words).not_to_contain_text("qwxyz")
    words.locator("summary").click()
    expect(words.locator("details p")).to_contain_text("cat")


def test_another_model_shows_its_words(page):
    words, model = page.locator("#demo_words").first, page.locator("#setting_sd_model_checkpoint")
    choose(model, "photos")
    expect(words.locator("details p")).to_contain_text("cat whiskers")
    try:
        assert "Model: photos" in generate(page, "Seed: 3", seed=3, width=64, height=64)
    finally:
        # The demo is shared by the tests.
        choose(model, "emoji")
    expect(words.locator("details p")).to_contain_text("red apple")


def test_on_a_narrow_window_nothing_is_cut_off_and_the_pictures_come_first(page):
    page.set_viewport_size({"width": 400, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    results, settings = (
        page.locator(f"#{name}").bounding_box() for name in ("results", "settings")
    )
    assert results["y"] < settings["y"]
    assert results["x"] >= 0 and results["x"] + results["width"] <= 400
