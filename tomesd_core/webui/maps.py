"""The merge map as an extra picture: recorded while sampling, drawn over the finished picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..merge_map import MapRecorder, MergeMap, draw
from ..token_map import TokenMap
from . import generation, host

DRAWN_SIDE = 8
"""Smallest side of a token in a drawn map, in pixels; smaller pictures are enlarged."""

UNetInput = tuple[Sequence[int], Mapping[str, Any]]
"""The latent's rows and columns in a UNet call, and in Forge its `transformer_options`."""


class PictureRecorder(MapRecorder):
    """Records each picture's prompted half in one pass; a refiner continues it."""

    def __init__(
        self,
        place: tuple[int, int],
        first_items: list[int],
        latent: Sequence[int],
        unet_input: Callable[[], UNetInput],
    ) -> None:
        """`place` is step and layer; `latent` the rows and columns of a whole picture.

        `first_items` comes from `host.first_items`; `unet_input` returns the running UNet call's.
        """
        super().__init__(*place)
        self._first_items, self._latent, self._unet_input = first_items, latent, unet_input
        self.pictures = first_items
        """The pictures' places among the recorded items."""
        self._of_tiles: set[tuple[str, tuple[int, int]]] = set()

    def __call__(
        self, layer_name: str, step: int, grid: tuple[int, int], token_map: TokenMap
    ) -> None:
        """Keep the prompted items' slots of this call; see `MapRecorder`."""
        latent, options = self._unet_input()
        if any(side < whole for side, whole in zip(latent, self._latent, strict=False)):
            self._of_tiles.add((layer_name, grid))
        items = host.prompted_items(options, len(token_map.slots))
        if items is not None:
            self.pictures = list(range(len(self._first_items)))
            token_map = TokenMap(token_map.slots[list(items)], token_map.merged_tokens)
        super().__call__(layer_name, step, grid, token_map)

    def suffix_of(self, merge_map: MergeMap) -> str:
        """A note if the map shows a tile: other extensions may call the UNet once per tile."""
        is_tile = (merge_map.layer_name, merge_map.grid) in self._of_tiles
        return ", of one tile" if is_tile else ""


def draw_on(p: Any, image: Image.Image) -> None:
    """Draw the map of the picture at `p.batch_index`, if it has one."""
    prepared = generation.of(p)
    if prepared is not None and p.batch_index < len(prepared.maps):
        number = p.iteration * p.batch_size + p.batch_index
        merge_map = prepared.maps[p.batch_index]
        prepared.drawn_maps[number] = _drawn(image.convert("RGB"), merge_map)


def append(p: Any, processed: Any) -> None:
    """Append the drawn maps to the pictures, each with its picture's parameters."""
    prepared = generation.of(p)
    # ADetailer ends generations that have no pictures.
    texts = processed.infotexts[processed.index_of_first_image :]
    for number, picture in (prepared.drawn_maps if prepared is not None and texts else {}).items():
        picture.info["parameters"] = texts[number]
        processed.images.append(picture)
        processed.infotexts.append(picture.info["parameters"])


def _drawn(picture: Image.Image, merge_map: MergeMap) -> Image.Image:
    rows, columns = merge_map.grid
    smallest = max(DRAWN_SIDE * rows / picture.height, DRAWN_SIDE * columns / picture.width)
    scale = max(1, math.ceil(smallest))
    size = picture.width * scale, picture.height * scale
    pixels = np.array(picture.resize(size, Image.Resampling.NEAREST))
    return Image.fromarray(draw(merge_map.slots, merge_map.grid, torch.from_numpy(pixels)).numpy())
