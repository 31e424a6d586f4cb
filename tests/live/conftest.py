"""The WebUI at WEBUI_URL, started with --api, or else the demo's page for the panel's tests.

WEBUI_SIDE sets the width and height of the pictures, 512 by default; smaller ones are faster.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from on_page import PATIENCE_MS, URL, Panel, await_panels, chromium, go_to
from webui_api import Picture, WebUI

SIDE = int(os.environ.get("WEBUI_SIDE", "512")) if URL else 32
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def webui() -> WebUI:
    if not URL:
        pytest.skip("WEBUI_URL names no running WebUI")
    return WebUI(URL, SIDE)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Address of a page with the panel: WebUI's, or that of a demo started here."""
    if URL:
        yield URL
        return
    # Two demos that start at once could choose the same free port.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lab.demo", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = (re.match(r"The page: (\S+)/ ", line) for line in process.stdout)
            address = next((line[1] for line in lines if line), None)
            assert address is not None, f"the demo has ended with {process.wait()}"
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=600)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(scope="session")
def side() -> int:
    """Width and height of a small picture that is worth merging."""
    return SIDE


@pytest.fixture(scope="session")
def names_of_presets(address: str) -> Callable[[], list[str]]:
    """Return the names of all presets."""
    ask = functools.partial(requests.get, f"{address}/tome/presets", timeout=180)
    return lambda: [preset["name"] for preset in ask().json()]


@pytest.fixture(scope="session")
def baseline(webui: WebUI) -> Picture:
    """A picture made before the other tests, without the script's arguments."""
    return webui.make()


@pytest.fixture(scope="session")
def loaded_model(request: pytest.FixtureRequest) -> None:
    """Have a model loaded, which some hosts do at the first picture."""
    if URL:
        request.getfixturevalue("baseline")


@pytest.fixture(scope="session")
def browser(address: str) -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Open the page; the extension's scripts must report no error. WebUI's own may: 1.6.1's do.

    The demo's page must report none at all, and ask no other server.
    """
    pages = []
    seen: dict[str, list[Any]] = {
        event: [] for event in ("pageerror", "console", "request", "websocket")
    }

    def open_it(query: str = "", width: int = 1200) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 1400})
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        for event, record in seen.items():
            page.on(event, lambda each, record=record: record.append(each))
        page.goto(f"{address}/{query}")
        await_panels(page)
        return page

    yield open_it
    close(pages, seen["websocket"])
    errors = [f"{error}\n{error.stack}" for error in seen["pageerror"]]
    if URL:
        assert not [error for error in errors if "tome" in error.lower()]
    else:
        assert errors == [each.text for each in seen["console"] if each.type == "error"] == []
        addresses = {request.url for request in seen["request"]}
        assert all(each.startswith((address, "data:", "blob:")) for each in addresses), addresses


def close(pages: list[Any], questions: list[Any]) -> None:
    """Close pages once gradio has answered them.

    A page that closes before gradio took up its request stays open there for ever, and Reload UI
    waits for it, with or without this extension.
    """
    quiet, deadline = 0, time.monotonic() + 30
    while pages and quiet < 6 and time.monotonic() < deadline:
        pages[0].wait_for_timeout(50)
        quiet = quiet + 1 if all(question.is_closed() for question in questions) else 0
    for page in pages:
        page.close()


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


@pytest.fixture
def panel(request: pytest.FixtureRequest, page: Any) -> Panel:
    """txt2img's panel, or that of the tab in the test's parameters, unfolded."""
    tab = getattr(request, "param", "txt2img")
    if tab != "txt2img":
        go_to(page, tab)
    return Panel(page, tab).unfold()


@pytest.fixture
def own_name(
    names_of_presets: Callable[[], list[str]], open_page: Callable[..., Any]
) -> Iterator[str]:
    """A unique preset name, whose presets are deleted afterwards."""
    name = f"test {uuid.uuid4().hex[:8]}"
    yield name
    left = [preset for preset in names_of_presets() if name in preset]
    if left:
        panel = Panel(open_page()).unfold()
        for preset in left:
            panel.name_preset(preset)
            panel.press("delete", preset)
    assert not [preset for preset in names_of_presets() if name in preset]
