"""The WebUI that WEBUI_URL names, started with --api; without one, the miniature host with its tiny model.

So anyone can point these tests at their own WebUI, and CI takes the same steps without one. WEBUI_SIDE sets the width
and height of the pictures there, 512 by default; a smaller one is quicker where merging still pays.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

URL = os.environ.get("WEBUI_URL", "").rstrip("/")


class Picture:
    """One answer of the API: the pictures, the first one's pixels and parameters."""

    def __init__(self, answer: dict[str, Any]) -> None:
        from PIL import Image

        info = json.loads(answer["info"])
        self.infotext: str = info["infotexts"][0]
        self.parameters: dict[str, Any] = info["extra_generation_params"]
        self.images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]]
        self.png: str = answer["images"][0]
        self.pixels = self.images[0].convert("RGB").tobytes()


class WebUI:
    """A WebUI's API, as far as these tests need it."""

    def __init__(self, url: str, side: int) -> None:
        self.url = url
        self.side = side
        """Width and height of the pictures: what gives the finest layers some thousand tokens."""

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST to a route of WebUI's own."""
        import requests

        return requests.post(f"{self.url}/sdapi/v1/{path}", json=body, timeout=1200)

    def get(self, path: str) -> Any:
        """GET from any route."""
        import requests

        return requests.get(f"{self.url}{path}", timeout=60)

    def request(self, arguments: list[Any] | None = None, **settings: Any) -> dict[str, Any]:
        """A request for a picture of three steps; `arguments` are the script's."""
        body: dict[str, Any] = {
            "prompt": "cat",
            "seed": 1,
            "steps": 3,
            "width": self.side,
            "height": self.side,
            "sampler_name": "Euler",
            **settings,
        }
        if arguments is not None:
            body["alwayson_scripts"] = {"ToMe": {"args": arguments}}
        return body

    def make(self, arguments: list[Any] | None = None, path: str = "txt2img", **settings: Any) -> Picture:
        """The picture of such a request."""
        answer = self.post(path, self.request(arguments, **settings))
        assert answer.status_code == 200, answer.text[:500]
        return Picture(answer.json())


@pytest.fixture(scope="session")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    if URL:
        yield WebUI(URL, side=int(os.environ.get("WEBUI_SIDE", "512")))
        return
    missing = [name for name in ("torch", "gradio", "ldm") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"WEBUI_URL names no running WebUI, and the miniature host needs {', '.join(missing)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("host")
    log = folder / "log.txt"
    command = [
        sys.executable,
        "-m",
        "lab.host",
        "--port",
        str(port),
        "--random",
        "--data-dir",
        str(folder),
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            _wait(process, log)
            yield WebUI(f"http://127.0.0.1:{port}", side=32)
        finally:
            process.terminate()


def _wait(process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        # Said when all is there; the first routes answer before.
        if "The page: " in log.read_text():
            return
        time.sleep(0.2)
    pytest.fail(f"the miniature host did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def baseline(webui: WebUI) -> Picture:
    """A picture made without a word of the extension, before the other tests."""
    return webui.make()
