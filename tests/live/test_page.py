"""The page of the WebUI at WEBUI_URL in headless Chromium; settings are restored."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from on_page import DEFAULTS, OTHERS, TABS, Panel, await_panels, choose, go_to, options_of, set_tab
from playwright.sync_api import expect
from webui_api import HIRES, Picture


def generate(page: Any, side: int, steps: int = 2) -> Any:
    """Generate on txt2img and wait for the end; return the results."""
    set_tab(page, width=side, height=side, steps=steps)
    page.locator("#txt2img_generate").click()
    page.locator("#html_log_txt2img .performance").wait_for(timeout=600_000)
    return page.locator("#txt2img_results")


def test_the_other_tabs_panel_finds_a_new_preset(webui, page, panel, own_name):
    panel.set(ratio=0.33).save(own_name)
    go_to(page, "img2img")
    other = Panel(page, "img2img").unfold()
    other.element("preset_reload").click()
    other.choose_preset(own_name)
    other.expect({"ratio": 0.33})
    go_to(page, "txt2img")
    panel.set(ratio=0.44)
    expect(panel.title).to_contain_text("44 %")
    expect(other.title).to_contain_text("33 %")


def test_a_generation_shows_its_summary(webui, page, panel):
    panel.set(ratio=0.6, full_steps=1)
    results = generate(page, webui.side)
    expect(results).to_contain_text("ToMe ratio: 0.6")
    expect(results.locator(".comments")).to_contain_text("ToMe: ")
    expect(results.locator(".comments")).to_contain_text("2 of 2 steps")
    expect(panel.preview).to_contain_text("Last: ")
    expect(panel.preview).to_contain_text("2 of 2 steps")


@pytest.mark.parametrize("tab", TABS)
def test_png_info_sends_every_field_and_switches_off_without_them(webui, baseline, page, tab):
    panel, pnginfo = Panel(page, tab), page.locator("#tab_pnginfo")

    def send(picture: Picture) -> None:
        go_to(page, "PNG Info")
        png = base64.b64decode(picture.png)
        file = {"name": "picture.png", "mimeType": "image/png", "buffer": png}
        pnginfo.locator("#pnginfo_image input[type=file]").set_input_files(file)
        expect(pnginfo).to_contain_text("Sampler")
        pnginfo.locator(f"#{tab}_tab").click()
        expect(page.locator(f"#{tab}_prompt textarea")).to_be_visible()

    # Without hires fix `apply_to` isn't in the parameters.
    send(webui.make([OTHERS], **HIRES))
    expect(pnginfo).to_contain_text("ToMe ratio")
    expect(panel.switch).to_be_checked()
    panel.expect(OTHERS)
    expect(panel.title).to_contain_text("ToMe: 40 % → 10 % of tokens, level 2")

    go_to(page, "PNG Info")
    clear = "[aria-label=Clear], [title=Clear], [title='Remove Image']"
    pnginfo.locator("#pnginfo_image").locator(clear).first.click()
    # Gradio drops a change while it still answers the last one.
    expect(pnginfo).not_to_contain_text("Sampler")
    send(baseline)
    expect(pnginfo).not_to_contain_text("ToMe")
    expect(panel.switch).not_to_be_checked()
    panel.expect(DEFAULTS)
    expect(panel.title).not_to_contain_text("%")


def xyz(page: Any, tab: str) -> Any:
    """Choose the X/Y/Z plot; return its first axis."""
    choose(
        page.locator(f"#{tab}_script_container #script_list"),
        re.compile("^X/Y/Z plot$", re.IGNORECASE),
    )
    return page.locator(f"#script_{tab}_xyz_plot_x_type")


def test_a_plot_sweeps_a_setting_with_the_panel_off(webui, page, panel):
    panel.set(full_steps=1)
    panel.title.click(position={"x": 150, "y": 10})
    expect(panel.switch).not_to_be_checked()
    webui.make([True, 0.6])
    before = webui.get("/tome/status").json()["summary"]
    axis = xyz(page, "txt2img")
    values = page.locator(
        "#script_txt2img_xyz_plot_x_values textarea, #script_txt2img_xyz_plot_x_values input"
    ).first
    # Before the axis, since WebUI's answer to that choice restores earlier values.
    values.fill("0.6, 2")
    choose(axis, "[ToMe] Ratio")
    # reForge and Classic log a job's error, and show that it has no result.
    message = re.compile(r"\[0, 0\.9375\]|'NoneType' object is not iterable")
    results = generate(page, webui.side, steps=1)
    expect(results.locator(".error")).to_contain_text(message)
    assert webui.get("/tome/status").json()["summary"] == before, "no picture was made"
    page.locator("#html_log_txt2img .performance").evaluate("element => element.remove()")
    values.fill("0.6, 0.7")
    results = generate(page, webui.side, steps=1)
    expect(results).to_contain_text("ToMe ratio: 0.6")
    grid = results.locator("[id$=_gallery] img").first
    assert grid.evaluate("image => image.decode().then(() => image.naturalWidth)") >= 2 * webui.side


def test_the_settings_page_has_a_section(webui, page):
    go_to(page, "Settings")
    page.locator("#settings > .tab-nav > button").get_by_text("ToMe", exact=True).click()
    for option in ("overrule_built_in", "log_level", "log_layers"):
        expect(page.locator(f"#setting_tome_{option}")).to_be_visible()
    # WebUI 1.6 lists no extension's options over the API.
    checkbox = page.locator("#setting_tome_log_layers input")
    before = checkbox.is_checked()
    try:
        checkbox.click()
        page.locator("#settings_submit").click()
        expect(page.locator("#settings_result").first).to_contain_text("tome_log_layers")
        listed = webui.get("/sdapi/v1/options").json()
        assert listed.get("tome_log_layers", not before) is not before
    finally:
        webui.post("/sdapi/v1/options", {"tome_log_layers": before})


def test_the_page_of_defaults_shows_each_control_as_it_stands(webui, page, panel):
    """Settings, Defaults writes nothing of an untouched panel, and of a control what it shows."""
    go_to(page, "Settings")
    page.locator("#settings > .tab-nav > button").get_by_text("Defaults", exact=True).click()
    if not page.locator("#ui_defaults_view").count():
        pytest.skip("this host keeps no ui-config.json")

    def changes() -> dict[str, str]:
        page.evaluate(
            "document.querySelectorAll('#settings table').forEach(table => table.remove())"
        )
        page.locator("#ui_defaults_view").click()
        table = page.locator("#settings table", has_text="Path").last
        table.wait_for()
        rows = [row.locator("td").all_inner_texts() for row in table.locator("tr").all()]
        ours = [row for row in rows if len(row) == 3 and "tome.py/txt2img/" in row[0]]
        return {path.split("tome.py/txt2img/")[1]: new for path, _, new in ours}

    # In some hosts the fold is the switch.
    assert set(changes()) <= {"ToMe/value"}
    go_to(page, "txt2img")
    panel.set(**OTHERS)
    go_to(page, "Settings")
    labels = {name: name.replace("_", " ").capitalize() for name in OTHERS}
    labels |= {"reuse_steps": "Reuse matching (steps)", "full_steps": "Steps for full ratio"}
    after = changes()
    shown = {name: after.get(f"{label}/value") for name, label in labels.items()}
    assert shown == {name: str(value) for name, value in OTHERS.items()}


def test_axes_and_panels_are_there_once_also_after_reload_ui(webui, page):
    for reload in (False, True):
        if reload:
            go_to(page, "Settings")
            page.evaluate("window.isBeforeReload = true")
            page.locator("#settings_restart_gradio").click()
            page.wait_for_function(
                "() => !window.isBeforeReload && document.querySelector('#tabs')"
            )
            await_panels(page)
        for tab in TABS:
            go_to(page, tab)
            ours = [label for label in options_of(xyz(page, tab)) if label.startswith("[ToMe]")]
            assert len(ours) == len(set(ours)) == len(DEFAULTS) + 2
            assert page.locator(f"#script_{tab}_tome_enabled").count() == 1
