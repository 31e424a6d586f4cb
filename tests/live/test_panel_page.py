"""The panel in the WebUI at WEBUI_URL, or else on the demo's page.

The tests delete the presets that they save.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from on_page import DEFAULTS, OTHERS, TABS, Panel, await_option, await_panels, expect, set_tab


@pytest.mark.parametrize("panel", TABS, indirect=True)
def test_the_title_shows_the_settings_and_the_preview_their_effect(panel):
    expect(panel.title).to_contain_text("ToMe: 80 % of keys, level 1")
    expect(panel.preview).to_contain_text("self-attention layers")
    panel.set(ratio=0.25)
    expect(panel.title).to_contain_text("ToMe: 25 % of keys, level 1")
    panel.expect({"late_ratio": 0.25})  # A ratio alone never merges more late than early.
    panel.set(schedule="linear", late_ratio=0.75)
    expect(panel.title).to_contain_text("ToMe: 25 % → 75 % of keys, level 1")
    panel.set(schedule="constant")
    expect(panel.title).to_contain_text("ToMe: 25 % of keys, level 1")


def test_the_late_ratio_follows_by_mouse_and_keyboard(panel):
    slider = panel.element("ratio").locator("input[type=range]")
    box = slider.bounding_box()
    slider.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    ratio = float(panel.number("ratio").input_value())
    assert 0.3 < ratio < 0.6
    panel.expect({"late_ratio": ratio})
    slider.press("ArrowLeft")
    panel.expect({"late_ratio": ratio - 0.0125})
    slider.press("ArrowRight")
    panel.expect({"ratio": ratio, "late_ratio": ratio - 0.0125})


def test_the_preset_field_shows_the_preset_of_the_current_values(panel):
    expect(panel.preset).to_have_value("Balanced")
    expect(panel.preview).to_contain_text("good start")
    panel.choose_preset("Fast")
    expect(panel.preview).to_contain_text("For drafts")
    expect(panel.preset).to_have_value("Fast")
    panel.set(min_tokens=512)
    expect(panel.preset).to_have_value("")
    expect(panel.preview).not_to_contain_text("For drafts")
    panel.set(min_tokens=0)
    expect(panel.preset).to_have_value("Fast")
    panel.name_preset("a name of one's own")
    panel.set(min_tokens=512)
    expect(panel.title).to_contain_text("94 % of keys, level 2")
    panel.set(ratio=0.7)
    expect(panel.title).to_contain_text("70 % of keys, level 2")
    expect(panel.preset).to_have_value("a name of one's own")
    panel.name_preset("fast")
    panel.press("delete", "built-in")


@pytest.mark.parametrize("panel", TABS, indirect=True)
def test_the_preview_follows_the_tabs_size_and_steps(side, loaded_model, panel):
    page, tab = panel.page, panel.tab
    for steps in (7, 11):
        set_tab(page, tab, steps=steps)
        bars = panel.preview.locator("rect")
        # Some hosts set numbers late, as Forge Neo's presets do.
        for _ in range(20):
            page.wait_for_timeout(500)
            if bars.count() == steps:
                break
            set_tab(page, tab, steps=steps)
        expect(bars).to_have_count(steps)
    line = panel.preview.locator("p").first
    expect(line).to_contain_text("keys each")
    # One at a time, to a number that the tab can't have yet, so that the line changes.
    for name in ("height", "width"):
        before = line.inner_text()
        set_tab(page, tab, **{name: 3 * side})
        expect(line).not_to_have_text(before)
    tokens = int(re.search(r"(\d+) →", line.inner_text())[1]) // 9
    for width, height in ((2, 1), (2, 2), (1, 3), (1, 1)):
        set_tab(page, tab, width=width * side, height=height * side)
        expect(line).to_contain_text(f" {tokens * width * height} → ")


def test_folding_the_panel_switches_merging_off(panel):
    expect(panel.switch).to_be_checked()
    panel.title.click(position={"x": 150, "y": 10})
    expect(panel.title).not_to_contain_text("%")
    expect(panel.switch).not_to_be_checked()


def test_controls_without_effect_are_hidden(panel):
    late_ratio, switch_at = panel.element("late_ratio"), panel.element("switch_at")
    for schedule, useful in (
        ("constant", ()),
        ("linear", (late_ratio,)),
        ("step", (late_ratio, switch_at)),
    ):
        panel.set(schedule=schedule)
        for control in (late_ratio, switch_at):
            expect(control).to_be_visible(visible=control in useful)


def test_help_is_shown_on_hover(panel):
    for name in (*DEFAULTS, *(f"preset_{button}" for button in ("save", "delete", "reload"))):
        expect(panel.element(name)).to_have_attribute("title", re.compile(r"\w+ \w+"))


def test_a_moving_slider_makes_no_request(panel):
    calls = []
    expect(panel.title).to_contain_text("80 %")
    panel.page.on(
        "request", lambda request: calls.append(request.url) if request.method == "POST" else None
    )
    box = panel.element("ratio").locator("input[type=range]").bounding_box()
    panel.page.mouse.move(box["x"] + box["width"] * 0.66, box["y"] + box["height"] / 2)
    panel.page.mouse.down()
    for part in (0.6, 0.5, 0.4, 0.3, 0.2):
        panel.page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] / 2)
        panel.page.wait_for_timeout(300)  # Longer than the script waits for the next move.
    assert calls == []
    panel.page.mouse.up()
    expect(panel.title).to_contain_text(re.compile(r"ToMe: 1\d %"))
    panel.page.mouse.click(1, 1)
    panel.page.wait_for_timeout(600)
    assert len(calls) == 1


@pytest.mark.parametrize("on", [True, False])
def test_choosing_a_preset_sets_the_fields_and_leaves_the_switch(panel, on):
    if not on:
        checkbox = panel.title.locator("input")
        if not checkbox.count():
            pytest.skip("this WebUI's fold is its switch: unfolded is on")
        checkbox.click()
    panel.choose_preset("Fast")
    panel.expect({"ratio": 0.9375, "schedule": "constant", "max_downsample": "2", "method": "keys"})
    expect(panel.preview).to_contain_text("For drafts")
    if on:
        expect(panel.title).to_contain_text("ToMe: 94 % of keys, level 2")
    expect(panel.switch).to_be_checked(checked=on)
    panel.choose_preset("Hires only")
    panel.expect({**DEFAULTS, "apply_to": "hires pass"})
    if on:
        expect(panel.preview).to_contain_text("hires pass only")


def test_measure_shows_a_line_and_a_second_press_interrupts_it(side, panel):
    set_tab(panel.page, width=side, height=side)
    button, lines = panel.element("measure"), panel.element("measure_lines")
    for says in ("interrupted", f" at {side}x{side}"):
        button.click()
        expect(button).to_have_text("Interrupt")
        if says == "interrupted":
            button.click()
        expect(lines).to_contain_text(says)
        expect(button).to_have_text("Measure")


def test_a_preset_of_any_name_is_saved_found_again_and_deleted(
    names_of_presets, open_page, own_name
):
    name = f"../../🐈 <img src=x onerror=\"document.title='run'\"> {own_name}"
    page = open_page()
    panel = Panel(page).unfold().set(**OTHERS).save(name)
    expect(panel.message).to_contain_text(name.replace("'", "\\'"))
    assert name in names_of_presets()

    page.reload()
    await_panels(page)
    panel.unfold()
    panel.expect(DEFAULTS)
    await_option(panel.element("preset"), name)
    panel.choose_preset(name)
    panel.expect(OTHERS)
    expect(panel.preset).to_have_value(name)

    panel.press("delete", "Deleted")
    await_option(panel.element("preset"), name, is_there=False)
    assert name not in names_of_presets()
    assert "run" not in page.title()
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 300, "100 characters"), ("quality", "'Quality'")],
)
def test_an_unusable_preset_name_is_refused(names_of_presets, panel, name, words):
    before = names_of_presets()
    panel.save(name, says=words)
    assert names_of_presets() == before


CONTRASTS = """panel => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const background = element => {
        for (; element; element = element.parentElement) {
            const colour = channels(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const luminance = colour => colour.slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const own = element => Number(getComputedStyle(element).opacity);
    const opacity = element => element ? own(element) * opacity(element.parentElement) : 1;
    const labels = "label > span, [data-testid=block-info]";
    const texts = `.label-wrap, .tome-preview p, .tome-message, ${labels}`;
    return [...panel.querySelectorAll(texts)].filter(e => e.offsetParent).map(element => {
        const behind = background(element), share = opacity(element);
        const text = channels(getComputedStyle(element).color)
            .map((c, i) => c * share + behind[i] * (1 - share));
        const [light, dark] = [luminance(text), luminance(behind)].sort((a, b) => b - a);
        return [element.textContent.trim(), (light + 0.05) / (dark + 0.05)];
    });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_is_readable_in_both_themes(open_page, theme):
    page = open_page(f"?__theme={theme}")
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    panel = Panel(page).unfold().set(schedule="step")
    expect(panel.title).to_contain_text("75 %")
    contrasts = panel.root.evaluate(CONTRASTS)
    assert len(contrasts) > len(DEFAULTS)
    assert {text: contrast for text, contrast in contrasts if contrast < 4} == {}


OVERHANGING = """panel => {
    const right = panel.getBoundingClientRect().right + 0.5;
    return [...panel.querySelectorAll("*")].filter(element => element.offsetParent)
        .filter(element => element.getBoundingClientRect().right > right)
        .map(element => element.outerHTML.slice(0, 100));
}"""


def test_nothing_overflows_in_a_narrow_window(open_page):
    page = open_page(width=400)
    panel = Panel(page).unfold().set(schedule="step")
    expect(panel.title).to_contain_text("75 %")
    assert panel.root.bounding_box()["width"] <= 400
    assert panel.root.evaluate(OVERHANGING) == []


def test_the_keyboard_alone_is_enough(page):
    panel = Panel(page)

    def tab_to(locator: Any) -> None:
        for _ in range(40):
            if locator.evaluate("element => element === document.activeElement"):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab doesn't reach {locator}")

    if panel.switch.is_checked():  # the demo's
        panel.title.click(position={"x": 150, "y": 10})
        expect(panel.switch).not_to_be_checked()
    page.locator("#txt2img_seed input, #script_txt2img_seed_seed input, #seed input").first.focus()
    tab_to(panel.title)
    page.keyboard.press("Enter")
    expect(panel.switch).to_be_checked()
    expect(panel.preview).to_be_visible()
    checkbox = panel.title.locator("input")
    switch = checkbox if checkbox.count() else panel.title
    tab_to(switch)
    page.keyboard.press("Space")
    expect(panel.switch).not_to_be_checked()
    page.keyboard.press("Space")
    expect(panel.switch).to_be_checked()
    tab_to(panel.element("ratio").locator("input[type=range]"))
    page.keyboard.press("ArrowLeft")
    panel.expect({"ratio": 0.7875})
    expect(panel.title).to_contain_text("ToMe: 79 %")
    radios = panel.element("schedule").locator("input[type=radio]")
    if len({radio.get_attribute("name") for radio in radios.all()}) == 1:
        tab_to(panel.element("schedule").locator("input[type=radio]:checked"))
        page.keyboard.press("ArrowRight")
        panel.expect({"schedule": "linear"})
    else:  # In gradio 4 arrow keys don't move between radio buttons.
        tab_to(radios.last)
        page.keyboard.press("Space")
        panel.expect({"schedule": "step"})
