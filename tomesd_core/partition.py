"""Which tokens are destinations (dst), and in which windows the sources (src) look for theirs
(paper, section 4.1)."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

DRAWING_DEVICES = {"cpu", "cuda", "meta"}
"""Where int64 can be multiplied: elsewhere the draw is made on the CPU, and copied."""

DRAWS_AHEAD = 16
"""How many steps are drawn at once where each has its own draw: it takes no more launches than one.
"""


@dataclasses.dataclass(frozen=True)
class Windows:
    """In which window each src and dst lies, all windows padded to one size. All batch items share
    them.

    Numbers are places in a `Partition`'s `src` and `dst`. A padded place repeats a number of its
    window.
    """

    src: Tensor
    """[W, S]: the src of each window."""
    dst: Tensor
    """[W, D]: the dst of each window."""
    src_place: Tensor
    """[n_src]: where each src lies in `src`, all windows laid in one row."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where things lie when all tokens, or all windows, of so many items lie in one row."""

    tokens: Tensor
    """[items·W, S + D]: each window's src, then its dst, among the tokens."""
    dst: Tensor
    """[items·W, D], int32: the number of each window's dst in its partition."""
    inverse: Tensor
    """[items, N]: each token's place behind the n_dst destinations: among them, or in a window's
    row of src."""
    dst_slots: Tensor
    """[items, n_dst], int32: 0, 1, 2, …"""


@dataclasses.dataclass(frozen=True)
class Partition:
    """The tokens of a grid, split into src and dst. Index tensors are int64, on the device of the
    tokens.

    P is 1 where all batch items share one draw, else the number of items.
    """

    src: Tensor
    """[P, n_src]: the tokens that may fall into a dst."""
    dst: Tensor
    """[P, n_dst]: the tokens that they may fall into."""
    windows: Windows

    _rows: dict[int, Rows] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """The number of tokens in the grid."""
        return self.src.shape[1] + self.dst.shape[1]

    @property
    def most_removed(self) -> int:
        """How many src can merge, in every batch item."""
        return self.src.shape[1] if self.dst.shape[1] else 0

    def rows(self, items: int) -> Rows:
        """The partition's indices for a batch of `items`; each batch size has its own, which is
        kept."""
        if items not in self._rows:
            self._rows[items] = self._make_rows(items)
        return self._rows[items]

    @torch.inference_mode(False)
    def _make_rows(self, items: int) -> Rows:
        device, windows, dst_count = self.src.device, self.windows, self.dst.shape[1]
        first = torch.arange(items, device=device)[:, None, None] * self.tokens
        tokens = torch.cat([self.src[:, windows.src], self.dst[:, windows.dst]], dim=2) + first
        place = torch.arange(dst_count, device=device)
        places = torch.cat([place, dst_count + windows.src_place]).expand(len(self.src), -1)
        order = torch.cat([self.dst, self.src], dim=1)
        inverse = torch.empty_like(order).scatter_(1, order, places)
        return Rows(
            tokens.flatten(0, 1),
            windows.dst.int().repeat(items, 1),
            inverse.expand(items, -1),
            place.int().expand(items, -1),
        )


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
    """Splits a grid of (rows, columns) tokens into src and dst.

    `partition`: `random` draws one dst in each whole cell of `stride` (rows, columns); `corner`
    takes the cell's first token; `uniform` draws as many dst anywhere; `alternating` takes every
    other token along the row. Tokens outside a whole cell are src. `window` is the side, in tokens,
    of the windows inside which a dst is looked for, rounded down to whole cells and spread evenly
    over the grid; None, and with `uniform` any, is the whole grid. With `items` above 1 each batch
    item has a draw of its own (the paper's ablation of a draw that is not shared).

    The draw is a pure function of grid, stride, step and item. It reads no random state, and is the
    same on every device. A new grid costs one copy to the device; a new draw costs none.
    """
    device = torch.device(device)
    if partition == "alternating":
        stride = (1, 2)
    if partition == "uniform":
        return _uniform_partition(grid, stride, step, items, device)
    layout, rest, windows = _layout(grid, stride, window, device)
    cells, in_cell = layout.shape
    if partition == "random":
        # A matching that is never drawn anew has the draw of step 0.
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
    return Partition(src, tokens[..., 0], windows)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _layout(
    grid: tuple[int, int], stride: tuple[int, int], window: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Windows]:
    """The step-independent part of a partition.

    [n_cells, rows·columns]: the tokens of each whole cell; [n_rest]: those outside one; and the
    windows, for src in the order of the cells, dst left out, then of the rest.
    """
    (rows, columns), (cell_rows, cell_columns) = grid, stride
    down, across = rows // cell_rows, columns // cell_columns
    token = torch.arange(rows * columns, device="cpu").view(rows, columns)
    whole = token[: down * cell_rows, : across * cell_columns]
    cells = (
        whole.reshape(down, cell_rows, across, cell_columns)
        .transpose(1, 2)
        .reshape(-1, cell_rows * cell_columns)
    )
    rest = torch.cat(
        [
            token[: down * cell_rows, across * cell_columns :].flatten(),
            token[down * cell_rows :].flatten(),
        ]
    )
    window_of = _window_of(grid, stride, window)
    count = int(window_of.max()) + 1
    src, src_place = _grouped(window_of[torch.cat([cells[:, 1:].flatten(), rest])], count)
    dst, _ = _grouped(window_of[cells[:, 0]], count)
    cells, rest, *windows = _copied([cells, rest, src, dst, src_place], device)
    return cells, rest, Windows(*windows)


def _uniform_partition(
    grid: tuple[int, int], stride: tuple[int, int], step: int, items: int, device: torch.device
) -> Partition:
    count = math.prod(side // cell for side, cell in zip(grid, stride, strict=True))
    order = _draws(math.prod(grid), range(step, step + 1), items, device)[:, 0].argsort(
        dim=1, stable=True
    )
    src, dst = order[:, count:].sort().values, order[:, :count].sort().values
    numbers = torch.arange(math.prod(grid), device=device)
    windows = Windows(numbers[None, : src.shape[1]], numbers[None, :count], numbers[: src.shape[1]])
    return Partition(src, dst, windows)


def _window_of(grid: tuple[int, int], stride: tuple[int, int], window: int | None) -> Tensor:
    """[rows·columns]: the number of each token's window. Tokens outside a whole cell belong to the
    nearest one."""
    along = []
    for side, cell in zip(grid, stride, strict=True):
        cells = side // cell
        count = 1 if window is None or cells == 0 else math.ceil(cells / max(1, window // cell))
        cell_of = (torch.arange(side, device="cpu") // cell).clamp(max=max(cells - 1, 0))
        # Window i holds the cells from i * cells // count on: all windows are equal, or differ by
        # one cell.
        along.append(((cell_of + 1) * count - 1) // max(cells, 1))
    return (along[0][:, None] * (int(along[1].max()) + 1) + along[1]).flatten()


def _grouped(window_of: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[count, size]: what lies in each window, by its place in `window_of` ([n]), the first of it
    repeated at the end; and [n]: where in these rows, laid in one, each place stands first."""
    order = window_of.argsort(stable=True)
    sizes = window_of.bincount(minlength=count)
    ends = sizes.cumsum(0)
    starts, size = ends - sizes, int(sizes.max())
    column = torch.arange(size, device="cpu").expand(count, -1)
    groups = (
        order[starts[:, None] + torch.where(column < sizes[:, None], column, 0)]
        if len(order)
        else column
    )
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
    """[items, steps, count]: a well mixed 32-bit number for each of `count` places, in int64.

    Products stay below 2^63, so that the same integers come out everywhere.
    """
    where = device if device.type in DRAWING_DEVICES else torch.device("cpu")
    value = torch.arange(count, device=where)
    every_item = torch.arange(1, items + 1, device=where)[:, None, None]
    every_step = torch.arange(steps.start + 1, steps.stop + 1, device=where)[:, None]
    for salts in (every_item, every_step):
        # Tensors, since torch 2.1 dispatches an xor with a number wrongly where operations are
        # recorded.
        value = value ^ (salts * 0x27220A95 & 0xFFFFFFFF)
        for _ in range(2):
            value = ((value >> 16) ^ value) * 0x45D9F3B & 0xFFFFFFFF
        value = (value >> 16) ^ value
    return value.to(device)
