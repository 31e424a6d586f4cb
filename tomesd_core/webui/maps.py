"""The merge map as an extra picture: drawn over the finished picture, and put behind the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..merge_map import MergeMap, draw
from . import generation

DRAWN_SIDE = 8
"""Pixels of a token's side in a drawn map: small pictures are enlarged to it, so that the lines
have room."""


def draw_on(p: Any, image: Image.Image) -> None:
    """Draws the map of the picture that `p.batch_index` says, if it has one."""
    prepared = generation.of(p)
    if prepared is not None and p.batch_index < len(prepared.maps):
        number = p.iteration * p.batch_size + p.batch_index
        prepared.drawn_maps[number] = _drawn(image.convert("RGB"), prepared.maps[p.batch_index])


def append(p: Any, processed: Any) -> None:
    """Puts the drawn maps behind the pictures, each with its picture's parameters."""
    prepared = generation.of(p)
    # ADetailer ends generations that have no pictures.
    texts = processed.infotexts[processed.index_of_first_image :]
    for number, picture in (prepared.drawn_maps if prepared is not None and texts else {}).items():
        picture.info["parameters"] = texts[number]
        processed.images.append(picture)
        processed.infotexts.append(picture.info["parameters"])


def _drawn(picture: Image.Image, merge_map: MergeMap) -> Image.Image:
    rows, columns = merge_map.grid
    scale = max(
        1, math.ceil(max(DRAWN_SIDE * rows / picture.height, DRAWN_SIDE * columns / picture.width))
    )
    size = picture.width * scale, picture.height * scale
    pixels = np.array(picture.resize(size, Image.Resampling.NEAREST))
    return Image.fromarray(draw(merge_map.slots, merge_map.grid, torch.from_numpy(pixels)).numpy())
