"""Stands in for `modules.api.models`: what requests and replies look like."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from modules.processing import StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img
from PIL import Image
from pydantic import BaseModel, create_model

API_NOT_ALLOWED = {"sd_model", "outpath_samples", "outpath_grids", "extra_generation_params"}


def _request_model(name: str, processing_class: type, **more: tuple[type, Any]) -> type[BaseModel]:
    """A request with every field of a processing class, all optional; unknown fields are ignored."""
    hints = typing.get_type_hints(processing_class)
    fields = {
        field.name: ((str if hints[field.name] is Image.Image else hints[field.name]) | None, field.default)
        for field in dataclasses.fields(processing_class)
        if field.init and field.name not in API_NOT_ALLOWED
    }
    common = {
        "sampler_index": (str, "Euler"),
        "script_name": (str | None, None),
        "script_args": (list, []),
        "send_images": (bool, True),
        "save_images": (bool, False),
        "alwayson_scripts": (dict, {}),
        "infotext": (str | None, None),
    }
    return create_model(name, **fields, **common, **more)


StableDiffusionTxt2ImgProcessingAPI = _request_model(
    "StableDiffusionProcessingTxt2Img", StableDiffusionProcessingTxt2Img
)
StableDiffusionImg2ImgProcessingAPI = _request_model(
    "StableDiffusionProcessingImg2Img", StableDiffusionProcessingImg2Img, include_init_images=(bool, False)
)


class TextToImageResponse(BaseModel):
    """A reply with pictures: PNGs in base64, the request, and the `Processed` as JSON."""

    images: list[str] | None = None
    parameters: dict
    info: str


class PNGInfoRequest(BaseModel):
    """A picture in base64 whose parameters are asked for."""

    image: str


class PNGInfoResponse(BaseModel):
    """What a picture says of itself: its infotext, all of its items, and the infotext's parameters."""

    info: str
    items: dict = {}
    parameters: dict = {}


class ProgressRequest(BaseModel):
    """Taken as WebUI takes it; a picture of the moment is never sent here."""

    skip_current_image: bool = False


class ProgressResponse(BaseModel):
    """How far the generation is, from 0 to 1, and what WebUI says beside it."""

    progress: float
    eta_relative: float
    state: dict
    current_image: str | None = None
    textinfo: str | None = None


class ScriptArg(BaseModel):
    """One control of a script."""

    label: str | None = None
    value: Any | None = None
    minimum: Any | None = None
    maximum: Any | None = None
    step: Any | None = None
    choices: list[str] | None = None


class ScriptInfo(BaseModel):
    """One script of one tab."""

    name: str | None = None
    is_alwayson: bool | None = None
    is_img2img: bool | None = None
    args: list[ScriptArg] = []
