"""Which tokens are destinations (dst), and in which windows the sources (src) look for theirs (paper, section 4.1)."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Windows:
    """In which window each src and dst lies, all windows padded to one size. All batch items share them.

    Numbers are places in a `Partition`'s `src` and `dst`. A padded place repeats a number of its window.
    """

    src: Tensor
    """[W, S]: the src of each window."""
    dst: Tensor
    """[W, D]: the dst of each window."""
    src_place: Tensor
    """[n_src]: where each src lies in `src`, all windows laid in one row."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """The tokens of a grid, split into src and dst. Index tensors are int64, on the device of the tokens.

    P is 1 where all batch items share one draw, else the number of items.
    """

    src: Tensor
    """[P, n_src]: the tokens that may fall into a dst."""
    dst: Tensor
    """[P, n_dst]: the tokens that they may fall into."""
    windows: Windows

    _rows: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """The number of tokens in the grid."""
        return self.src.shape[1] + self.dst.shape[1]

    @property
    def most_removed(self) -> int:
        """How many src can merge, in every batch item."""
        return self.src.shape[1] if self.dst.shape[1] else 0

    def rows(self, items: int) -> tuple[Tensor, Tensor]:
        """[items·W, S] and [items·W, D]: where the windows' src and dst lie when all items' tokens lie in one row."""
        if items not in self._rows:
            first = torch.arange(items, device=self.src.device)[:, None, None] * self.tokens

            def rows_of(part: Tensor, numbers: Tensor) -> Tensor:
                return (part[:, numbers] + first).flatten(0, 1)

            self._rows[items] = rows_of(self.src, self.windows.src), rows_of(self.dst, self.windows.dst)
        return self._rows[items]


@functools.lru_cache(maxsize=8)
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

    `partition`: `random` draws one dst in each whole cell of `stride` (rows, columns); `corner` takes the cell's first
    token; `uniform` draws as many dst anywhere; `alternating` takes every other token along the row. Tokens outside a
    whole cell are src. `window` is the side, in tokens, of the windows inside which a dst is looked for, rounded down
    to whole cells and spread evenly over the grid; None, and with `uniform` any, is the whole grid. With `items` above
    1 each batch item has a draw of its own (the paper's ablation of a draw that is not shared).

    The draw is a pure function of grid, stride, step and item. It reads no random state and is made on the CPU, so that
    it is the same on every device.
    """
    if partition == "alternating":
        stride = (1, 2)
    if partition == "uniform":
        return _uniform_partition(grid, stride, step, items, torch.device(device))
    layout, rest, windows = _layout(grid, stride, window, torch.device(device))
    cells, in_cell = layout.shape
    if partition == "random":
        draw = torch.stack([_hash(cells, step, item) for item in range(items)]) % in_cell
        # One byte a cell: all that travels to the device for a step, little enough not to wait for it.
        draw = draw.to(torch.uint8).to(device, non_blocking=True).long()
    else:
        draw = torch.zeros(1, cells, dtype=torch.long, device=device)
    order = (draw[..., None] + torch.arange(in_cell, device=device)) % in_cell
    tokens = layout.expand(draw.shape[0], -1, -1).gather(-1, order)
    src = torch.cat([tokens[..., 1:].flatten(1), rest.expand(draw.shape[0], -1)], dim=1)
    return Partition(src, tokens[..., 0], windows)


@functools.lru_cache(maxsize=64)
def _layout(
    grid: tuple[int, int], stride: tuple[int, int], window: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Windows]:
    """What of a partition does not change from step to step.

    [n_cells, rows·columns]: the tokens of each whole cell; [n_rest]: those outside one; and the windows, for src in the
    order of the cells, dst left out, then of the rest.
    """
    (rows, columns), (cell_rows, cell_columns) = grid, stride
    down, across = rows // cell_rows, columns // cell_columns
    token = torch.arange(rows * columns, device="cpu").view(rows, columns)
    whole = token[: down * cell_rows, : across * cell_columns]
    cells = whole.reshape(down, cell_rows, across, cell_columns).transpose(1, 2).reshape(-1, cell_rows * cell_columns)
    rest = torch.cat(
        [token[: down * cell_rows, across * cell_columns :].flatten(), token[down * cell_rows :].flatten()]
    )
    windows = _windows(_window_of(grid, stride, window), torch.cat([cells[:, 1:].flatten(), rest]), cells[:, 0], device)
    return cells.to(device), rest.to(device), windows


def _uniform_partition(
    grid: tuple[int, int], stride: tuple[int, int], step: int, items: int, device: torch.device
) -> Partition:
    count = math.prod(side // cell for side, cell in zip(grid, stride, strict=True))
    order = torch.stack([_hash(math.prod(grid), step, item).argsort(stable=True) for item in range(items)])
    src, dst = order[:, count:].sort().values, order[:, :count].sort().values
    numbers = torch.arange(math.prod(grid), device=device)
    windows = Windows(numbers[None, : src.shape[1]], numbers[None, :count], numbers[: src.shape[1]])
    return Partition(src.to(device), dst.to(device), windows)


def _window_of(grid: tuple[int, int], stride: tuple[int, int], window: int | None) -> Tensor:
    """[rows·columns]: the number of each token's window. Tokens outside a whole cell belong to the nearest one."""
    along = []
    for side, cell in zip(grid, stride, strict=True):
        cells = side // cell
        count = 1 if window is None or cells == 0 else math.ceil(cells / max(1, window // cell))
        cell_of = (torch.arange(side, device="cpu") // cell).clamp(max=max(cells - 1, 0))
        # Window i holds the cells from i * cells // count on: all windows are equal, or differ by one cell.
        along.append(((cell_of + 1) * count - 1) // max(cells, 1))
    return (along[0][:, None] * (int(along[1].max()) + 1) + along[1]).flatten()


def _windows(window_of: Tensor, src: Tensor, dst: Tensor, device: torch.device) -> Windows:
    """The windows of the src and dst tokens ([n_src] and [n_dst], on the CPU), on `device`."""
    count = int(window_of.max()) + 1

    def grouped(tokens: Tensor) -> list[list[int]]:
        groups: list[list[int]] = [[] for _ in range(count)]
        for number, window in enumerate(window_of[tokens].tolist()):
            groups[window].append(number)
        return groups

    def padded(groups: list[list[int]]) -> Tensor:
        size = max(map(len, groups))
        numbers = [group + group[:1] * (size - len(group)) for group in groups]
        return torch.tensor(numbers, dtype=torch.long, device="cpu").view(count, size)

    src_groups = grouped(src)
    src_padded = padded(src_groups)
    places = torch.empty(len(src), dtype=torch.long, device="cpu")
    for window, group in enumerate(src_groups):
        places[group] = torch.arange(len(group), device="cpu") + window * src_padded.shape[1]
    return Windows(src_padded.to(device), padded(grouped(dst)).to(device), places.to(device))


def _hash(count: int, step: int, item: int) -> Tensor:
    """[count]: a well mixed 32-bit number for each of `count` places, in int64.

    Products stay below 2^63, so that the same integers come out everywhere.
    """
    value = torch.arange(count, device="cpu")
    for salt in (item, step):
        value = value ^ ((salt + 1) * 0x27220A95 & 0xFFFFFFFF)
        for _ in range(2):
            value = ((value >> 16) ^ value) * 0x45D9F3B & 0xFFFFFFFF
        value = (value >> 16) ^ value
    return value
