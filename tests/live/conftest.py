"""A running WebUI, named by WEBUI_URL and started with --api. Without it every test here is skipped, saying so."""

from __future__ import annotations

import base64
import io
import json
import os
from typing import Any

import pytest

URL = os.environ.get("WEBUI_URL", "").rstrip("/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not URL:
        for item in items:
            if "live" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="WEBUI_URL names no running WebUI"))


class Picture:
    """One answer of the API: the first picture's pixels, its parameters and the answer itself."""

    def __init__(self, answer: dict[str, Any]) -> None:
        from PIL import Image

        info = json.loads(answer["info"])
        self.infotext: str = info["infotexts"][0]
        self.parameters: dict[str, Any] = info["extra_generation_params"]
        self.images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]]
        self.png: str = answer["images"][0]
        self.pixels = self.images[0].convert("RGB").tobytes()


class WebUI:
    """WebUI's API, as far as these tests need it."""

    def post(self, path: str, body: dict[str, Any]) -> Any:
        import requests

        return requests.post(f"{URL}/sdapi/v1/{path}", json=body, timeout=1200)

    def get(self, path: str) -> Any:
        import requests

        return requests.get(f"{URL}{path}", timeout=60)

    def make(self, arguments: list[Any] | None = None, path: str = "txt2img", **settings: Any) -> Picture:
        """A 512×512 picture of three steps; `arguments` are the script's."""
        body: dict[str, Any] = {
            "prompt": "a cat",
            "seed": 1,
            "steps": 3,
            "width": 512,
            "height": 512,
            "sampler_name": "Euler",
            **settings,
        }
        if arguments is not None:
            body["alwayson_scripts"] = {"ToMe": {"args": arguments}}
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text[:500]
        return Picture(answer.json())


@pytest.fixture(scope="session")
def webui() -> WebUI:
    return WebUI()


@pytest.fixture(scope="session")
def baseline(webui: WebUI) -> Picture:
    """A picture made without a word of the extension, before the other tests."""
    return webui.make()
