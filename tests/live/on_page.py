"""Helpers of the tests that click on a page."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

PATIENCE_MS = 180_000
"""Long, for busy machines."""
expect.set_options(timeout=PATIENCE_MS)

URL = os.environ.get("WEBUI_URL", "").rstrip("/")
TABS = ["txt2img", "img2img"] if URL else ["txt2img"]
"""The tabs with a panel; the demo has one."""
DEFAULTS = {
    "ratio": 0.8,
    "late_ratio": 0.75,
    "schedule": "constant",
    "switch_at": 0.5,
    "max_downsample": "1",
    "min_tokens": 0,
    "apply_to": "both passes",
    "reuse_steps": 1,
    "method": "keys",
    "full_steps": 20,
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
    "full_steps": 2,
}
"""For every field, a value that isn't its default."""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


class Panel:
    """One tab's panel, as a user sees it."""

    def __init__(self, page: Any, tab: str = "txt2img") -> None:
        self.page = page
        self.tab = tab
        self.root = self.element("enabled")
        self.title = self.root.locator(".label-wrap").first
        self.switch = page.locator(f"#script_{tab}_tome_enabled-checkbox input")
        """The hidden checkbox with the value that is sent."""
        self.preview = self.element("preview")
        self.message = self.element("preset_message")
        self.preset = self.element("preset").locator("input")

    def element(self, name: str) -> Any:
        """An element by its field's name; gradio nests two elements of an HTML component's id."""
        return self.page.locator(f"#script_{self.tab}_tome_{name}").first

    def unfold(self) -> Panel:
        """Open the fold, which switches merging on; the demo's is open."""
        if self.title.get_attribute("aria-expanded") != "true":
            self.title.click(position={"x": 150, "y": 10})
        expect(self.preview).to_be_visible()
        more, method = self.element("more").locator(".label-wrap"), self.element("method")
        for _ in range(3):
            if not method.is_visible():
                # A line that appears above may move the fold away from under the click.
                more.click()
                with contextlib.suppress(AssertionError):
                    expect(method).to_be_visible(timeout=5_000)
        expect(method).to_be_visible()
        return self

    def number(self, name: str) -> Any:
        """A slider's number."""
        return self.element(name).locator("input[type=number]")

    def set(self, **values: Any) -> Panel:
        """Set fields, choices first, since they show and hide the numbers."""
        for name, value in sorted(values.items(), key=lambda item: not isinstance(item[1], str)):
            if isinstance(value, str):
                self.element(name).get_by_text(value, exact=True).click()
            else:
                self.number(name).fill(str(value))
                self.number(name).blur()
        return self

    def expect(self, values: dict[str, Any]) -> None:
        """Wait until the fields, shown or hidden, have these values."""
        for name, value in values.items():
            if isinstance(value, str):
                expect(self.element(name).locator("label.selected")).to_have_text(value)
            else:
                expect(self.number(name)).to_have_value(f"{value:g}")

    def press(self, button: str, says: str) -> Panel:
        """Press a button next to the preset's name, and wait for the message."""
        self.element(f"preset_{button}").click()
        expect(self.message).to_contain_text(says)
        return self

    def save(self, name: str, says: str = "Saved") -> Panel:
        """Save the settings under a name."""
        self.name_preset(name)
        return self.press("save", says)

    def choose_preset(self, name: str) -> None:
        """Choose a preset from the list."""
        choose(self.element("preset"), name)

    def name_preset(self, name: str) -> None:
        """Type a name into the preset field."""
        self.preset.fill(name)
        self.preset.press("End")  # gradio reads the text on keyup
        self.preset.blur()


def await_panels(page: Any) -> None:
    """Wait for the panel's script, which makes its title reachable by keyboard."""
    for tab in TABS:
        title = page.locator(f"#script_{tab}_tome_enabled .label-wrap[aria-expanded]")
        title.wait_for(state="attached")


def go_to(page: Any, tab: str) -> None:
    # Forge's tab names have capitals.
    page.locator("#tabs > .tab-nav > button").get_by_text(
        re.compile(f"^\\s*{tab}\\s*$", re.IGNORECASE)
    ).click()


def choose(dropdown: Any, option: str | re.Pattern[str]) -> None:
    dropdown.locator("input").click()
    dropdown.locator("ul.options").get_by_label(option, exact=True).click()


def options_of(dropdown: Any) -> list[str]:
    dropdown.locator("input").click()
    options = dropdown.locator("ul.options li")
    options.first.wait_for()
    names = [option.get_attribute("aria-label") for option in options.all()]
    dropdown.locator("input").blur()
    return names


def await_option(dropdown: Any, option: str, is_there: bool = True) -> None:
    """Wait until a dropdown has an option, or hasn't: the page loads its presets late."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while (option in options_of(dropdown)) != is_there:
        assert time.monotonic() < deadline, f"the option {option!r} is there: {not is_there}"
        dropdown.page.wait_for_timeout(200)


def set_tab(page: Any, tab: str = "txt2img", **values: Any) -> None:
    """Set numbers of the tab, such as its width."""
    for name, value in values.items():
        number = page.locator(f"#{tab}_{name} input[type=number]").first
        number.fill(str(value))
        number.blur()
