"""A generation with merging: its picture, its summary and its parameters."""

from __future__ import annotations

import re

import pytest
from in_host import (
    FULL,
    HALF,
    HALVED,
    HIRES,
    HIRES_TOKENS,
    KEYS,
    arguments,
    failing_unet,
    keys_of,
    largest_difference,
    left,
    pixels,
)
from PIL import Image


def test_on_merges_and_off_does_not(make, plain, attention):
    assert pixels(make(HALVED)) != plain
    assert attention.tokens == [HALF, HALF]
    attention.tokens.clear()
    for off in ([False, 0.5], [{"enabled": False, "ratio": 0.6}], [False, "abc", None], [], None):
        processed = make(off)
        assert pixels(processed) == plain
        assert keys_of(processed) == {}
        assert processed.comments == ""
    assert set(attention.tokens) == {FULL}


def test_summary_under_the_picture_and_once_in_the_log(make, log_lines):
    processed = make(HALVED, n_iter=2)
    (line,) = log_lines
    # Each batch takes its own time, and the log has the first one's.
    shown, logged = (text.partition("; sampled in ")[0] for text in (processed.comments, line))
    assert shown == f"ToMe: {logged}" and processed.comments.count("ToMe: ") == 1
    assert all(part in line for part in ("3 of 4", "1024 → 512 tokens", "2 of 2 steps"))


def test_max_downsample_and_min_tokens(make):
    request = {"steps": 1, "width": 64, "height": 64}
    for level, parts in (
        (1, ["3 of 4", "4096 → 2048"]),
        (2, ["4 of 4", "4096 → 2048", "1024 → 512"]),
    ):
        comments = make(arguments(level=level), **request).comments
        assert all(part in comments for part in parts)
    assert "nothing merged" in make(arguments(least=2048)).comments


@pytest.mark.parametrize(
    ("tome", "said"),
    [
        (HALVED, ["3 of 4", "1024 → 512 tokens", "2 of 2 steps"]),
        ([True, 1.5], ["nothing merged", "ratio", "1.5"]),
        (arguments(apply_to="hires pass"), ["nothing merged", "'hires pass'"]),
        ([False], None),
    ],
    ids=["on", "wrong", "no such pass", "off"],
)
def test_the_panel_has_the_last_generations_summary(make, sampling, tome, said):
    make(HALVED)
    make(tome)
    summary = sampling.generation.last.summary
    assert summary is None if said is None else all(part in summary for part in said)
    assert (sampling.settings_in_use() is None) == (tome != HALVED)


def test_img2img(make, attention):
    picture = make().images[0]
    attention.tokens.clear()
    request = {"init_images": [picture], "denoising_strength": 0.7, "steps": 3}
    processed = make(HALVED, "img2img", **request)
    assert attention.tokens == [HALF] * 3
    assert keys_of(processed)["ToMe ratio"] == 0.5
    assert pixels(processed) != pixels(make(None, "img2img", **request))


def test_inpainting(make, attention):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    make(HALVED, "img2img", init_images=[make().images[0]], image_mask=mask, denoising_strength=1.0)
    assert attention.tokens == [FULL] * 2 + [HALF] * 2


def test_pictures_of_a_batch_are_those_made_alone(make):
    batch = make(HALVED, n_iter=2, batch_size=2)
    assert len(batch.images) == 5, "a grid and four pictures"
    for number, picture in enumerate(batch.images[1:]):
        alone = make(HALVED, seed=1 + number).images[0]
        assert largest_difference(picture, alone) <= 2
    assert "ToMe ratio: 0.5" in batch.infotexts[4]


def test_halves_of_guidance_in_two_calls(make, merged, attention):
    apart = make(HALVED, override_settings={"batch_cond_uncond": False})
    assert attention.tokens == [HALF] * 4
    assert largest_difference(apart.images[0], Image.frombytes("RGB", (32, 32), merged[0])) <= 2


@pytest.mark.parametrize(
    ("tome", "hires", "effective"),
    [
        ({}, False, {}),
        ({"schedule": "linear"}, False, {"late ratio": 0.2}),
        ({"schedule": "step", "switch_at": 0.25}, False, {"late ratio": 0.2, "switch at": 0.25}),
        ({"least": 1024}, False, {"min tokens": 1024}),
        ({"level": 4}, True, {"max downsample": 4, "apply to": "both passes"}),
        ({"apply_to": "hires pass"}, True, {"apply to": "hires pass"}),
        ({"apply_to": "first pass"}, False, {}),
    ],
)
def test_parameters_hold_the_fields_that_have_an_effect(make, tome, hires, effective):
    processed = make(arguments(**tome), steps=1, **(HIRES if hires else {}))
    always = {"ratio": 0.5, "schedule": tome.get("schedule", "constant"), "max downsample": 1}
    expected = {**always, "rematch every": 1, "method": "paper", **effective}
    assert keys_of(processed) == {f"ToMe {name}": value for name, value in expected.items()}


def test_every_webui_reads_the_parameters_back():
    assert all(re.fullmatch(r"[\w ]+", key) for key in KEYS) and len(KEYS) == len(set(KEYS))


@pytest.mark.parametrize("apply_to", ["both passes", "first pass", "hires pass"])
def test_apply_to_chooses_passes_and_each_has_its_own_schedule(make, attention, apply_to):
    linear = arguments(0.7, 0.2, "linear", apply_to=apply_to)
    processed = make(linear, hr_second_pass_steps=3, sampler_name="Euler a", **HIRES)
    first = [0.7, 0.2] if apply_to != "hires pass" else [0.0] * 2
    second = [0.7, 0.45, 0.2] if apply_to != "first pass" else [0.0] * 3
    assert attention.tokens == [*map(left, first), *(left(ratio, HIRES_TOKENS) for ratio in second)]
    assert ("first pass: 3 of 4" in processed.comments) == any(first)
    assert ("hires pass: 3 of 4" in processed.comments) == any(second)


def test_a_hires_pass_without_a_first_one(make, attention):
    """As the Upscale button runs it."""
    picture = Image.new("RGB", (32, 32), "red")
    processed = make(arguments(apply_to="hires pass"), firstpass_image=picture, **HIRES)
    assert attention.tokens == [left(0.5, HIRES_TOKENS)] * 2
    assert "hires pass: 3 of 4" in processed.comments


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_hires_pass_without_hires_fix_merges_nothing(make, attention, log_lines, tab):
    request = {"init_images": [Image.new("RGB", (32, 32))]} if tab == "img2img" else {}
    processed = make(arguments(apply_to="hires pass"), tab, **request)
    assert set(attention.tokens) == {FULL}
    assert keys_of(processed) == {}
    where = "img2img" if tab == "img2img" else "without hires fix"
    assert "nothing merged" in processed.comments and where in processed.comments
    assert len(log_lines) == 1 and where in log_lines[0]


@pytest.mark.parametrize("fields", [{}, {"n_iter": 2}, HIRES], ids=["one", "two", "hires fix"])
def test_the_summary_has_the_seconds_of_sampling_once(make, fields):
    assert len(re.findall(r"; sampled in \d+\.\d s", make(HALVED, **fields).comments)) == 1


def test_a_failed_or_unmerged_sampling_has_no_seconds(make, host, sampling):
    assert "sampled in" not in make([True, 9]).comments
    with failing_unet(host), pytest.raises(ValueError):
        make(HALVED)
    assert "sampled in" not in sampling.generation.last.summary


def test_an_interrupted_first_pass_is_reported_without_seconds_and_a_second_pass(make, on_denoised):
    from modules import shared

    on_denoised(lambda _: shared.state.interrupt())
    comments = make(HALVED, **HIRES).comments
    assert "first pass: 3 of 4" in comments
    assert "sampled in" not in comments and "hires pass" not in comments
