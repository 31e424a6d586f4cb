"""The merge map as an extra picture: kept from the sampling, drawn over the finished picture, put behind the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..merge_map import MergeMap, draw

SAMPLED, DRAWN = f"{__name__}.sampled", f"{__name__}.drawn"
"""Where `p` holds the maps of the batch that was sampled last, and those that are drawn, by the picture's number. A
copy of `p` shares them, so they are replaced and added to, never emptied. They are named after this module, so that a
second copy of the extension, whose modules have other names, doesn't take them for its own."""

LEAST_SIDE = 8
"""Pixels of a token's side in a drawn map: small pictures are enlarged to it, so that the lines have room."""


def forget(p: Any) -> None:
    """Takes an earlier generation's maps off p, not off the p that this one is a copy of."""
    for name in (SAMPLED, DRAWN):
        vars(p).pop(name, None)


def first_rows(conds: Any) -> list[int]:
    """Each picture's first row in the denoiser's batch, by WebUI's encoded prompts.

    The prompted rows come first; a picture has one of them, or with `AND` several, side by side.
    """
    return [0, *accumulate(len(parts) for parts in conds.batch)][:-1]


def keep(p: Any, maps: Sequence[MergeMap]) -> None:
    """Keeps a batch's maps, one a picture, until its pictures are there."""
    setattr(p, SAMPLED, maps)


def draw_on(p: Any, image: Image.Image) -> None:
    """Draws the map of the picture that `p.batch_index` says, if it has one."""
    maps = getattr(p, SAMPLED, ())
    if p.batch_index < len(maps):
        number = p.iteration * p.batch_size + p.batch_index
        drawn = _drawn(image.convert("RGB"), maps[p.batch_index])
        setattr(p, DRAWN, {**getattr(p, DRAWN, {}), number: drawn})


def append(p: Any, processed: Any) -> None:
    """Puts the drawn maps behind the pictures, each with its picture's parameters."""
    for number, drawn in getattr(p, DRAWN, {}).items():
        drawn.info["parameters"] = processed.infotext(p, number)
        processed.images.append(drawn)
        processed.infotexts.append(drawn.info["parameters"])


def _drawn(picture: Image.Image, merge_map: MergeMap) -> Image.Image:
    rows, columns = merge_map.grid
    scale = max(1, math.ceil(max(LEAST_SIDE * rows / picture.height, LEAST_SIDE * columns / picture.width)))
    pixels = np.array(picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST))
    return Image.fromarray(draw(merge_map.slots, merge_map.grid, torch.from_numpy(pixels)).numpy())
