"""The page in headless Chromium, where that and Playwright are installed: what a person clicks."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Iterator

import pytest

from lab.host import Host

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def address(host: Host) -> Iterator[str]:
    """The page, served, by a host that does what its buttons ask for."""
    from modules import shared

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = host.serve(port)
    thread = threading.Thread(target=host.wait, daemon=True)
    thread.start()
    yield address
    shared.state.server_command = "stop"
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser, address: str, recorded) -> Iterator[sync_api.Page]:
    """The page, loaded. It must ask no other server for anything, and report no error."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(30_000)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else page.complaints.append(r.url)
    )
    load(page, address)
    yield page
    page.close()


def load(page: sync_api.Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("[data-recorder=loaded]", state="attached")
    page.wait_for_selector("#txt2img_hr-visible-checkbox")


def fill(page: sync_api.Page, **values: object) -> None:
    """Sets controls of the txt2img tab by id, as a person would."""
    for name, value in values.items():
        kind = "textarea" if name.endswith("prompt") else "input[type=number]"
        control = page.locator(f"#txt2img_{name} {kind}").first
        control.fill(str(value))
        control.blur()


def value(page: sync_api.Page, name: str) -> str:
    return page.locator(f"#txt2img_{name}").locator("textarea, input[type=number]").first.input_value()


def generate(page: sync_api.Page, tab: str = "txt2img") -> str:
    """Presses Generate and returns the infotext under the picture."""
    page.click(f"#{tab}_generate")
    page.wait_for_selector(f"#html_log_{tab} .performance")
    return page.inner_text(f"#html_info_{tab}")


SMALL = {"prompt": "cat zebra", "steps": 2, "width": 16, "height": 24, "seed": 5}


def test_generate(page, recorded):
    arguments = []
    recorded.actions["process"] = lambda p, *args: arguments.append(args)
    fill(page, **SMALL)
    page.fill("#script_txt2img_recorder_note textarea", "typed")
    infotext = generate(page)
    assert re.search(r"cat zebra\s+Steps: 2, Sampler: Euler a, .*Seed: 5, Size: 16x24", infotext)
    assert "does not know the word 'zebra'" in page.inner_text("#html_log_txt2img")
    assert page.locator("#txt2img_gallery img").count() >= 1
    assert arguments == [("typed", 0.5)]
    assert not page.locator("#txt2img_interrupt").is_visible()
    assert page.complaints == []


def test_interrupt(page, recorded):
    going = threading.Event()
    pressed = threading.Event()

    def hold(params):
        going.set()
        assert pressed.wait(20)

    recorded.actions["cfg_denoiser"] = hold
    fill(page, **{**SMALL, "steps": 3})
    page.click("#txt2img_generate")
    assert going.wait(20)
    page.wait_for_selector(".progressDiv .progress")
    page.click("#txt2img_interrupt")
    from modules import shared

    page.wait_for_function("() => fetch('./sdapi/v1/progress').then(r => r.json()).then(r => r.state.interrupted)")
    assert shared.state.interrupted
    pressed.set()
    page.wait_for_selector("#html_log_txt2img .performance")
    assert len(recorded.denoiser_calls) == 1
    page.wait_for_selector(".progressDiv", state="detached")


def test_an_error_is_shown(page, host):
    def fail(*_):
        raise ValueError("on <purpose>")

    handle = host.sd_model.model.diffusion_model.register_forward_hook(fail)
    fill(page, **SMALL)
    generate(page)
    handle.remove()
    assert "ValueError: on <purpose>" in page.inner_text("#html_log_txt2img .error")


def test_a_fold_that_is_a_toggle(page, recorded):
    seen = []
    recorded.actions["before_process"] = lambda p, *_: seen.append(p.enable_hr)
    fill(page, **SMALL)
    box, fold = page.locator("#txt2img_hr-visible-checkbox"), page.locator("#txt2img_hr .label-wrap")
    fold.click()
    page.wait_for_selector("#txt2img_hr.input-accordion-open")
    assert box.is_checked(), "opening the fold switches it on"
    assert "Hires upscale: 2" in generate(page)
    box.click()
    assert "open" in fold.get_attribute("class"), "once the box was clicked itself, the two are apart"
    page.evaluate("document.querySelector('#html_log_txt2img .performance').remove()")
    assert "Hires" not in generate(page)
    assert seen == [True, False]


def test_png_info_and_send_to_txt2img(page, host, tmp_path):
    picture = host.txt2img(prompt="a dog", steps=3, width=40, height=24, seed=9, sampler_name="Heun").images[0]
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", picture.info["parameters"] + ", Recorder note: from a file, Recorder level: 0.8")
    picture.save(tmp_path / "picture.png", pnginfo=text)
    page.click("#tabs > .tab-nav > button:has-text('PNG Info')")
    page.set_input_files("#pnginfo_image input[type=file]", tmp_path / "picture.png")
    page.wait_for_selector("#tab_pnginfo p:has-text('Sampler: Heun')")
    page.click("#txt2img_tab")
    page.wait_for_function("() => document.querySelector('#txt2img_prompt textarea').value == 'a dog'")
    assert page.locator("#txt2img_prompt").is_visible(), "the tab is switched to"
    assert [value(page, name) for name in ("steps", "width", "height", "seed")] == ["3", "40", "24", "9"]
    assert page.input_value("#txt2img_sampling input") == "Heun"
    assert page.input_value("#script_txt2img_recorder_note textarea") == "from a file"
    assert page.locator("#script_txt2img_recorder_level input[type=number]").input_value() == "0.8"
    assert page.complaints == []


def test_settings_and_reload_ui(page, recorded, address):
    from modules import shared

    page.click("#tabs > .tab-nav > button:has-text('Settings')")
    page.click("#settings > .tab-nav > button:has-text('Recorder')")
    page.click("#setting_recorder_flag input")
    page.click("#settings_submit")
    page.wait_for_selector("#settings_result:has-text('1 settings changed: recorder_flag')")
    assert shared.opts.recorder_flag is True
    page.click("#settings_restart_gradio")
    page.wait_for_selector("h1:has-text('Reloading')")
    page.wait_for_selector("[data-recorder=loaded]", state="attached")
    assert "script_unloaded" in recorded.events
    page.wait_for_selector("#txt2img_hr-visible-checkbox")
    fill(page, **SMALL)
    assert "Seed: 5" in generate(page)


@pytest.mark.parametrize(("theme", "dark"), [("light", False), ("dark", True)])
def test_themes(page, address, theme, dark):
    load(page, f"{address}?__theme={theme}")
    assert page.evaluate("document.body.classList.contains('dark')") == dark
    colour = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 380) == dark
    style = "getComputedStyle(document.querySelector('#script_txt2img_recorder_note')).borderLeftColor"
    assert page.evaluate(style) == "rgb(1, 2, 3)", "the extension's own style.css"
