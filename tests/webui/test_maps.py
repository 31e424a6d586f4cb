"""The merge map as an extra picture: its picture, step and layer, and that nothing of it stays."""

from __future__ import annotations

import re
from collections import Counter
from copy import copy

import numpy as np
import pytest
import torch
from in_host import HALVED, HIRES, SIDE, fail, failing_unet, pixels, running
from PIL import Image

from tomesd_core import merge_map


def with_map(step=1, layer=1, **values):
    """Arguments of the script that merge as `HALVED`, with a merge map."""
    halved = {"ratio": 0.5, "schedule": "constant", "method": "paper"}
    return [{**halved, "map_step": step, "map_layer": layer, **values}]


def line(processed):
    """The line about the map under the picture."""
    (line,) = [text for text in processed.comments.splitlines() if "merge map" in text]
    return line


def grid_of(text):
    return re.search(r"\d+x\d+", text)[0]


def pictures_and_maps(processed):
    """The pictures without their grid, and their maps."""
    images = processed.images[processed.index_of_first_image :]
    assert len(processed.images) == len(processed.infotexts)
    return images[: len(images) // 2], images[len(images) // 2 :]


@pytest.fixture
def merged_calls(host, monkeypatch):
    """Every merged call of the model: step, layer, grid, slots."""
    calls, recorder = [], running("webui.maps").PictureRecorder
    record = recorder.__call__

    def call(self, layer_name, step, grid, token_map):
        calls.append((step, layer_name, grid, token_map.slots))
        record(self, layer_name, step, grid, token_map)

    monkeypatch.setattr(recorder, "__call__", call)
    return calls


def drawn_over(picture, slots, grid):
    """The expected map of a picture: eight pixels per token."""
    side = 8 * grid[1]
    large = torch.from_numpy(np.array(picture.resize((side, side), Image.NEAREST)))
    return merge_map.draw(slots, grid, large).numpy().tobytes()


def test_off_by_default_and_while_merging_is_off(make, merged, plain):
    assert pixels(make(HALVED)) == pixels(make(with_map(step=0))) == merged
    assert pixels(make(with_map(enabled=False))) == plain


def test_the_map_is_an_extra_picture_and_changes_no_other(make, merged):
    processed = make([*HALVED, 1, 1])
    (picture,), (image,) = pictures_and_maps(processed)
    assert [picture.tobytes()] == merged
    assert image.size == (8 * SIDE, 8 * SIDE)
    assert processed.infotexts[0] == processed.infotexts[1] == image.info["parameters"]
    assert "ToMe ratio: 0.5" in image.info["parameters"] and "map" not in image.info["parameters"]
    assert "3 of 4" in processed.comments
    assert all(part in line(processed) for part in ("step 1", "layer 1", "32x32"))


@pytest.mark.parametrize(
    ("step", "layer", "says"), [(1, 2, (0, 1)), (2.0, 1, (1, 0)), (9, 70, (1, 2))]
)
def test_the_map_is_of_the_wanted_step_and_layer(make, merged_calls, step, layer, says):
    processed = make(with_map(step, layer))
    (picture,), (image,) = pictures_and_maps(processed)
    of_step, of_layer = says
    calls = [call for call in merged_calls if call[0] == of_step]
    _, name, grid, slots = calls[of_layer]
    assert image.tobytes() == drawn_over(picture, slots[0], grid)
    for part in (f"step {of_step + 1}", f"layer {of_layer + 1}", name):
        assert part in line(processed)


def test_every_picture_of_every_batch_has_the_prompted_halfs_map(make, merged_calls):
    processed = make(with_map(2, 2), n_iter=2, batch_size=2)
    pictures, images = pictures_and_maps(processed)
    assert len(pictures) == len(images) == 4
    batches = [slots for step, _, _, slots in merged_calls if step == 1][1::3]
    assert [len(slots) for slots in batches] == [4, 4], "two pictures, both halves"
    for number, (picture, one) in enumerate(zip(pictures, images, strict=True)):
        slots = batches[number // 2][number % 2]
        assert one.tobytes() == drawn_over(picture, slots, (SIDE, SIDE))
        assert one.info["parameters"] == picture.info["parameters"]
    assert len({one.tobytes() for one in images}) == 4


@pytest.mark.parametrize(
    ("fields", "items", "rows"),
    [
        ({"override_settings": {"batch_cond_uncond": False}}, 2, (0, 1)),
        ({"prompt": "cat AND red apple"}, 6, (0, 2)),
    ],
    ids=["halves in two calls", "prompts of two parts"],
)
def test_the_map_is_of_a_pictures_first_prompt(make, merged_calls, fields, items, rows):
    pictures, images = pictures_and_maps(make(with_map(), batch_size=2, **fields))
    slots = merged_calls[0][3]
    assert len(slots) == items
    for picture, image, row in zip(pictures, images, rows, strict=True):
        assert image.tobytes() == drawn_over(picture, slots[row], (SIDE, SIDE))


def test_hires_fix_shows_the_last_pass_that_merged(make):
    tokens = {}
    for apply_to in ("both passes", "first pass", "hires pass"):
        processed = make(with_map(2, apply_to=apply_to), **HIRES)
        (picture,), (image,) = pictures_and_maps(processed)
        assert (picture.size, image.size) == ((36, 36), (288, 288))
        tokens[apply_to] = grid_of(line(processed))
    assert tokens == {"both passes": "36x36", "first pass": "32x32", "hires pass": "36x36"}


def test_img2img_and_a_picture_that_is_not_square(make):
    size = {"init_images": [Image.new("RGB", (48, 32), "red")], "width": 48, "height": 32}
    processed = make(with_map(), "img2img", **size)
    assert pictures_and_maps(processed)[1][0].size == (384, 256)
    assert "48x32" in line(processed)


def tiled(whole, overlap):
    """Run the model on two tiles of the latent's longer side, as Tiled Diffusion does."""

    def apply_model(x, t, cond):
        side = 2 if x.shape[2] > x.shape[3] else 3
        half, length = x.shape[side] // 2, x.shape[side]
        first = whole(x.narrow(side, 0, half + overlap), t, cond).narrow(side, 0, half)
        second = whole(x.narrow(side, half - overlap, length - half + overlap), t, cond)
        return torch.cat([first, second.narrow(side, overlap, length - half)], dim=side)

    return apply_model


@pytest.mark.parametrize(
    ("width", "height", "overlap", "level_1", "level_2"),
    [
        (32, 64, 0, "32x32", "16x16"),
        (64, 32, 0, "32x32", "16x16"),
        # The tile's grid at level 2 is the whole picture's: 33 and 34 tokens both give 17.
        (32, 34, 16, "32x33", "16x17"),
        (33, 35, None, "33x35", "17x18"),
    ],
)
def test_a_map_of_one_tile_is_called_one(
    make, host, monkeypatch, width, height, overlap, level_1, level_2
):
    model = host.sd_model
    if overlap is not None:
        monkeypatch.setattr(model, "apply_model", tiled(model.apply_model, overlap))
    maps = (with_map(1, layer, max_downsample=2) for layer in range(1, 5))
    lines = [line(make(tome, steps=1, width=width, height=height)) for tome in maps]
    assert Counter(map(grid_of, lines)) == {level_1: 3, level_2: 1}
    assert ["tile" in text for text in lines] == [overlap is not None] * 4


def test_where_nothing_merges_there_is_no_map(make):
    processed = make(with_map(min_tokens=65536))
    assert len(processed.images) == 1
    assert "merge map" not in processed.comments


def test_a_batch_that_was_skipped_before_it_merged_has_no_map(make, on_denoised):
    from modules import shared

    on_denoised(lambda _: shared.state.skip() if shared.state.job_no == 1 else None)
    processed = make(with_map(schedule="step", ratio=0.0, late_ratio=0.5, switch_at=1.0), n_iter=2)
    assert len(processed.images) == 1 + 2 + 1, "a grid, two pictures and one map"
    assert processed.infotexts[3] == processed.infotexts[1]


def test_the_map_is_drawn_over_what_other_scripts_made_of_the_picture(
    make, add_script, merged_calls
):
    def paint(p, pp):
        pp.image = Image.new("RGB", pp.image.size, "white")

    add_script(first=True, postprocess_image=paint)
    (picture,), (image,) = pictures_and_maps(make(with_map()))
    white = Image.new("RGB", picture.size, "white")
    assert image.tobytes() == drawn_over(white, merged_calls[0][3][0], (SIDE, SIDE))


def test_a_detailers_postprocess_on_a_copy_takes_nothing_away(make, add_script, merged_calls):
    """It ends the generation of a copy of `p`, and begins another one."""
    from modules import processing

    def detail(p, pp):
        p.scripts.postprocess(copy(p), processing.Processed(p, []))
        again = copy(p)
        p.scripts.before_process(again)
        p.scripts.process(again)

    add_script(postprocess_image=detail)
    processed = make(with_map(), batch_size=2)
    pictures, images = pictures_and_maps(processed)
    of_both = merged_calls[0][3][:2]
    for picture, image, slots in zip(pictures, images, of_both, strict=True):
        assert image.tobytes() == drawn_over(picture, slots, (SIDE, SIDE))


def test_a_p_that_is_used_again_has_new_maps(make_p, host, process):
    p = make_p(with_map(), n_iter=3)
    with failing_unet(host, at=5), pytest.raises(ValueError, match="on purpose"):
        process(p)
    p.n_iter = 1
    for _ in range(2):
        assert len(process(p).images) == 2
    p.script_args = (*p.script_args[: p.scripts.script("ToMe").args_from], False)
    assert len(process(p).images) == 1


def test_without_a_map_nothing_is_recorded(make, merged, monkeypatch):
    parts = {"sampling": "PictureRecorder", "maps": "draw", "host": "first_items"}
    for module, name in parts.items():
        monkeypatch.setattr(running(f"webui.{module}"), name, fail)
    assert pixels(make(HALVED)) == merged
