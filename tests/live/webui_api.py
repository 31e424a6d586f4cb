"""A running WebUI's API, as far as the tests use it."""

from __future__ import annotations

import base64
import functools
import io
import json
from typing import Any

import requests
from PIL import Image

HIRES = {"enable_hr": True, "hr_scale": 1.25, "denoising_strength": 0.6}
MAP_PLACE = 10
"""Index of the merge map's two arguments; `full_steps` follows them."""


class Picture:
    """An answer of the API: its pictures, and the first one's pixels and parameters."""

    def __init__(self, answer: dict[str, Any]) -> None:
        info = json.loads(answer["info"])
        self.infotext: str = info["infotexts"][0]
        self.parameters: dict[str, Any] = info["extra_generation_params"]
        self.images = [
            Image.open(io.BytesIO(base64.b64decode(image))) for image in answer["images"]
        ]
        self.png: str = answer["images"][0]
        self.pixels = self.images[0].convert("RGB").tobytes()


class WebUI:
    def __init__(self, url: str, side: int) -> None:
        self.url = url
        self.side = side
        """Width and height of the pictures."""

    @functools.cached_property
    def is_forge(self) -> bool:
        """Whether it is Forge, whose hires fix may load other modules for the second pass."""
        return "hr_additional_modules" in self.get("/openapi.json").text

    @functools.cached_property
    def checks_for_nan(self) -> bool:
        """Whether a picture of NaN is an error; not in Forge, nor with a flag to run on the CPU."""
        flags = self.get("/sdapi/v1/cmd-flags").text
        return '"always_cpu"' not in flags and '"cpu"' not in flags

    @functools.cached_property
    def upscaler(self) -> str:
        """An upscaler for hires fix that loads no model."""
        modes = self.get("/sdapi/v1/latent-upscale-modes")
        return next(iter(modes.json() if modes.ok else []), {"name": "None"})["name"]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST to any route."""
        return requests.post(f"{self.url}{path}", json=body, timeout=1200)

    def get(self, path: str) -> Any:
        """GET from any route."""
        return requests.get(f"{self.url}{path}", timeout=60)

    def request(self, arguments: list[Any] | None = None, **settings: Any) -> dict[str, Any]:
        """A request for a picture of three steps, at full ratio, with the script's arguments."""
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
        answer = self.post(f"/sdapi/v1/{path}", self.request(arguments, **settings))
        assert answer.status_code == 200, answer.text[:500]
        return Picture(answer.json())
