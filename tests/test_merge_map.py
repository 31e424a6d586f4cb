"""The merge map: which maps a recorder keeps, and how they are drawn."""

from __future__ import annotations

import colorsys

import pytest
import torch

from tomesd_core.matching import match_tokens
from tomesd_core.merge_map import MapRecorder, draw
from tomesd_core.token_map import TokenMap

GRID = (2, 3)


def slots_of(number, items=1, tokens=6):
    """Slots that identify a call: token `number` is merged with the next one."""
    slots = torch.arange(tokens)
    slots[number] = slots[number + 1]
    return slots.repeat(items, 1)


def record(recorder, step, layer, number, items=1, grid=GRID):
    recorder(layer, step, grid, TokenMap(slots_of(number, items), 6))


def the_map(recorder, row=0):
    (one,) = recorder.maps([row])
    return one.step, one.layer, one.layer_name, int((one.slots != torch.arange(6)).nonzero())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((1, 1), (3, 1, "a", 0)),
        ((3, 2), (3, 2, "b", 1)),
        ((4, 1), (4, 1, "b", 2)),
        ((4, 2), (4, 2, "a", 3)),
        ((4, 9), (4, 2, "a", 3)),
        ((5, 1), (4, 1, "b", 2)),
        ((6, 2), (6, 1, "b", 4)),
        ((150, 1), (6, 1, "b", 4)),
    ],
)
def test_the_wanted_step_and_layer_or_the_nearest(wanted, expected):
    recorder = MapRecorder(*wanted)
    for number, (step, layer) in enumerate([(2, "a"), (2, "b"), (3, "b"), (3, "a"), (5, "b")]):
        record(recorder, step, layer, number)
    assert the_map(recorder) == expected


def test_a_run_that_never_merged_has_no_map():
    assert MapRecorder(1, 1).maps([0, 1]) == []


def test_rows_are_counted_over_the_calls_of_a_step():
    recorder = MapRecorder(2, 2)
    for step in (0, 1, 2):
        for half in (0, 1):
            record(recorder, step, "a", number=4, items=2)
            record(recorder, step, "b", number=2 * step + half if step == 1 else 0, items=2)
    assert [the_map(recorder, row) for row in range(5)] == [
        (2, 2, "b", number) for number in (2, 2, 3, 3, 3)
    ]


def test_a_layer_that_sees_another_grid_in_the_same_step_keeps_its_first():
    recorder = MapRecorder(1, 1)
    record(recorder, 0, "a", 1)
    recorder("a", 0, (1, 4), TokenMap(torch.zeros(1, 4, dtype=torch.long), 1))
    (one,) = recorder.maps([1])
    assert (one.grid, len(one.slots)) == (GRID, 6)


def test_a_maps_text_has_its_place():
    recorder = MapRecorder(1, 1)
    record(recorder, 0, "blocks.0", 1)
    text = str(recorder.maps([0])[0])
    assert all(part in text for part in ("step 1", "layer 1", "blocks.0", "3x2"))


def test_on_map_is_called_for_merged_calls_only(make_unet, make_inputs, small_settings, watch):
    import tomesd_core as tome

    unet, calls = make_unet(), []

    def on_map(layer_name, step, grid, token_map):
        calls.append((layer_name, step, grid, token_map.slots.shape, token_map.merged_tokens))

    settings = small_settings(ratio=0.6, late_ratio=0.0, schedule="step", switch_at=0.5)
    with (
        tome.attach(unet, settings, on_map=on_map) as merging,
        watch(unet) as inputs_of,
        torch.no_grad(),
    ):
        for step in range(3):
            merging.set_step(step, 3)
            unet(*make_inputs((16, 12)))
        names = [layer.name for layer in merging.report().merged_layers]
    assert len(names) == 3
    assert calls == [(name, 0, (16, 12), (2, 192), inputs_of[name][0].shape[1]) for name in names]


def plain(height, width, value=200):
    return torch.full((height, width, 3), value, dtype=torch.uint8)


def slots_by_matching(grid, ratio=0.5, seed=0):
    x = torch.randn(1, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(seed))
    return match_tokens(x, grid, ratio, stride=None).slots[0]


def middle(image, grid, row, column):
    """Colour in the middle of a token."""
    (rows, columns), (height, width, _) = grid, image.shape
    return tuple(
        image[
            (2 * row + 1) * height // (2 * rows), (2 * column + 1) * width // (2 * columns)
        ].tolist()
    )


def test_one_colour_per_slot_and_none_for_single_tokens():
    #   0 1 1      two adjacent tokens of slot 1, two separate ones of slot 2
    #   2 3 2
    slots = torch.tensor([0, 1, 1, 2, 3, 2])
    image = draw(slots, GRID, plain(16, 24))
    assert image.dtype == torch.uint8 and image.shape == (16, 24, 3)
    colours = {
        place: middle(image, GRID, *place) for place in [(r, c) for r in range(2) for c in range(3)]
    }
    assert colours[0, 0] == colours[1, 1] == (200, 200, 200)
    assert colours[0, 1] == colours[0, 2]
    assert colours[1, 0] == colours[1, 2]
    assert len(set(colours.values())) == 3
    assert torch.equal(image[:8, :8], plain(8, 8)) and torch.equal(image[8:, 8:16], plain(8, 8))


def test_nothing_merged_and_all_merged():
    picture = torch.randint(
        0, 256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(draw(torch.arange(6), GRID, picture), picture)
    image = draw(torch.zeros(6, dtype=torch.long), GRID, picture)
    assert (image != picture).any(dim=2).all()


def test_the_picture_shows_through():
    slots = torch.zeros(6, dtype=torch.long)
    dark, light = (
        middle(draw(slots, GRID, plain(16, 24, value)), GRID, 0, 0) for value in (20, 220)
    )
    assert all(one < other for one, other in zip(dark, light, strict=True))


def test_lines_separate_slots_where_there_is_room():
    slots = torch.tensor([0, 0, 1, 0, 0, 1])
    image = draw(slots, GRID, plain(16, 24)).sum(dim=2)
    assert (image[:, 16] < image[:, 17]).all(), "a dark line where the other slot begins"
    assert (image[:, 8] == image[:, 9]).all() and (image[8] == image[9]).all(), "none within a slot"
    above = draw(torch.tensor([0, 0, 0, 1, 1, 1]), GRID, plain(16, 24)).sum(dim=2)
    assert (above[8] < above[9]).all()
    small = draw(slots, GRID, plain(4, 6))
    assert len({tuple(pixel) for pixel in small.flatten(0, 1).tolist()}) == 2, "too small for lines"


@pytest.mark.parametrize(
    ("grid", "size"), [((5, 7), (41, 58)), ((7, 3), (20, 64)), ((8, 8), (8, 8)), ((6, 6), (4, 5))]
)
def test_every_pixel_has_the_colour_of_the_token_that_it_lies_in(grid, size):
    slots = slots_by_matching(grid)
    image, counts = draw(slots, grid, plain(*size)), slots.bincount()
    for y in range(size[0]):
        for x in range(size[1]):
            slot = slots[y * grid[0] // size[0] * grid[1] + x * grid[1] // size[1]]
            is_plain = tuple(image[y, x].tolist()) == (200, 200, 200)
            assert is_plain == (counts[slot] == 1), (y, x)


@pytest.mark.parametrize("grid", [(32, 32), (16, 68), (68, 8)])
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
def test_adjacent_slots_rarely_have_similar_hues(grid, ratio):
    rows, columns = grid
    slots = slots_by_matching(grid, ratio)
    image, counts = draw(slots, grid, plain(*grid, 128)), slots.bincount()
    hue = [
        [colorsys.rgb_to_hsv(*(c / 255 for c in pixel))[0] for pixel in row]
        for row in image.tolist()
    ]
    laid = slots.view(grid).tolist()
    alike, pairs = 0, 0
    for r in range(rows - 1):
        for c in range(columns - 1):
            for dr, dc in ((0, 1), (1, 0)):
                one, other = laid[r][c], laid[r + dr][c + dc]
                if one != other and min(counts[one], counts[other]) > 1:
                    apart = abs(hue[r][c] - hue[r + dr][c + dc])
                    alike, pairs = alike + (min(apart, 1 - apart) < 1 / 24), pairs + 1
    assert pairs > 100 and alike / pairs < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_torchs_default_dtype_and_device_change_nothing(dtype):
    slots, picture = slots_by_matching((8, 8)), plain(64, 80)
    usual, before = draw(slots, (8, 8), picture), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert torch.equal(draw(slots, (8, 8), picture), usual)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("slots", "picture", "words"),
    [
        (torch.arange(5), plain(4, 6), r"slots must be \[6\] for a 2x3 grid, got \[5\]"),
        (torch.arange(6).view(1, 6), plain(4, 6), r"slots must be \[6\]"),
        (torch.arange(6), plain(4, 6).float(), "picture must be uint8"),
        (
            torch.arange(6),
            plain(4, 6)[..., 0],
            r"picture must be uint8 \[H, W, 3\], got torch.uint8 \[4, 6\]",
        ),
    ],
)
def test_other_shapes_are_refused(slots, picture, words):
    with pytest.raises(ValueError, match=words):
        draw(slots, GRID, picture)
