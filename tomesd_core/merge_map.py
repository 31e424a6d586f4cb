"""The merge map: which tokens of one picture fell together in one layer at one step, drawn over the
picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .token_map import TokenMap

ALONE = -1
"""In place of the slot of a token that fell together with none."""

GOLDEN = 0.6180339887498949
"""Multiples of its squares are spread evenly over the circle of hues."""

COVER = 0.6
"""How much of a merged token's picture its colour covers."""

EDGE = 0.35
"""How bright the line around tokens that fell together is, of what lies under it."""

LEAST_SIDE = 4
"""A token's side in pixels from which there is room for lines."""


@dataclasses.dataclass(frozen=True)
class MergeMap:
    """One picture's tokens in one layer at one step."""

    slots: Tensor
    """[N], int64, on the CPU: the slot that each token fell into."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    step: int
    """From 1."""
    layer: int
    """Its number among the layers that merged in this step, from 1."""
    layer_name: str

    def __str__(self) -> str:
        rows, columns = self.grid
        return f"merge map of step {self.step}, layer {self.layer} ({self.layer_name}, {columns}x{rows} tokens)"


class MapRecorder:
    """Keeps what one layer merged in one step of a run: an `on_map` for `attach`.

    `step` counts from 1, and so does `layer`, among the layers that merged in that step, in the
    order in which they ran. Both give way to what there is: a step that didn't merge to the last
    one before it that did, or else to the first one after it; a layer beyond the last to the last.
    Nothing is copied or waited for while the model runs.
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
        """Keeps this call's slots, if it is the one that is wanted as far as can be known yet."""
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
        """The maps of batch items, one for each of `rows`; none where nothing was merged.

        A row is an item's number in the step, counted on over the calls where one step's batch
        comes in several; one beyond the last is the last.
        """
        if not self._rows:
            return []
        slots = torch.cat(self._rows).cpu()
        place = self._grid, self._step + 1, len(self._names), self._names[-1]
        return [MergeMap(slots[min(row, len(slots) - 1)], *place) for row in rows]


def draw(slots: Tensor, grid: tuple[int, int], picture: Tensor) -> Tensor:
    """`picture` with the tokens that fell together in one colour a slot; tokens alone stay plain.

    `slots` is [N] for a grid of (rows, columns) tokens, `picture` uint8 [H, W, 3] of any size on
    the same device, whose pixels belong to the tokens that they lie in. Lines part neighbouring
    slots where there is room; equal slots always get the same colours. Gives uint8 [H, W, 3].
    Raises `ValueError` where slots or picture have another shape.
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
    """[H, W], true for the pixels that belong to another slot than the one above or the one to the
    left."""
    is_edge = torch.zeros_like(of_pixel, dtype=torch.bool)
    is_edge[1:] |= of_pixel[1:] != of_pixel[:-1]
    is_edge[:, 1:] |= of_pixel[:, 1:] != of_pixel[:, :-1]
    return is_edge


def _colours(slots: int, device: torch.device) -> Tensor:
    """[slots, 3], float32, 0 to 255: a colour for each slot, mostly unlike its neighbours'."""
    number = torch.arange(slots, device=device, dtype=torch.float64)
    # Squares keep the slots below each other apart too, however many there are in a row.
    hue = number**2 * GOLDEN % 1
    # At full saturation and value each channel is a trapezium over the hue.
    sixths = (
        hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0], dtype=torch.float64, device=device)
    ) % 6
    return (255 * ((sixths - 3).abs() - 1).clamp(0, 1)).float()
