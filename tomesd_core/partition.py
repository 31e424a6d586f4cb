"""Which tokens are destinations (dst), and in which windows the sources (src) look for theirs (paper, section 4.1)."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Windows:
    """In which window each src and dst lies, all windows padded to one size.

    Numbers are places in a `Partition`'s `src` and `dst`. A padded place repeats a number of its window. P is 1 where
    all batch items share the windows, else the number of items.
    """

    src: Tensor
    """[P, W, S]: the src of each window."""
    dst: Tensor
    """[P, W, D]: the dst of each window; in a window that has none, dst 0."""
    src_place: Tensor
    """[P, n_src]: where each src lies in `src`, its last two dimensions laid in one row."""
    stranded: Tensor | None = None
    """[P, n_src]: true for a src in a window without a dst, which can't merge; None: there is no such src."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """The tokens of a grid, split into src and dst. Index tensors are int64, on the device of the tokens."""

    src: Tensor
    """[P, n_src]: the tokens that may fall into a dst."""
    dst: Tensor
    """[P, n_dst]: the tokens that they may fall into."""
    windows: Windows
    most_removed: int
    """How many src can merge, in every batch item."""

    _rows: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """The number of tokens in the grid."""
        return self.src.shape[1] + self.dst.shape[1]

    def rows(self, items: int) -> tuple[Tensor, Tensor]:
        """[items·W, S] and [items·W, D]: where the windows' src and dst lie when all items' tokens lie in one row."""
        if items not in self._rows:
            first = torch.arange(items, device=self.src.device)[:, None, None] * self.tokens

            def rows_of(part: Tensor, numbers: Tensor) -> Tensor:
                numbers = numbers.expand(max(part.shape[0], numbers.shape[0]), -1, -1)
                tokens = part.expand(numbers.shape[0], -1).gather(1, numbers.flatten(1)).view(numbers.shape)
                return (tokens + first).flatten(0, 1)

            self._rows[items] = rows_of(self.src, self.windows.src), rows_of(self.dst, self.windows.dst)
        return self._rows[items]


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
    to whole cells and spread evenly over the grid; None is the whole grid. With `items` above 1 each batch item has a
    draw of its own (the paper's ablation of a draw that is not shared).

    The draw is a pure function of grid, stride, step and item. It reads no random state and is made on the CPU, so that
    it is the same on every device.
    """
    if partition == "alternating":
        stride = (1, 2)
    if partition == "uniform":
        return _uniform_partition(grid, stride, step, window, items, torch.device(device))
    layout = _layout(grid, stride, window, torch.device(device))
    cells, in_cell = layout.cells.shape
    if partition == "random":
        draw = torch.stack([_hash(cells, step, item) for item in range(items)]) % in_cell
        # One byte a cell: all that travels to the device for a step, little enough not to wait for it.
        draw = draw.to(torch.uint8).to(device, non_blocking=True).long()
    else:
        draw = torch.zeros(1, cells, dtype=torch.long, device=device)
    order = (draw[..., None] + layout.turn) % in_cell
    tokens = layout.cells.expand(draw.shape[0], -1, -1).gather(-1, order)
    rest = layout.rest.expand(draw.shape[0], -1)
    src = torch.cat([tokens[..., 1:].flatten(1), rest], dim=1)
    return Partition(src, tokens[..., 0], layout.windows, most_removed=src.shape[1] if cells else 0)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What of a partition does not change from step to step."""

    cells: Tensor
    """[n_cells, rows·columns]: the tokens of each whole cell."""
    rest: Tensor
    """[n_rest]: the tokens outside a whole cell."""
    turn: Tensor
    """[rows·columns]: 0, 1, 2, …"""
    windows: Windows
    """For src in the order of the cells, dst left out, then `rest`."""


@functools.lru_cache(maxsize=64)
def _layout(grid: tuple[int, int], stride: tuple[int, int], window: int | None, device: torch.device) -> _Layout:
    (rows, columns), (cell_rows, cell_columns) = grid, stride
    down, across = rows // cell_rows, columns // cell_columns
    token = torch.arange(rows * columns, device="cpu").view(rows, columns)
    whole = token[: down * cell_rows, : across * cell_columns]
    cells = whole.reshape(down, cell_rows, across, cell_columns).transpose(1, 2).reshape(-1, cell_rows * cell_columns)
    rest = torch.cat(
        [token[: down * cell_rows, across * cell_columns :].flatten(), token[down * cell_rows :].flatten()]
    )
    window_of = _window_of(grid, stride, window)
    sources = cells[:, 1:]
    windows = _windows(window_of, [torch.cat([sources.flatten(), rest])], [cells[:, 0]])
    turn = torch.arange(cells.shape[1], device=device)
    return _Layout(cells.to(device), rest.to(device), turn, _to(windows, device))


def _uniform_partition(
    grid: tuple[int, int], stride: tuple[int, int], step: int, window: int | None, items: int, device: torch.device
) -> Partition:
    count = math.prod(side // cell for side, cell in zip(grid, stride, strict=True))
    shuffled = [_hash(math.prod(grid), step, item).argsort(stable=True) for item in range(items)]
    src = [order[count:].sort().values for order in shuffled]
    dst = [order[:count].sort().values for order in shuffled]
    windows = _windows(_window_of(grid, stride, window), src, dst)
    most = src[0].numel()
    if windows.stranded is not None:
        most -= int(windows.stranded.sum(dim=1).max())
    return Partition(torch.stack(src).to(device), torch.stack(dst).to(device), _to(windows, device), most)


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


def _windows(window_of: Tensor, src: list[Tensor], dst: list[Tensor]) -> Windows:
    """The windows of each item's src and dst tokens, on the CPU."""
    count = int(window_of.max()) + 1

    def groups(tokens: Tensor) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(count)]
        for number, window in enumerate(window_of[tokens].tolist()):
            found[window].append(number)
        return found

    def padded(items: list[list[list[int]]]) -> Tensor:
        size = max(len(group) for item in items for group in item)
        rows = [[group + group[:1] * (size - len(group)) or [0] * size for group in item] for item in items]
        return torch.tensor(rows, dtype=torch.long, device="cpu").view(len(items), count, size)

    src_groups, dst_groups = [groups(tokens) for tokens in src], [groups(tokens) for tokens in dst]
    src_padded = padded(src_groups)
    places = torch.empty(len(src), src[0].numel(), dtype=torch.long, device="cpu")
    stranded = torch.zeros(places.shape, dtype=torch.bool, device="cpu")
    for item, windows in enumerate(src_groups):
        for window, group in enumerate(windows):
            places[item, group] = torch.arange(len(group), device="cpu") + window * src_padded.shape[-1]
            stranded[item, group] = not dst_groups[item][window]
    return Windows(src_padded, padded(dst_groups), places, stranded if stranded.any() else None)


def _to(windows: Windows, device: torch.device) -> Windows:
    stranded = None if windows.stranded is None else windows.stranded.to(device)
    return Windows(windows.src.to(device), windows.dst.to(device), windows.src_place.to(device), stranded)


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
