"""The WebUI that WEBUI_URL names, started with --api; without one, the panel alone is tried, on the
demo's page.

WEBUI_SIDE sets the width and height of the pictures in WebUI, 512 by default; a smaller one is
quicker where merging still pays.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import io
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

URL = os.environ.get("WEBUI_URL", "").rstrip("/")
PATIENCE_MS = 180_000
"""A busy machine is waited for; a server that has ended isn't: see `browser`."""
SIDE = int(os.environ.get("WEBUI_SIDE", "512")) if URL else 32
MAP_PLACE = 10
"""Of the merge map's two arguments; those of later versions come behind them, `full_steps` first.
"""
ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]


class Picture:
    """One answer of the API: the pictures, the first one's pixels and parameters."""

    def __init__(self, answer: dict[str, Any]) -> None:
        from PIL import Image

        info = json.loads(answer["info"])
        self.infotext: str = info["infotexts"][0]
        self.parameters: dict[str, Any] = info["extra_generation_params"]
        self.images = [
            Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]
        ]
        self.png: str = answer["images"][0]
        self.pixels = self.images[0].convert("RGB").tobytes()


class WebUI:
    """A WebUI's API, as far as these tests need it."""

    def __init__(self, url: str, side: int) -> None:
        self.url = url
        self.side = side
        """Width and height of the pictures: what gives the finest layers some thousand tokens."""

    @functools.cached_property
    def fields(self) -> set[str]:
        """What a request for a picture may hold; the hosts differ in that."""
        answer = self.get("/openapi.json")
        schemas = answer.json()["components"]["schemas"] if answer.ok else {}
        return set(schemas.get("StableDiffusionProcessingTxt2Img", {}).get("properties", ()))

    @property
    def is_forge(self) -> bool:
        """Whether it is Forge, whose hires fix may load other modules of a model for its second
        pass."""
        return "hr_additional_modules" in self.fields

    @functools.cached_property
    def checks_for_nan(self) -> bool:
        """Whether it refuses a picture of NaN. Forge and its kin, which can be told to run on a
        CPU, don't."""
        flags = self.get("/sdapi/v1/cmd-flags").text
        return '"always_cpu"' not in flags and '"cpu"' not in flags

    @functools.cached_property
    def upscaler(self) -> str:
        """An upscaler for hires fix: one of latents, or else one that loads no model."""
        modes = self.get("/sdapi/v1/latent-upscale-modes")
        return next(iter(modes.json() if modes.ok else []), {"name": "None"})["name"]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST to a route of WebUI's own."""
        import requests

        return requests.post(f"{self.url}/sdapi/v1/{path}", json=body, timeout=1200)

    def get(self, path: str) -> Any:
        """GET from any route."""
        import requests

        return requests.get(f"{self.url}{path}", timeout=60)

    def request(self, arguments: list[Any] | None = None, **settings: Any) -> dict[str, Any]:
        """A request for a picture of three steps; `arguments` are the script's, and merge as if it
        had twenty."""
        body: dict[str, Any] = {
            "prompt": "cat",
            "seed": 1,
            "steps": 3,
            "width": self.side,
            "height": self.side,
            "sampler_name": "Euler",
            **settings,
        }
        if "enable_hr" in body:
            body["hr_upscaler"] = self.upscaler
        if "enable_hr" in body and self.is_forge:
            body["hr_additional_modules"] = ["Use same choices"]  # Forge's own default fails.
        if arguments is not None:
            if arguments and isinstance(arguments[0], dict):
                arguments = [{"full_steps": 1, **arguments[0]}]
            elif len(arguments) <= MAP_PLACE:
                arguments = [*arguments, *[None] * (MAP_PLACE + 2 - len(arguments)), 1]
            body["alwayson_scripts"] = {"ToMe": {"args": arguments}}
        return body

    def make(
        self, arguments: list[Any] | None = None, path: str = "txt2img", **settings: Any
    ) -> Picture:
        """The picture of such a request."""
        answer = self.post(path, self.request(arguments, **settings))
        assert answer.status_code == 200, answer.text[:500]
        return Picture(answer.json())


@pytest.fixture(scope="session")
def webui() -> WebUI:
    if not URL:
        pytest.skip("WEBUI_URL names no running WebUI")
    return WebUI(URL, SIDE)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """A page with the panel: WebUI's, or the demo's, which is started and ended as a person does
    it."""
    if URL:
        yield URL
        return
    missing = [
        name for name in ("torch", "gradio", "ldm") if importlib.util.find_spec(name) is None
    ]
    if missing:
        pytest.skip(f"WEBUI_URL names no running WebUI, and the demo needs {', '.join(missing)}")
    # One of its own: of two demos that start at once both may find the first one free.
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
    """Width and height of a small picture that is worth merging on the page."""
    return SIDE


@pytest.fixture(scope="session")
def tabs() -> list[str]:
    """The page's tabs that have a panel."""
    return ["txt2img", "img2img"] if URL else ["txt2img"]


@pytest.fixture
def tab(request: pytest.FixtureRequest, tabs: list[str], page: Any) -> str:
    """The name of a tab, to which the page was turned."""
    from on_page import go_to

    if request.param not in tabs:
        pytest.skip("the demo has no such tab")
    if len(tabs) > 1:
        go_to(page, request.param)
    return request.param


@pytest.fixture(scope="session")
def names_of_presets(address: str) -> Callable[[], list[str]]:
    """Asks for the names of all presets."""

    def ask() -> list[str]:
        with urllib.request.urlopen(f"{address}/tome/presets", timeout=180) as answer:
            return [preset["name"] for preset in json.load(answer)]

    return ask


@pytest.fixture(scope="session")
def baseline(webui: WebUI) -> Picture:
    """A picture made without a word of the extension, before the other tests."""
    return webui.make()


@pytest.fixture(scope="session")
def loaded_model(request: pytest.FixtureRequest) -> None:
    """A model, which some hosts load at the first picture."""
    if URL:
        request.getfixturevalue("baseline")


@pytest.fixture(scope="session")
def browser(address: str) -> Iterator[Any]:
    """Headless Chromium, where that and Playwright are installed; it ends when the server has."""
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
    """Ends the browser as soon as nobody listens at the address: a slow server is waited for, a
    dead one is not."""
    host, port = re.search(r"//([^/:]+):?(\d*)", address).groups()
    refusals = 0
    while not is_done.wait(2):
        try:
            socket.create_connection((host, int(port or 80)), timeout=600).close()
            refusals = 0
        except OSError:
            refusals += 1
        # Reload UI has nobody listen for a moment.
        if refusals == 30:
            print(f"nobody listens at {address} any more", file=sys.stderr)
            for process in browsers:
                with contextlib.suppress(Exception):
                    process.kill()
            return


@pytest.fixture
def open_page(browser: Any, address: str, tabs: list[str]) -> Iterator[Callable[..., Any]]:
    """Opens the page; the extension's scripts must report no error. WebUI's own may: 1.6.1's do,
    without it too."""
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
        # The panels' titles can be reached by keyboard once their scripts have run.
        for tab in tabs:
            page.locator(f"#script_{tab}_tome_enabled .label-wrap[aria-expanded]").wait_for(
                state="attached"
            )
        return page

    yield open_it
    # A page that leaves before its question was taken up stays open on gradio's side for ever, and
    # WebUI's Reload UI waits for it, with or without this extension.
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
    """A name for a preset that nobody else has; nothing of it is left afterwards, whatever is made
    of it."""
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
