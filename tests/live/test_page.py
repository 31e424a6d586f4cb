"""What a person clicks, in headless Chromium.

Run against a WebUI of one's own, these tests leave it as it was: presets that they save have names of their own and are
deleted again, and settings are put back.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PATIENCE_MS = 60_000
sync_api.expect.set_options(timeout=PATIENCE_MS)
expect = sync_api.expect

TABS = ["txt2img", "img2img"]
DEFAULTS = {
    "ratio": 0.9375,
    "late_ratio": 0.75,
    "schedule": "linear",
    "switch_at": 0.5,
    "max_downsample": "1",
    "min_tokens": 0,
    "apply_to": "both passes",
    "reuse_steps": 1,
    "method": "keys",
}
OTHERS = {
    "ratio": 0.4,
    "late_ratio": 0.1,
    "schedule": "step",
    "switch_at": 0.3,
    "max_downsample": "2",
    "min_tokens": 256,
    "apply_to": "first pass",
    "reuse_steps": 3,
    "method": "tokens",
}
"""For every field, a value that isn't its default."""
HIRES = {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": "Latent", "denoising_strength": 0.6}
"""Without hires fix there is no pass to choose, and `apply_to` isn't in the parameters."""


class Panel:
    """One tab's panel, as a person sees and uses it."""

    def __init__(self, page: Any, tab: str = "txt2img") -> None:
        self.page = page
        self.tab = tab
        self.root = self.element("enabled")
        self.title = self.root.locator(".label-wrap")
        self.switch = page.locator(f"#script_{tab}_tome_enabled-checkbox input")
        """The hidden checkbox whose value is sent."""
        self.preview = self.element("preview")
        self.message = self.element("preset_message")
        self.preset = self.element("preset").locator("input")

    def element(self, name: str) -> Any:
        """An element by its field's name; gradio gives the name of a piece of HTML to two, one in the other."""
        return self.page.locator(f"#script_{self.tab}_tome_{name}").first

    def unfold(self) -> Panel:
        """Opens the fold, which switches merging on."""
        self.title.click(position={"x": 150, "y": 10})
        expect(self.preview).to_be_visible()
        return self

    def number(self, name: str) -> Any:
        """A slider's number."""
        return self.element(name).locator("input[type=number]")

    def set(self, **values: Any) -> Panel:
        """Sets fields; the schedule and other choices first, since they show and hide the numbers."""
        for name, value in sorted(values.items(), key=lambda item: not isinstance(item[1], str)):
            if isinstance(value, str):
                self.element(name).get_by_text(value, exact=True).click()
            else:
                self.number(name).fill(str(value))
                self.number(name).blur()
        return self

    def expect(self, values: dict[str, Any]) -> None:
        """Waits until the fields have these values, whether they are shown or not."""
        for name, value in values.items():
            if isinstance(value, str):
                expect(self.element(name).locator("label.selected")).to_have_text(value)
            else:
                expect(self.number(name)).to_have_value(f"{value:g}")

    def press(self, button: str, says: str) -> Panel:
        """Presses one of the buttons beside the preset's name, and waits until the panel says so."""
        self.element(f"preset_{button}").click()
        expect(self.message).to_contain_text(says)
        return self

    def save(self, name: str, says: str = "Saved") -> Panel:
        """Saves the settings under a name."""
        self.name_preset(name)
        return self.press("save", says)

    def name_preset(self, name: str) -> None:
        """Writes a name into the preset field."""
        self.preset.fill(name)
        self.preset.press("End")  # gradio takes a text over when a key is let go
        self.preset.blur()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, webui: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; the extension's scripts must report no error. WebUI's own may: 1.6.1's do, without it too."""
    errors: list[str] = []
    pages = []
    questions: list[Any] = []

    def open_it(query: str = "", width: int = 1200) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 1400})
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(f"{error}\n{error.stack}"))
        page.on("websocket", lambda question: questions.append(question))
        page.goto(f"{webui.url}/{query}")
        wait_until_loaded(page)
        return page

    yield open_it
    # A page that leaves before its question was taken up stays open on gradio's side for ever, and WebUI's Reload UI
    # waits for it, with or without this extension.
    quiet, deadline = 0, time.monotonic() + 30
    while pages and quiet < 6 and time.monotonic() < deadline:
        pages[0].wait_for_timeout(50)
        quiet = quiet + 1 if all(question.is_closed() for question in questions) else 0
    for page in pages:
        page.close()
    assert not [error for error in errors if "tome" in error.lower()]


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


@pytest.fixture
def panel(page: Any) -> Panel:
    """txt2img's panel, unfolded."""
    return Panel(page).unfold()


@pytest.fixture
def own_name(webui: Any, open_page: Callable[..., Any]) -> Iterator[str]:
    """A name for a preset that nobody else has; nothing of it is left afterwards, whatever is made of it."""
    name = f"test {uuid.uuid4().hex[:8]}"
    yield name
    left = [preset for preset in names_of_presets(webui) if name in preset]
    if left:
        panel = Panel(open_page()).unfold()
        for preset in left:
            panel.name_preset(preset)
            panel.press("delete", preset)
    assert not [preset for preset in names_of_presets(webui) if name in preset]


def wait_until_loaded(page: Any) -> None:
    # The panels' titles can be reached by keyboard once their scripts have run.
    for tab in TABS:
        page.locator(f"#script_{tab}_tome_enabled .label-wrap[aria-expanded]").wait_for(state="attached")


def names_of_presets(webui: Any) -> list[str]:
    return [preset["name"] for preset in webui.get("/tome/presets").json()]


def go_to(page: Any, tab: str) -> None:
    page.locator("#tabs > .tab-nav > button").get_by_text(tab, exact=True).click()


def choose(dropdown: Any, option: str) -> None:
    dropdown.locator("input").click()
    dropdown.locator("ul.options").get_by_label(option, exact=True).click()


def options_of(dropdown: Any) -> list[str]:
    dropdown.locator("input").click()
    options = dropdown.locator("ul.options li")
    options.first.wait_for()
    names = [option.get_attribute("aria-label") for option in options.all()]
    dropdown.locator("input").blur()
    return names


def set_tab(page: Any, tab: str = "txt2img", **values: Any) -> None:
    """Sets numbers of the tab's own, such as its width."""
    for name, value in values.items():
        number = page.locator(f"#{tab}_{name} input[type=number]").first
        number.fill(str(value))
        number.blur()


def generate(page: Any, side: int, steps: int = 2) -> Any:
    """Presses Generate on txt2img, waits for the end, and gives what stands under the picture."""
    set_tab(page, width=side, height=side, steps=steps)
    page.locator("#txt2img_generate").click()
    page.locator("#html_log_txt2img .performance").wait_for(timeout=600_000)
    return page.locator("#txt2img_results")


@pytest.mark.parametrize("tab", TABS)
def test_the_title_says_what_is_set_and_the_preview_what_will_happen(page, tab):
    go_to(page, tab)
    panel = Panel(page, tab).unfold()
    expect(panel.title).to_contain_text("ToMe: 94 % → 75 % of keys, level 1")
    expect(panel.preview).to_contain_text("self-attention layers")
    panel.set(ratio=0.25)
    expect(panel.title).to_contain_text("ToMe: 25 % → 75 % of keys, level 1")
    panel.set(schedule="constant")
    expect(panel.title).to_contain_text("ToMe: 25 % of keys, level 1")


@pytest.mark.parametrize("tab", TABS)
def test_the_preview_follows_the_tabs_size_and_steps(webui, page, tab):
    go_to(page, tab)
    panel = Panel(page, tab).unfold()
    for steps in (7, 11):
        set_tab(page, tab, steps=steps)
        expect(panel.preview.locator("rect")).to_have_count(steps)
    line = panel.preview.locator("p").first
    expect(line).to_contain_text("keys each")
    before = line.inner_text()
    set_tab(page, tab, width=3 * webui.side, height=webui.side)
    expect(line).not_to_have_text(before)
    tokens = int(re.search(r"(\d+) →", line.inner_text())[1]) // 3
    for width, height in ((2, 1), (2, 2), (1, 3), (1, 1)):
        set_tab(page, tab, width=width * webui.side, height=height * webui.side)
        expect(line).to_contain_text(f" {tokens * width * height} → ")


def test_folding_the_panel_switches_merging_off_and_the_title_says_so(panel):
    expect(panel.switch).to_be_checked()
    panel.title.click(position={"x": 150, "y": 10})
    expect(panel.title).not_to_contain_text("%")
    expect(panel.switch).not_to_be_checked()


def test_controls_without_effect_are_hidden(panel):
    late_ratio, switch_at = panel.element("late_ratio"), panel.element("switch_at")
    for schedule, shown in (("constant", ()), ("linear", (late_ratio,)), ("step", (late_ratio, switch_at))):
        panel.set(schedule=schedule)
        for control in (late_ratio, switch_at):
            expect(control).to_be_visible(visible=control in shown)


def test_help_is_shown_on_hover(panel):
    for name in (*DEFAULTS, *(f"preset_{button}" for button in ("save", "delete", "reload", "export", "import"))):
        expect(panel.element(name)).to_have_attribute("title", re.compile(r"\w+ \w+"))


def test_no_server_call_while_a_slider_is_moving(panel):
    calls = []
    expect(panel.title).to_contain_text("94 %")
    panel.page.on("request", lambda request: calls.append(request.url) if request.method == "POST" else None)
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
    choose(panel.element("preset"), "Fast")
    panel.expect({"ratio": 0.75, "late_ratio": 0.6, "schedule": "linear", "max_downsample": "2", "method": "tokens"})
    expect(panel.element("late_ratio")).to_be_visible()
    expect(panel.message).to_contain_text("For drafts")
    if on:
        expect(panel.title).to_contain_text("ToMe: 75 % → 60 % of tokens, level 2")
    expect(panel.switch).to_be_checked(checked=on)
    choose(panel.element("preset"), "Hires only")
    panel.expect({**DEFAULTS, "apply_to": "hires pass"})
    if on:
        expect(panel.preview).to_contain_text("hires pass only")


@pytest.mark.parametrize("text", ["{}", "<img src=x onerror=\"document.title='run'\"> {}", "🐈 {}", "../../{}"])
def test_a_preset_is_saved_found_again_and_deleted(webui, open_page, own_name, text):
    name = text.format(own_name)
    page = open_page()
    panel = Panel(page).unfold().set(**OTHERS).save(name)
    expect(panel.message).to_contain_text(name.replace("'", "\\'"))
    assert name in names_of_presets(webui)

    page.reload()
    wait_until_loaded(page)
    panel.unfold()
    panel.expect(DEFAULTS)
    choose(panel.element("preset"), name)
    panel.expect(OTHERS)
    expect(panel.preset).to_have_value(name)

    panel.press("delete", "Deleted")
    assert name not in options_of(panel.element("preset"))
    assert name not in names_of_presets(webui)
    assert "run" not in page.title()
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [("", "must not be empty"), ("x" * 300, "up to 100 characters"), ("quality", "'Quality' is a built-in preset")],
)
def test_a_name_that_no_preset_can_have_is_refused(webui, panel, name, words):
    before = names_of_presets(webui)
    panel.save(name, says=words)
    assert names_of_presets(webui) == before


def test_the_other_tabs_panel_finds_a_new_preset(page, panel, own_name):
    panel.set(ratio=0.33).save(own_name)
    go_to(page, "img2img")
    other = Panel(page, "img2img").unfold()
    other.element("preset_reload").click()
    choose(other.element("preset"), own_name)
    other.expect({"ratio": 0.33})
    go_to(page, "txt2img")
    panel.set(ratio=0.44)
    expect(panel.title).to_contain_text("44 %")
    expect(other.title).to_contain_text("33 %")


def test_presets_are_exported_and_imported(webui, panel, own_name, tmp_path):
    panel.set(**OTHERS).save(own_name).press("export", "in the file below")
    link = panel.element("preset_file").locator("a[href]").first
    with panel.page.expect_download() as download:
        link.click()
    file = Path(tmp_path, "presets.json")
    download.value.save_as(file)
    exported = json.loads(file.read_text(encoding="utf-8"))
    assert exported["presets"][own_name]["ratio"] == OTHERS["ratio"]
    exported["presets"] = {own_name: exported["presets"][own_name]}
    file.write_text(json.dumps(exported), encoding="utf-8")

    panel.press("delete", "Deleted")
    assert own_name not in names_of_presets(webui)
    upload(panel, file)
    expect(panel.message).to_contain_text(f"Imported: {own_name}")
    assert own_name in names_of_presets(webui)
    panel.set(ratio=0.1, schedule="constant")
    choose(panel.element("preset"), own_name)
    panel.expect(OTHERS)

    file.write_text("{", encoding="utf-8")
    upload(panel, file)
    expect(panel.message).to_contain_text("the import is damaged")


def upload(panel: Panel, file: Path) -> None:
    with panel.page.expect_file_chooser() as chooser:
        panel.element("preset_import").click()
    chooser.value.set_files(file)


def test_a_generation_says_what_was_merged(webui, page, panel):
    panel.set(ratio=0.6)
    results = generate(page, webui.side)
    expect(results).to_contain_text("ToMe ratio: 0.6")
    expect(results.locator(".comments")).to_contain_text("ToMe: ")
    expect(results.locator(".comments")).to_contain_text("2 of 2 steps")
    expect(panel.preview).to_contain_text("Last: ")
    expect(panel.preview).to_contain_text("2 of 2 steps")


@pytest.mark.parametrize("tab", TABS)
def test_png_info_sends_every_field_and_switches_off_without_them(webui, baseline, page, tab, tmp_path):
    arguments = [True, *(int(value) if value == "2" else value for value in OTHERS.values())]
    pictures = {"merged": webui.make(arguments, **HIRES), "plain": baseline}
    panel = Panel(page, tab)
    for name, picture in pictures.items():
        file = Path(tmp_path, f"{name}.png")
        file.write_bytes(base64.b64decode(picture.png))
        go_to(page, "PNG Info")
        page.locator("#pnginfo_image input[type=file]").set_input_files(file)
        shown = page.locator("#tab_pnginfo")
        expect(shown).to_contain_text("Sampler")
        if name == "merged":
            expect(shown).to_contain_text("ToMe ratio")
        else:
            expect(shown).not_to_contain_text("ToMe")
        page.locator(f"#tab_pnginfo #{tab}_tab").click()
        expect(page.locator(f"#{tab}_prompt textarea")).to_be_visible()
        expect(panel.switch).to_be_checked(checked=name == "merged")
        panel.expect(OTHERS if name == "merged" else DEFAULTS)
        if name == "merged":
            expect(panel.title).to_contain_text("ToMe: 40 % → 10 % of tokens, level 2")
            go_to(page, "PNG Info")
            page.locator("#pnginfo_image [aria-label=Clear], #pnginfo_image [title=Clear]").first.click()
            # Gradio drops a change while it still answers the one before: the next picture has to wait for this.
            expect(shown).not_to_contain_text("Sampler")
        else:
            expect(panel.title).not_to_contain_text("%")


def xyz(page: Any, tab: str) -> Any:
    """The X/Y/Z plot's first axis, after choosing the script."""
    choose(page.locator(f"#{tab}_script_container #script_list"), "X/Y/Z plot")
    return page.locator(f"#script_{tab}_xyz_plot_x_type")


def test_a_plot_sweeps_a_setting_with_the_panel_off(webui, page):
    axis = xyz(page, "txt2img")
    values = page.locator("#script_txt2img_xyz_plot_x_values textarea, #script_txt2img_xyz_plot_x_values input").first
    # Before the axis: WebUI's answer to that choice writes the values back as they were then.
    values.fill("0.3, 2")
    choose(axis, "[ToMe] Ratio")
    expect(generate(page, webui.side, steps=1).locator(".error")).to_contain_text("[0, 0.9375]")
    page.locator("#html_log_txt2img .performance").evaluate("element => element.remove()")
    values.fill("0.3, 0.6")
    results = generate(page, webui.side, steps=1)
    expect(results).to_contain_text("ToMe ratio: 0.3")
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
        webui.post("options", {"tome_log_layers": before})


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
    const opacity = element => element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1;
    const texts = [".label-wrap", ".tome-preview p", ".tome-message", "label > span", "[data-testid=block-info]"];
    return texts.flatMap(selector => [...panel.querySelectorAll(selector)]).filter(e => e.offsetParent).map(element => {
        const behind = background(element), share = opacity(element);
        const text = channels(getComputedStyle(element).color).map((c, i) => c * share + behind[i] * (1 - share));
        const [light, dark] = [luminance(text), luminance(behind)].sort((a, b) => b - a);
        return [element.textContent.trim(), (light + 0.05) / (dark + 0.05)];
    });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_word_can_be_read_in_both_themes(open_page, theme):
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


def test_nothing_hangs_over_in_a_narrow_window(open_page):
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
    panel.expect({"ratio": 0.925})
    expect(panel.title).to_contain_text("ToMe: 92 %")
    tab_to(panel.element("schedule").locator("input[type=radio]:checked"))
    page.keyboard.press("ArrowRight")
    panel.expect({"schedule": "step"})


def test_axes_and_panels_are_there_once_also_after_reload_ui(page):
    for reload in (False, True):
        if reload:
            go_to(page, "Settings")
            page.evaluate("window.isBeforeReload = true")
            page.locator("#settings_restart_gradio").click()
            page.wait_for_function("() => !window.isBeforeReload && document.querySelector('#tabs')")
            wait_until_loaded(page)
        for tab in TABS:
            go_to(page, tab)
            ours = [label for label in options_of(xyz(page, tab)) if label.startswith("[ToMe]")]
            assert len(ours) == len(set(ours)) == len(DEFAULTS) + 2
            assert page.locator(f"#script_{tab}_tome_enabled").count() == 1
