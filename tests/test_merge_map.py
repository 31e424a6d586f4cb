"""The merge map: which maps a recorder keeps, and how they are drawn."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

import tomesd_core as tome
from tomesd_core.matching import match_tokens
from tomesd_core.merge_map import MapRecorder, draw
from tomesd_core.token_map import TokenMap

GRID = (2, 3)


def record(recorder, step, layer, number, items=1):
    """Record a call whose slots identify it: token `number` is merged with the next one."""
    slots = torch.arange(6)
    slots[number] += 1
    recorder(layer, step, GRID, TokenMap(slots.repeat(items, 1), 6))


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
    assert recorder.maps([0, 1]) == [], "no map before the first merged call"
    for number, (step, layer) in enumerate([(2, "a"), (2, "b"), (3, "b"), (3, "a"), (5, "b")]):
        record(recorder, step, layer, number)
    assert the_map(recorder) == expected


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
    unet, calls = make_unet(), []

    def on_map(layer_name, step, grid, token_map):
        calls.append((layer_name, step, grid, token_map.slots.shape, token_map.merged_tokens))

    settings = small_settings(ratio=0.6, late_ratio=0.0, schedule="step", switch_at=0.5)
    with tome.attach(unet, settings, on_map=on_map) as merging, watch(unet) as inputs_of:
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


def test_one_colour_per_slot_and_none_for_single_tokens():
    #   0 1 1      two adjacent tokens of slot 1, two separate ones of slot 2
    #   2 3 2
    slots = torch.tensor([0, 1, 1, 2, 3, 2])
    image = draw(slots, GRID, plain(16, 24))
    assert image.dtype == torch.uint8 and image.shape == (16, 24, 3)
    colours = [tuple(colour) for colour in image[4::8, 4::8].flatten(0, 1).tolist()]
    assert colours[0] == colours[4] == (200, 200, 200)
    assert colours[1] == colours[2] and colours[3] == colours[5]
    assert len(set(colours)) == 3
    assert torch.equal(image[:8, :8], plain(8, 8)) and torch.equal(image[8:, 8:16], plain(8, 8))


def test_the_picture_shows_through():
    slots = torch.zeros(6, dtype=torch.long)
    dark, light = (draw(slots, GRID, plain(16, 24, value)) for value in (20, 220))
    assert (dark < light).all()


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
    slots = slots_by_matching(grid, ratio)
    pixels = draw(slots, grid, plain(*grid, 128)) / 255
    hue = torch.tensor([colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels.flatten(0, 1).tolist()])
    hue[slots.bincount()[slots] == 1] = math.nan  # Tokens of no colour.
    apart = torch.cat(
        [
            hue.view(grid).diff(dim=axis)[slots.view(grid).diff(dim=axis) != 0].abs()
            for axis in (0, 1)
        ]
    )
    apart = apart[apart.isfinite()]
    alike = torch.minimum(apart, 1 - apart) < 1 / 24
    assert len(alike) > 100 and alike.float().mean() < 0.15


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
        (torch.arange(6), plain(4, 6)[..., 0], r"\[H, W, 3\], got torch.uint8 \[4, 6\]"),
    ],
)
def test_other_shapes_are_refused(slots, picture, words):
    with pytest.raises(ValueError, match=words):
        draw(slots, GRID, picture)
