import contextlib
import importlib.util

import pytest
import torch

from tomesd_core.matching import match_tokens
from tomesd_core.partition import make_partition
from tomesd_core.settings import PARTITIONS

GRIDS = [(8, 8), (65, 33), (7, 9), (1, 5), (2, 1), (6, 40)]
STRIDES = [(2, 2), (3, 2), (1, 4), (1, 1)]


def cells_of(grid, stride):
    """Tokens of each whole cell, in row order."""
    (rows, columns), (down, across) = grid, stride
    return [
        [(top + y) * columns + left + x for y in range(down) for x in range(across)]
        for top in range(0, rows - down + 1, down)
        for left in range(0, columns - across + 1, across)
    ]


def dst_of(*args, **options):
    return make_partition(*args, **options).dst


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_is_src_or_dst(grid, stride, window, partition):
    split = make_partition(grid, stride, partition, step=5, window=window, items=2)
    assert split.tokens == grid[0] * grid[1]
    for src, dst in zip(split.src, split.dst, strict=True):
        assert sorted(src.tolist() + dst.tolist()) == list(range(split.tokens))


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("grid", GRIDS)
def test_random_has_exactly_one_dst_in_each_cell(grid, stride):
    cells = cells_of(grid, stride)
    for step in range(3):
        (dst,) = dst_of(grid, stride, "random", step).tolist()
        assert all(token in cell for token, cell in zip(dst, cells, strict=True))


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("grid", GRIDS)
def test_corner_takes_each_cells_first_token_in_every_step(grid, stride):
    corners = [cell[0] for cell in cells_of(grid, stride)]
    assert dst_of(grid, stride, "corner").tolist() == [corners]
    assert dst_of(grid, stride, "corner", step=9).tolist() == [corners]


@pytest.mark.parametrize("grid", GRIDS)
def test_alternating_takes_every_other_token_along_the_row_whatever_the_stride(grid):
    rows, columns = grid
    expected = [
        row * columns + column for row in range(rows) for column in range(0, columns - 1, 2)
    ]
    for stride in STRIDES:
        assert dst_of(grid, stride, "alternating").tolist() == [expected]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("grid", GRIDS)
def test_uniform_takes_as_many_dst_as_there_are_cells(grid, stride):
    assert dst_of(grid, stride, "uniform").shape == (1, len(cells_of(grid, stride)))


def test_uniform_leaves_some_cells_without_a_dst():
    dst = set(dst_of((16, 16), (2, 2), "uniform")[0].tolist())
    counts = {len(dst & set(cell)) for cell in cells_of((16, 16), (2, 2))}
    assert {0, 1, 2} <= counts


@pytest.mark.parametrize(
    ("partition", "step", "dst"),
    [
        ("random", 0, [0, 2, 4, 19, 9, 10, 37, 26, 40, 30, 45, 46]),
        ("random", 7, [1, 14, 17, 7, 20, 23, 25, 39, 41, 42, 45, 34]),
        ("uniform", 7, [0, 4, 7, 9, 16, 19, 20, 23, 26, 35, 37, 44]),
    ],
)
def test_the_draw_is_the_same_on_every_machine(partition, step, dst):
    """Other numbers would change the picture of every seed."""
    assert dst_of((4, 12), (2, 2), partition, step=step).tolist() == [dst]


@pytest.mark.parametrize("partition", ["random", "uniform"])
def test_every_step_has_another_draw(partition):
    draws = {tuple(dst_of((16, 16), (2, 2), partition, step)[0].tolist()) for step in range(50)}
    assert len(draws) == 50


@pytest.mark.parametrize("stride", [(2, 2), (3, 2), (1, 4)])
def test_the_draw_is_uniform_over_a_cell(stride):
    cells = torch.tensor(cells_of((48, 48), stride))
    draws = torch.cat([dst_of((48, 48), stride, "random", step) for step in range(30)])
    counts = (draws[..., None] == cells).sum((0, 1)) / draws.numel() * cells.shape[1]
    torch.testing.assert_close(counts, torch.ones(cells.shape[1]), rtol=0, atol=0.05)


def test_draws_of_neighbouring_steps_items_and_cells_are_independent():
    """Independent draws of one in 4 tokens agree in a quarter of the cells."""
    corner = dst_of((64, 64), (2, 2), "corner")
    place = torch.stack(
        [dst_of((64, 64), (2, 2), "random", step, items=2) - corner for step in range(20)]
    )
    for axis, tolerance in enumerate((0.01, 0.015, 0.01)):
        agree = (place.diff(dim=axis) == 0).double().mean().item()
        assert agree == pytest.approx(0.25, abs=tolerance)


@pytest.mark.parametrize("partition", ["random", "uniform"])
def test_a_separate_draw_depends_on_the_item_and_not_on_their_number(partition):
    three = dst_of((8, 8), (2, 2), partition, step=4, items=3)
    assert len({tuple(dst.tolist()) for dst in three}) == 3
    assert torch.equal(dst_of((8, 8), (2, 2), partition, step=4, items=2), three[:2])
    assert torch.equal(dst_of((8, 8), (2, 2), partition, step=4), three[:1])


@pytest.mark.parametrize("window", [2, 4, 5, 8])
def test_a_window_is_a_rectangle_of_whole_cells_within_its_size(window):
    split = make_partition((12, 20), (2, 2), "corner", window=window)
    tokens_of = [
        set(split.src[0, src].tolist()) | set(split.dst[0, dst].tolist())
        for src, dst in zip(split.window_src, split.window_dst, strict=True)
    ]
    assert sorted(token for tokens in tokens_of for token in tokens) == list(range(12 * 20))
    for tokens in tokens_of:
        rows, columns = {token // 20 for token in tokens}, {token % 20 for token in tokens}
        assert len(tokens) == len(rows) * len(columns)
        assert len(rows) == max(rows) - min(rows) + 1 <= window
        assert len(columns) == max(columns) - min(columns) + 1 <= window


@contextlib.contextmanager
def other_defaults(dtype):
    """Another default dtype and device of torch while open."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_torchs_defaults_change_no_partition_and_no_matching(dtype, partition, window):
    x, grid, options = torch.randn(2, 15 * 31, 8), (15, 31), {"step": 3, "window": window}

    def computed(make_partition):
        split = make_partition(grid, (2, 2), partition, items=2, **options)
        token_map = match_tokens(x, grid, 0.5, partition=partition, **options)
        windows = split.window_src, split.window_dst, split.src_place
        return [split.src, split.dst, *windows, token_map.slots, token_map.merge(x)]

    # Partitions are cached, so that the defaults at their first use count: a new copy has none.
    spec = importlib.util.find_spec("tomesd_core.partition")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with other_defaults(dtype):
        others = computed(fresh.make_partition)
    assert all(map(torch.equal, others, computed(make_partition)))
