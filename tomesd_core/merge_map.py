"""The merge map: the groups of merged tokens of one picture, in one layer and step, as an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .token_map import TokenMap

ALONE = -1
"""Slot value of unmerged tokens."""

GOLDEN = 0.6180339887498949
"""The golden ratio's fraction; multiples of squares by it spread evenly over the hue circle."""

COVER = 0.6
"""Opacity of a group's colour."""

EDGE = 0.35
"""Brightness of group outlines, as a fraction of the pixel below."""

LEAST_SIDE = 4
"""Smallest side of a token, in pixels, that gets outlines."""


@dataclasses.dataclass(frozen=True)
class MergeMap:
    """The merged tokens of one picture, in one layer and step."""

    slots: Tensor
    """[N], int64, on the CPU: the slot of each token."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    step: int
    """Counted from 1."""
    layer: int
    """Counted from 1 among the layers that merged in this step."""
    layer_name: str

    def __str__(self) -> str:
        rows, columns = self.grid
        layer = f"{self.layer} ({self.layer_name}, {columns}x{rows} tokens)"
        return f"merge map of step {self.step}, layer {layer}"


class MapRecorder:
    """An `on_map` for `attach` that keeps the maps of one layer and step of a sampling.

    `step` and `layer` count from 1, the layer among those that merged in that step, in the order of
    their calls. If the step didn't merge, the last merged step before it is kept, or else the first
    one after it; a layer beyond the last is the last. Recording neither copies nor waits for the
    device while the model runs.
    """

    def __init__(self, step: int, layer: int) -> None:
        self._wanted_step, self._wanted_layer = step - 1, layer
        self._step = -1
        self._names: list[str] = []
        self._grid = (0, 0)
        self._rows: list[Tensor] = []

    def __call__(
        self, layer_name: str, step: int, grid: tuple[int, int], token_map: TokenMap
    ) -> None:
        """Keep this call's slots if it is the best match so far for the wanted step and layer."""
        if step != self._step:
            if self._names and step > self._wanted_step:
                return
            self._step = step
            self._names.clear()
        if layer_name not in self._names and len(self._names) < self._wanted_layer:
            self._names.append(layer_name)
            self._grid, self._rows = grid, []
        if layer_name == self._names[-1] and grid == self._grid:
            self._rows.append(token_map.slots)

    def maps(self, rows: Sequence[int]) -> list[MergeMap]:
        """The maps of the batch items at `rows`; empty if nothing merged.

        If a step's batch came in several calls, rows count on over the calls; a row beyond the last
        is the last.
        """
        if not self._rows:
            return []
        slots = torch.cat(self._rows).cpu()
        place = self._grid, self._step + 1, len(self._names), self._names[-1]
        return [MergeMap(slots[min(row, len(slots) - 1)], *place) for row in rows]


def draw(slots: Tensor, grid: tuple[int, int], picture: Tensor) -> Tensor:
    """Draw each group of merged tokens over `picture` in one colour; unmerged tokens stay plain.

    `slots` is [N] for a grid of (rows, columns) tokens, `picture` uint8 [H, W, 3] of any size on
    the same device. Groups are outlined if tokens are large enough, and equal slots always get
    equal colours. Returns uint8 [H, W, 3]. Raises `ValueError` for other shapes or dtypes.
    """
    rows, columns = grid
    if slots.shape != (rows * columns,):
        raise ValueError(
            f"slots must be [{rows * columns}] for a {rows}x{columns} grid, got {list(slots.shape)}"
        )
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != torch.uint8:
        raise ValueError(
            f"picture must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}"
        )
    height, width = picture.shape[:2]
    is_merged = slots.bincount()[slots] > 1
    laid = torch.where(is_merged, slots, ALONE).view(grid)
    down = torch.arange(height, device=slots.device) * rows // height
    across = torch.arange(width, device=slots.device) * columns // width

    def of_pixels(tokens: Tensor) -> Tensor:
        """[rows, columns, …] to [H, W, …]."""
        return tokens.index_select(0, down).index_select(1, across)

    pixels = picture.float().lerp_(of_pixels(_colours(len(slots), slots.device)[laid]), COVER)
    if min(height // rows, width // columns) >= LEAST_SIDE:
        pixels *= 1 - (1 - EDGE) * _edges(of_pixels(laid))[..., None].float()
    return torch.where(
        of_pixels(laid != ALONE)[..., None], pixels.round_().to(torch.uint8), picture
    )


def _edges(of_pixel: Tensor) -> Tensor:
    """[H, W]: true for pixels whose upper or left neighbour belongs to another slot."""
    is_edge = torch.zeros_like(of_pixel, dtype=torch.bool)
    is_edge[1:] |= of_pixel[1:] != of_pixel[:-1]
    is_edge[:, 1:] |= of_pixel[:, 1:] != of_pixel[:, :-1]
    return is_edge


def _colours(slots: int, device: torch.device) -> Tensor:
    """[slots, 3], float32, 0 to 255: a colour per slot, mostly unlike its neighbours'."""
    number = torch.arange(slots, device=device, dtype=torch.float64)
    # Squares separate vertical neighbours too, whatever the row length.
    hue = number**2 * GOLDEN % 1
    # At full saturation and value each channel is a trapezium over the hue.
    sixths = (
        hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0], dtype=torch.float64, device=device)
    ) % 6
    return (255 * ((sixths - 3).abs() - 1).clamp(0, 1)).float()
