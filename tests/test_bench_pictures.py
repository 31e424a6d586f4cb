"""The benchmark's pictures: how they are made, kept and compared."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from on_bench import TINY_PIPELINE

from lab.bench import distances, pictures
from lab.bench.contenders import KEYS, TOKENS, UNMERGED, UNWEIGHTED
from lab.bench.peers import CORNER, RANDOM, TODO
from lab.bench.pictures import BATCH, PictureCache
from lab.bench.variants import UNMERGED_ROW, Variant, at_ratio, base_variant


def test_pictures_are_ldms_plms_of_their_seed_and_prompt() -> None:
    from ldm.models.diffusion.plms import PLMSSampler

    model, numbers = TINY_PIPELINE.model(), TINY_PIPELINE.captions(BATCH + 3)
    number = BATCH + 2
    x, _ = PLMSSampler(model).sample(
        S=4,
        batch_size=1,
        shape=model.image_shape,
        conditioning=model.encode_prompts([model.captions[numbers[number]]]),
        unconditional_conditioning=model.encode_prompts([""]),
        unconditional_guidance_scale=3.0,
        x_T=torch.randn(1, *model.image_shape, generator=torch.Generator().manual_seed(number)),
        verbose=False,
    )
    alone = torch.from_numpy(np.array(model.to_images(x)[0]))
    batch = TINY_PIPELINE.make(UNMERGED_ROW.variant, BATCH)
    assert batch.pictures.shape == (BATCH, 8, 8, 3) and batch.pictures.dtype == torch.uint8
    assert (batch.pictures[2].int() - alone.int()).abs().max() <= 1
    assert batch.seconds > 0 and batch.merged == ""


def test_merging_follows_the_steps(watch: Callable) -> None:
    unet = TINY_PIPELINE.model().model.diffusion_model
    variant = base_variant(schedule="step", ratio=0.75, late_ratio=0.25)
    with watch(unet) as inputs_of:
        merged = TINY_PIPELINE.make(variant, 0).merged
    first, *_ = inputs_of.values()
    # PLMS runs the UNet twice in its first step.
    assert [tokens.shape[1] for tokens in first] == [16, 16, 16, 48, 48]
    assert {tokens.shape[0] for tokens in first} == {2 * BATCH}
    assert "4 of 4 steps" in merged


@pytest.mark.parametrize("contender", [KEYS, RANDOM])
def test_pictures_neither_read_nor_change_random_state(contender: str) -> None:
    variant, unmerged = at_ratio(contender, 0.75).variant, UNMERGED_ROW.variant
    random_state = torch.get_rng_state()
    first, again, plain = (TINY_PIPELINE.make(each, 0)[0] for each in (variant, variant, unmerged))
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_digests_differ_by_all_that_pictures_depend_on() -> None:
    variants = [base_variant(), base_variant(ratio=0.4), base_variant(window=8)]
    variants += [base_variant(contender) for contender in (KEYS, TOKENS, UNWEIGHTED)]
    variants += [Variant(contender, 0.75) for contender in (UNMERGED, CORNER, RANDOM, TODO)]
    changes = [{}, {"steps": 5}, {"scale": 2.0}, {"attention": "plain"}, {"dtype": "bfloat16"}]
    changes += [{"name": "emoji"}, {"name": "photos"}, {"side": 16}]
    pipelines = [dataclasses.replace(TINY_PIPELINE, **change) for change in changes]
    digests = {pipeline.digest(variant) for pipeline in pipelines for variant in variants}
    assert len(digests) == len(pipelines) * len(variants)
    # A variant's own steps replace the pipeline's.
    of_4 = dataclasses.replace(base_variant(), steps=4)
    whole = TINY_PIPELINE.digest(base_variant())
    assert TINY_PIPELINE.digest(of_4) == pipelines[1].digest(of_4) == whole


@pytest.mark.parametrize("changed", ["hooks", "matching", "plan", "proportional"])
def test_digests_differ_by_the_code_that_merges(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [base_variant(KEYS), Variant(CORNER, 0.5), UNMERGED_ROW.variant]
    before = [TINY_PIPELINE.digest(variant) for variant in variants]
    source, name = inspect.getsource, f"tomesd_core.{changed}"
    monkeypatch.setattr(inspect, "getsource", lambda of: source(of) + "#" * (of.__name__ == name))
    # The module keeps the digest of the code that it has read: a new copy reads it again.
    spec = importlib.util.find_spec(pictures.__name__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    pipeline = again.Pipeline(**vars(TINY_PIPELINE))
    after = [pipeline.digest(variant) for variant in variants]
    assert after[0] != before[0] and after[1:] == before[1:]


def test_batches_are_made_in_turns_and_once(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path, TINY_PIPELINE)
    half, whole = base_variant(), UNMERGED_ROW.variant
    everything = [(whole, 0), (half, 0), (whole, BATCH), (half, BATCH)]
    assert [*cache.missing([whole, half, whole], BATCH + 1).values()] == everything
    assert list(cache.make(everything[:3], 1, 1)) == [whole, half, whole]
    assert [*cache.missing([whole, half], BATCH + 1).values()] == [(half, BATCH)]
    series = cache.read(whole, BATCH + 1)
    expected = [TINY_PIPELINE.make(whole, first)[0] for first in (0, BATCH)]
    assert torch.equal(series.pixels, torch.cat(expected)[: BATCH + 1])


def test_psnr_and_ssim() -> None:
    generator = torch.Generator().manual_seed(0)
    twins = torch.randint(0, 200, (2, 8, 8, 3), generator=generator, dtype=torch.uint8)
    brighter = twins + torch.tensor([0, 10], dtype=torch.uint8).view(2, 1, 1, 1)
    same, other = distances.psnr(brighter, twins).tolist()
    assert other == pytest.approx(20 * math.log10(255 / 10))
    assert same == pytest.approx(10 * math.log10(255**2 * 12))
    same, other = distances.ssim(brighter, twins).tolist()
    assert same == pytest.approx(1)
    assert 0.5 < other < 1


def test_differences_are_paired() -> None:
    numbers = distances.resamples(50)
    shared = 10 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    own = torch.randn(50, generator=torch.Generator().manual_seed(1))
    one = distances.mean(shared, numbers)
    other = distances.mean(shared + own - own.mean() + 1, numbers)
    difference = other.minus(one)
    assert difference.value == pytest.approx(1)
    assert difference.interval < 0.2 * one.interval
    assert distances.verdict(difference) == "better"
    assert distances.verdict(one.minus(other)) == "worse"
    assert distances.verdict(one.minus(one)) == "none"
    unsure = dataclasses.replace(difference, value=difference.interval * 0.99)
    assert distances.verdict(unsure) == "none"
