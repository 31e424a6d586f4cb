"""The WebUI at WEBUI_URL, started with --api, or else the demo's page for the panel's tests.

WEBUI_SIDE sets the width and height of the pictures, 512 by default; smaller ones are faster.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from webui_api import Picture, WebUI

URL = os.environ.get("WEBUI_URL", "").rstrip("/")
PATIENCE_MS = 180_000
"""Long, for busy machines; `browser` ends when the server does."""
SIDE = int(os.environ.get("WEBUI_SIDE", "512")) if URL else 32
ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]


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
    missing = [
        name for name in ("torch", "gradio", "ldm") if importlib.util.find_spec(name) is None
    ]
    if missing:
        pytest.skip(f"WEBUI_URL names no running WebUI, and the demo needs {', '.join(missing)}")
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
def tabs() -> list[str]:
    """The page's tabs that have a panel."""
    return ["txt2img", "img2img"] if URL else ["txt2img"]


@pytest.fixture
def tab(request: pytest.FixtureRequest, tabs: list[str], page: Any) -> str:
    """A tab's name, once the page shows it."""
    from on_page import go_to

    if request.param not in tabs:
        pytest.skip("the demo has no such tab")
    if len(tabs) > 1:
        go_to(page, request.param)
    return request.param


@pytest.fixture(scope="session")
def names_of_presets(address: str) -> Callable[[], list[str]]:
    """Return the names of all presets."""

    def ask() -> list[str]:
        with urllib.request.urlopen(f"{address}/tome/presets", timeout=180) as answer:
            return [preset["name"] for preset in json.load(answer)]

    return ask


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
    """Headless Chromium, which ends when the server does."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        before = set(_descendants())
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        is_done = threading.Event()
        watch = threading.Thread(
            target=_end_with_server, args=(address, set(_descendants()) - before, is_done)
        )
        watch.start()
        yield browser
        is_done.set()
        watch.join()
        browser.close()


def _descendants() -> list[Any]:
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    return psutil.Process().children(recursive=True)


def _end_with_server(address: str, browsers: set[Any], is_done: threading.Event) -> None:
    """Kill the browser once nothing listens at the address: a slow server is waited for."""
    host, port = re.search(r"//([^/:]+):?(\d*)", address).groups()
    refusals = 0
    while not is_done.wait(2):
        try:
            socket.create_connection((host, int(port or 80)), timeout=600).close()
            refusals = 0
        except OSError:
            refusals += 1
        # During Reload UI nothing listens for a moment.
        if refusals == 30:
            print(f"nothing listens at {address} any more", file=sys.stderr)
            for process in browsers:
                with contextlib.suppress(Exception):
                    process.kill()
            return


@pytest.fixture
def open_page(browser: Any, address: str, tabs: list[str]) -> Iterator[Callable[..., Any]]:
    """Open the page; the extension's scripts must report no error. WebUI's own may: 1.6.1's do."""
    errors: list[str] = []
    pages = []
    questions: list[Any] = []

    def open_it(query: str = "", width: int = 1200) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 1400})
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(f"{error}\n{error.stack}"))
        page.on("websocket", lambda question: questions.append(question))
        page.goto(f"{address}/{query}")
        # The panel's script makes its title reachable by keyboard.
        for tab in tabs:
            page.locator(f"#script_{tab}_tome_enabled .label-wrap[aria-expanded]").wait_for(
                state="attached"
            )
        return page

    yield open_it
    # A page that closes before gradio took up its request stays open there for ever, and Reload UI
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
def panel(page: Any) -> Any:
    """txt2img's panel, unfolded."""
    from on_page import Panel

    return Panel(page).unfold()


@pytest.fixture
def own_name(
    names_of_presets: Callable[[], list[str]], open_page: Callable[..., Any]
) -> Iterator[str]:
    """A unique preset name, whose presets are deleted afterwards."""
    from on_page import Panel

    name = f"test {uuid.uuid4().hex[:8]}"
    yield name
    left = [preset for preset in names_of_presets() if name in preset]
    if left:
        panel = Panel(open_page()).unfold()
        for preset in left:
            panel.name_preset(preset)
            panel.press("delete", preset)
    assert not [preset for preset in names_of_presets() if name in preset]
