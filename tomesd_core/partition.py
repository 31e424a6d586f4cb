"""Partitions: destinations (dst), sources (src) and their windows (paper, section 4.1)."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

DRAWING_DEVICES = {"cpu", "cuda", "meta"}
"""Devices that multiply int64; for others the draw is made on the CPU and copied."""

DRAWS_AHEAD = 16
"""Steps drawn at once if each step has its own draw, for the launches of a single one."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A partition's indices for a batch, with the tokens or windows of all items in one row."""

    tokens: Tensor
    """[items·W, S + D]: the src and then the dst of each window, as indices of tokens."""
    dst: Tensor
    """[items·W, D], int32: the dst of each window, as indices into the partition's `dst`."""
    inverse: Tensor
    """[items, N]: the place of each token among the dst, then the windows' src."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """The tokens of a grid, split into src and dst. Index tensors are int64, on the tokens' device.

    P is 1 if all batch items share one draw, else the number of items. The windows are padded to
    one size by repeating an index, and shared by all items.
    """

    src: Tensor
    """[P, n_src]: the tokens that can be merged into a dst."""
    dst: Tensor
    """[P, n_dst]: the tokens that they can be merged into."""
    window_src: Tensor
    """[W, S]: the src of each window, as indices into `src`."""
    window_dst: Tensor
    """[W, D]: the dst of each window, as indices into `dst`."""
    src_place: Tensor
    """[n_src]: the place of each src in `window_src`, flattened."""

    _rows: dict[int, Rows] = dataclasses.field(default_factory=dict, init=False, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return self.src.shape[1] + self.dst.shape[1]

    @property
    def most_removed(self) -> int:
        """How many src can be merged in every batch item."""
        return self.src.shape[1] if self.dst.shape[1] else 0

    @torch.inference_mode(False)
    def rows(self, items: int) -> Rows:
        """The indices for a batch of `items`, cached per batch size."""
        if items not in self._rows:
            device, dst_count = self.src.device, self.dst.shape[1]
            first = torch.arange(items, device=device)[:, None, None] * self.tokens
            tokens = torch.cat([self.src[:, self.window_src], self.dst[:, self.window_dst]], dim=2)
            places = torch.cat([torch.arange(dst_count, device=device), dst_count + self.src_place])
            order = torch.cat([self.dst, self.src], dim=1)
            inverse = torch.empty_like(order).scatter_(1, order, places.expand(len(order), -1))
            self._rows[items] = Rows(
                (tokens + first).flatten(0, 1),
                self.window_dst.int().repeat(items, 1),
                inverse.expand(items, -1),
            )
        return self._rows[items]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def make_partition(
    grid: tuple[int, int],
    stride: tuple[int, int] = (2, 2),
    partition: str = "random",
    step: int = 0,
    window: int | None = None,
    items: int = 1,
    device: torch.device | str = "cpu",
) -> Partition:
    """Split a grid of (rows, columns) tokens into src and dst.

    `partition`: `random` draws one dst in each whole cell of `stride` (rows, columns); `corner`
    takes the first token of the cell; `uniform` draws as many dst anywhere; `alternating` takes
    every other token of a row. Tokens outside whole cells are src. `window` is the side, in tokens,
    of the windows in which a dst is searched, rounded down to whole cells and spread evenly over
    the grid; None, and any with `uniform`, is the whole grid. With `items` above 1 each batch item
    has its own draw (the paper's ablation of a shared draw).

    The draw is a pure function of grid, stride, step and item: it reads no random state and is the
    same on every device. A new grid costs one copy to the device, and a new draw none.
    """
    device = torch.device(device)
    if partition == "alternating":
        stride = (1, 2)
    if partition == "uniform":
        return _uniform_partition(grid, stride, step, items, device)
    layout, rest, *windows = _layout(grid, stride, window, device)
    cells, in_cell = layout.shape
    if partition == "random":
        # Step 0 is the only draw of a sampling that doesn't redraw.
        steps = range(step, step + 1)
        if step > 0:
            first = (step - 1) // DRAWS_AHEAD * DRAWS_AHEAD + 1
            steps = range(first, first + DRAWS_AHEAD)
        draw = _draws(cells, steps, items, device)[:, steps.index(step)] % in_cell
    else:
        draw = torch.zeros(1, cells, dtype=torch.long, device=device)
    order = (draw[..., None] + torch.arange(in_cell, device=device)) % in_cell
    tokens = layout.expand(draw.shape[0], -1, -1).gather(-1, order)
    src = torch.cat([tokens[..., 1:].flatten(1), rest.expand(draw.shape[0], -1)], dim=1)
    return Partition(src, tokens[..., 0], *windows)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _layout(
    grid: tuple[int, int], stride: tuple[int, int], window: int | None, device: torch.device
) -> list[Tensor]:
    """The step-independent part of a partition.

    [n_cells, rows·columns]: the tokens of each whole cell; [n_rest]: those outside; and the
    windows, for src in the order of the cells without dst, then of the rest.
    """
    (rows, columns), (cell_rows, cell_columns) = grid, stride
    down, across = rows // cell_rows, columns // cell_columns
    high, wide = down * cell_rows, across * cell_columns
    token = torch.arange(rows * columns, device="cpu").view(rows, columns)
    cells = token[:high, :wide].reshape(down, cell_rows, across, cell_columns)
    cells = cells.transpose(1, 2).reshape(-1, cell_rows * cell_columns)
    rest = torch.cat([token[:high, wide:].flatten(), token[high:].flatten()])
    window_of = _window_of(grid, stride, window)
    count = int(window_of.max()) + 1
    src, src_place = _grouped(window_of[torch.cat([cells[:, 1:].flatten(), rest])], count)
    dst, _ = _grouped(window_of[cells[:, 0]], count)
    return _copied([cells, rest, src, dst, src_place], device)


def _uniform_partition(
    grid: tuple[int, int], stride: tuple[int, int], step: int, items: int, device: torch.device
) -> Partition:
    count = math.prod(side // cell for side, cell in zip(grid, stride, strict=True))
    order = _draws(math.prod(grid), range(step, step + 1), items, device)[:, 0].argsort(
        dim=1, stable=True
    )
    src, dst = order[:, count:].sort().values, order[:, :count].sort().values
    numbers = torch.arange(math.prod(grid), device=device)
    places = numbers[: src.shape[1]]
    return Partition(src, dst, places[None], numbers[None, :count], places)


def _window_of(grid: tuple[int, int], stride: tuple[int, int], window: int | None) -> Tensor:
    """[rows·columns]: the window of each token. Tokens outside whole cells join the nearest one."""
    along = []
    for side, cell in zip(grid, stride, strict=True):
        cells = side // cell
        count = 1 if window is None or cells == 0 else math.ceil(cells / max(1, window // cell))
        cell_of = (torch.arange(side, device="cpu") // cell).clamp(max=max(cells - 1, 0))
        # Window i begins at cell i * cells // count, so sizes differ by at most one cell.
        along.append(((cell_of + 1) * count - 1) // max(cells, 1))
    return (along[0][:, None] * (int(along[1].max()) + 1) + along[1]).flatten()


def _grouped(window_of: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The members of each window, and the place of each token among them.

    [count, size]: indices into `window_of` ([n]), padded with the first of each window; [n]: the
    place of each index in these rows, flattened.
    """
    order = window_of.argsort(stable=True)
    sizes = window_of.bincount(minlength=count)
    ends = sizes.cumsum(0)
    starts, size = ends - sizes, int(sizes.max())
    column = torch.arange(size, device="cpu").expand(count, -1)
    groups = order[starts[:, None] + torch.where(column < sizes[:, None], column, 0)]
    places = torch.empty_like(order)
    ordered = window_of[order]
    places[order] = torch.arange(len(order), device="cpu") - starts[ordered] + ordered * size
    return groups, places


def _copied(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on `device`, in one copy."""
    if device.type == "cpu":
        return tensors
    joined = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _draws(count: int, steps: range, items: int, device: torch.device) -> Tensor:
    """[items, steps, count]: a well mixed 32-bit number for each of `count` cells, in int64.

    Products stay below 2^63, so that every device computes the same integers.
    """
    where = device if device.type in DRAWING_DEVICES else torch.device("cpu")
    value = torch.arange(count, device=where)
    every_item = torch.arange(1, items + 1, device=where)[:, None, None]
    every_step = torch.arange(steps.start + 1, steps.stop + 1, device=where)[:, None]
    for salts in (every_item, every_step):
        # Tensors, since torch 2.1 dispatches an xor with a Python number wrongly while operations
        # are recorded.
        value = value ^ (salts * 0x27220A95 & 0xFFFFFFFF)
        for _ in range(2):
            value = ((value >> 16) ^ value) * 0x45D9F3B & 0xFFFFFFFF
        value = (value >> 16) ^ value
    return value.to(device)
