"""The ratio of each step, as samplers and batches count steps."""

from __future__ import annotations

import pytest
from in_host import SIDE, arguments, left
from PIL import Image

from tomesd_core.settings import MergeSettings


@pytest.mark.parametrize(
    ("sampler_name", "evaluations"),
    [("Euler", 4), ("Euler a", 4), ("Heun", 7), ("DPM++ 2M", 4), ("PLMS", 4)],
)
def test_linear_goes_from_the_first_evaluation_to_the_last(
    make, attention, sampler_name, evaluations
):
    processed = make(arguments(0.7, 0.2, "linear"), steps=4, sampler_name=sampler_name)
    tokens = attention.tokens
    assert len(tokens) == evaluations
    assert (
        f"1024 → {left(0.7)} to {left(0.2)} tokens, {evaluations} of {evaluations} steps"
        in processed.comments
    )
    assert (tokens[0], tokens[-1]) == (left(0.7), left(0.2))
    assert tokens == sorted(tokens)


@pytest.mark.parametrize(("sampler_name", "steps"), [("DDIM", 4), ("DDIM", 7), ("PLMS", 7)])
def test_samplers_that_run_other_than_their_number_of_steps(make, attention, sampler_name, steps):
    make(arguments(0.7, 0.2, "linear"), steps=steps, sampler_name=sampler_name)
    tokens = attention.tokens
    assert tokens[0] == left(0.7)
    assert tokens == sorted(tokens)
    assert left(0.4) <= tokens[-1] <= left(0.2)


def test_img2img_has_the_whole_schedule(make, attention):
    request = {
        "init_images": [Image.new("RGB", (32, 32), "red")],
        "denoising_strength": 0.5,
        "steps": 6,
    }
    make(arguments(0.6, 0.3, "linear"), "img2img", **request)
    assert attention.tokens == [left(ratio) for ratio in (0.6, 0.5, 0.4, 0.3)]


def test_every_batch_starts_the_schedule_and_a_single_step_is_early(make, attention):
    make(arguments(0.7, 0.2, "linear"), n_iter=2)
    make(arguments(0.7, 0.2, "step"), steps=1)
    assert attention.tokens == [left(0.7), left(0.2)] * 2 + [left(0.7)]


def test_few_steps_keep_more_tokens(make, attention):
    """img2img runs the last of the requested steps, each as long as in all of them."""
    picture = Image.new("RGB", (SIDE, SIDE), "orange")
    few = {"ratio": 0.75, "full_steps": 20}
    for tab, fields, steps in (
        ("txt2img", {"steps": 8}, 8),
        ("img2img", {"steps": 20, "init_images": [picture], "denoising_strength": 0.2}, 20),
    ):
        attention.tokens.clear()
        make([few], tab, **fields)
        ratio = MergeSettings(ratio=0.75).in_steps(steps).ratio
        assert set(attention.tokens) == {left(ratio)}
