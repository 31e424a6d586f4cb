"""The servers of `bench soak`: a running WebUI, or the stand-in for it in this process."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from collections import namedtuple
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from tomesd_core.webui.presets import BUILT_IN

from .packages import require

SAMPLERS = ("Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ SDE", "DDIM", "PLMS", "LMS")
"""Samplers to use if the server has them."""

SCRIPTS = "alwayson_scripts"


class RefusedError(ValueError):
    """The server refused a request."""


Answer = namedtuple("Answer", ["images", "infotext"])
"""A request's PIL pictures, without a grid of them, and the first one's parameters as text."""


class WebUI:
    """A running WebUI, driven through its API. Raises `ValueError` if it doesn't answer."""

    pixels = 1
    """Pixels of WebUI per pixel of this server, along one side."""

    def __init__(self, url: str, pid: int | None) -> None:
        self._url = url.rstrip("/")
        names = [one["name"] for one in self._ask("GET", "/sdapi/v1/samplers")]
        self.samplers = [name for name in names if name in SAMPLERS]
        self.presets = [preset["name"] for preset in self._ask("GET", "/tome/presets")]
        modes = [mode["name"] for mode in self._ask("GET", "/sdapi/v1/latent-upscale-modes")]
        self.upscaler = modes[0] if modes else "None"
        sockets = require("psutil").net_connections("tcp")
        listening = {one.laddr.port: one.pid for one in sockets if one.status == "LISTEN"}
        self.pid = pid or listening.get(urlsplit(url).port)
        """Process whose memory is read; None if it isn't on this machine."""

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        requests = require("requests")
        try:
            answer = requests.request(method, self._url + path, json=body, timeout=1200)
        except requests.RequestException as error:
            raise ValueError(f"{self._url} doesn't answer: {error}") from error
        if answer.ok:
            return answer.json()
        raise RefusedError(f"{self._url}{path} answers {answer.status_code}: {answer.text[:300]}")

    def make(self, tab: str, body: Mapping[str, Any]) -> Answer:
        """Make a request's pictures. Raises `RefusedError`."""
        answer = self._ask("POST", f"/sdapi/v1/{tab}", body)
        info = json.loads(answer["info"])
        images = [decoded(image) for image in answer["images"]]
        return Answer(images[info["index_of_first_image"] :], info["infotexts"][0])

    def is_sampling(self) -> bool:
        """Whether a picture is being made and its first step is done."""
        state = self._ask("GET", "/sdapi/v1/progress")["state"]
        return bool(state["job_count"] and state["sampling_step"])

    def end(self, how: str) -> None:
        """End the current picture: `interrupt` or `skip`."""
        self._ask("POST", f"/sdapi/v1/{how}", {})


class StandIn:
    """The stand-in for WebUI in this process, with a tiny model; same interface as `WebUI`."""

    pixels, upscaler = 8, "Latent"

    def __init__(self, host: Any) -> None:
        from modules import sd_samplers

        self._host = host
        self.samplers = [name for name in SAMPLERS if name in sd_samplers.all_samplers_map]
        self.presets, self.pid = list(BUILT_IN), os.getpid()

    def make(self, tab: str, body: Mapping[str, Any]) -> Answer:
        """Make a request's pictures. Raises `RefusedError`."""
        from modules import devices, processing

        if body["sampler_name"] not in self.samplers or set(body[SCRIPTS]) - {"ToMe"}:
            raise RefusedError("sampler or script not found")
        kind = processing.StableDiffusionProcessingTxt2Img
        if tab == "img2img":
            kind = processing.StableDiffusionProcessingImg2Img
            body = {**body, "init_images": [decoded(image) for image in body["init_images"]]}
        names = {field.name for field in dataclasses.fields(kind) if field.init}
        fields = {name: value for name, value in body.items() if name in names}
        p = self._host.make_p(body[SCRIPTS].get("ToMe", {}).get("args"), tab, **fields)
        try:
            processed = processing.process_images(p)
        except devices.NansException as error:
            raise RefusedError(str(error)) from error
        return Answer(processed.images[processed.index_of_first_image :], processed.infotexts[0])

    def is_sampling(self) -> bool:
        """Whether the first step is done."""
        from modules import shared

        return shared.state.sampling_step > 0

    def end(self, how: str) -> None:
        """End the current picture: `interrupt` or `skip`."""
        from modules import shared

        getattr(shared.state, how)()


Server = WebUI | StandIn


def decoded(picture: str) -> Image.Image:
    """Decode a picture of the API."""
    return Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
