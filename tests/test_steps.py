"""The ratio and the draw of each step."""

import random

import numpy as np
import pytest
import torch
from layer_calls import FIRST, assert_merged, recorded

import tomesd_core as tome
from tomesd_core.partition import make_partition


@pytest.mark.parametrize(
    ("late_ratio", "schedule", "total", "ratios"),
    [
        (0.1, "linear", 4, [0.7, 0.5, 0.3, 0.1, 0.1]),
        (0.0, "step", 5, [0.7, 0.7, 0, 0, 0]),
        (0.1, "linear", 1, [0.7]),
        (0.1, "linear", None, [0.7] * 3),
    ],
)
def test_the_ratio_follows_the_schedule(
    unet, whole, inputs, watch, late_ratio, schedule, total, ratios
):
    """A late ratio of 0 ends merging; a single step and an unknown total have the early ratio."""
    settings = whole(ratio=0.7, late_ratio=late_ratio, schedule=schedule, switch_at=0.5)
    with tome.attach(unet, settings) as merging, watch(unet) as inputs_of:
        for step, ratio in enumerate(ratios):
            merging.set_step(step, total)
            unet(*inputs)
            assert merging.report().ratio == pytest.approx(ratio)
    assert [x.shape[1] for x in inputs_of[FIRST]] == [
        256 - int(256 * ratio + 1e-6) for ratio in ratios
    ]
    merged_steps = len([ratio for ratio in ratios if ratio])
    assert (merging.report().steps, merging.report().merged_steps) == (len(ratios), merged_steps)


def test_without_set_step_every_pass_counts_as_the_next_step_with_the_early_ratio(
    unet, whole, inputs
):
    with tome.attach(unet, whole(late_ratio=0.25, schedule="linear")) as merging:
        counted = [unet(*inputs) for _ in range(3)]
        assert (merging.report().steps, merging.report().merged_steps) == (3, 3)
    with tome.attach(unet, whole()) as merging:
        for step in (2, 0, 1):
            merging.set_step(step)
            assert torch.equal(unet(*inputs), counted[step])
    assert not torch.equal(counted[0], counted[1])


def test_two_passes_of_one_step_share_its_draw_and_count_once(unet, whole, inputs):
    """As a sampler's second evaluation, or the halves of guidance."""
    with tome.attach(unet, whole()) as merging:
        merging.set_step(4, 20)
        assert torch.equal(unet(*inputs), unet(*inputs))
        assert (merging.report().steps, merging.report().merged_steps) == (1, 1)


def test_parts_of_a_batch_run_apart_equal_the_batch(unet, whole, make_inputs):
    latent, timesteps, context = make_inputs(batch=4)
    with tome.attach(unet, whole(max_downsample=2)) as merging:
        merging.set_step(7, 20)
        together, apart = unet(latent, timesteps, context), []
        for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
            with recorded(unet) as calls:
                apart.append(unet(latent[part], timesteps[part], context[part]))
            for call in calls.values():
                assert_merged(call, merging.settings, step=7)
    torch.testing.assert_close(torch.cat(apart), together, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"partition": "uniform"}, {"shared_draw": False}, {"window": 4}], ids=str
)
def test_merging_neither_reads_nor_changes_random_state(unet, small_settings, inputs, options):
    outputs = []
    for seed in (1, 2):
        for seed_of in (torch.manual_seed, random.seed, np.random.seed):
            seed_of(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()
        make_partition.cache_clear()
        with tome.attach(unet, small_settings(max_downsample=2, **options)) as merging:
            for step in (0, 5):
                merging.set_step(step, 20)
                outputs.append(unet(*inputs))
        assert merging.report().merged_steps == 2
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        np.testing.assert_equal(np.random.get_state(), before[2])
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_picture_of_few_steps_keeps_more_tokens(unet, small_settings, inputs):
    with tome.attach(unet, small_settings(ratio=0.75, full_steps=20)) as merging:
        # Four of 20 steps, as in img2img, have the ratio of 20; four of four have a lower one.
        for steps, ratio in (({"schedule_steps": 20}, 0.75), ({}, 1 - 0.25 * 5 ** (2 / 3))):
            merging.set_step(0, 4, **steps)
            unet(*inputs)
            assert merging.report().ratio == pytest.approx(ratio)
    with tome.attach(unet, small_settings(ratio=0.5, full_steps=20)) as merging:
        merging.set_step(0, 2)
        unet(*inputs)
    summary = merging.report().summary
    assert "nothing merged" in summary and "2 steps" in summary and "20" in summary
