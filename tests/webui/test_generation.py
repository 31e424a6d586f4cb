"""A generation with merging: what it merges, what it says, and that it leaves nothing, however it
ends."""

from __future__ import annotations

import math
import re
from copy import copy
from types import SimpleNamespace

import pytest
import torch
from in_host import HALVED, HIRES, HIRES_TOKENS, KEYS, SIDE, failing_unet, hooked, left, pixels
from PIL import Image, ImageChops
from torch import nn

from tomesd_core.settings import FIELDS, MergeSettings

ON = HALVED
HALF = left(0.5)
FULL = left(0.0)


def arguments(
    ratio=0.5,
    late=0.2,
    schedule="constant",
    switch_at=0.5,
    level=1,
    least=0,
    apply_to="both passes",
):
    return [True, ratio, late, schedule, switch_at, level, least, apply_to, 1, "paper"]


def keys_of(processed):
    """The picture's own keys, as they are written and as they are read back from the text."""
    from modules import infotext_utils

    keys = {
        key: value
        for key, value in processed.extra_generation_params.items()
        if key.startswith("ToMe")
    }
    for text in processed.infotexts:
        parameters = infotext_utils.parse_generation_parameters(text)
        assert {key: str(value) for key, value in keys.items()} == {
            k: v for k, v in parameters.items() if "ToMe" in k
        }
    return keys


def untimed(text):
    """What was said without its times, which differ from run to run."""
    return re.sub(r"; sampled in [\d.]+ s(, ([\d.]+ times|no) faster than unmerged)?", "", text)


def largest_difference(one, other):
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def fail(*_, **__):
    raise ValueError("on purpose")


# On and off


def test_on_merges_and_off_does_not(make, plain, attention):
    assert pixels(make(ON)) != plain
    assert attention.tokens == [HALF, HALF]
    attention.tokens.clear()
    for off in ([False, 0.5], [{"enabled": False, "ratio": 0.6}], [False, "abc", None], [], None):
        processed = make(off)
        assert pixels(processed) == plain
        assert keys_of(processed) == {}
        assert processed.comments == ""
    assert set(attention.tokens) == {FULL}


def test_summary_under_the_picture_and_once_in_the_log(make, log_lines):
    processed = make(ON, n_iter=2)
    line = "3 of 4 self-attention layers, 1024 → 512 tokens, 2 of 2 steps"
    assert untimed(processed.comments) == f"ToMe: {line}\n"
    assert [untimed(text) for text in log_lines] == [line]


def test_max_downsample_and_min_tokens(make):
    request = {"steps": 1, "width": 64, "height": 64}
    assert "3 of 4 self-attention layers, 4096 → 2048 tokens" in make(ON, **request).comments
    assert (
        "4 of 4 self-attention layers, 4096 → 2048 tokens, 1024"
        in make(arguments(level=2), **request).comments
    )
    assert "nothing merged: " in make(arguments(least=2048)).comments


@pytest.mark.parametrize(
    ("tome", "said"),
    [
        (ON, "3 of 4 self-attention layers, 1024 → 512 tokens, 2 of 2 steps"),
        ([True, 1.5], "nothing merged: ratio must lie in [0, 0.9375], got 1.5"),
        (
            arguments(apply_to="hires pass"),
            "nothing merged: apply to is 'hires pass', and a picture without hires fix",
        ),
        ([False], None),
    ],
    ids=["on", "wrong", "no such pass", "off"],
)
def test_the_panel_says_what_the_last_generation_did(make, sampling, tome, said):
    make(ON)
    make(tome)
    summary = sampling.generation.last.summary
    assert summary == said or summary.startswith(said)
    assert (sampling.settings_in_use() is None) == (tome != ON)


def test_img2img(make, attention):
    picture = make().images[0]
    attention.tokens.clear()
    request = {"init_images": [picture], "denoising_strength": 0.7, "steps": 3}
    processed = make(ON, "img2img", **request)
    assert attention.tokens == [HALF] * 3
    assert keys_of(processed)["ToMe ratio"] == 0.5
    assert pixels(processed) != pixels(make(None, "img2img", **request))


def test_inpainting(make, attention):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    make(ON, "img2img", init_images=[make().images[0]], image_mask=mask, denoising_strength=1.0)
    assert attention.tokens == [FULL] * 2 + [HALF] * 2


def test_a_batch_holds_the_pictures_that_are_made_alone(make):
    batch = make(ON, n_iter=2, batch_size=2)
    assert len(batch.images) == 5, "a grid and four pictures"
    for number, picture in enumerate(batch.images[1:]):
        alone = make(ON, seed=1 + number).images[0]
        assert largest_difference(picture, alone) <= 2
    assert "ToMe ratio: 0.5" in batch.infotexts[4]


def test_halves_of_guidance_in_two_calls(make, merged, attention):
    apart = make(ON, override_settings={"batch_cond_uncond": False})
    assert attention.tokens == [HALF] * 4
    assert largest_difference(apart.images[0], Image.frombytes("RGB", (32, 32), merged[0])) <= 2


# The keys


@pytest.mark.parametrize(
    ("tome", "hires", "effective"),
    [
        (arguments(), False, {"ratio": 0.5, "schedule": "constant"}),
        (
            arguments(schedule="linear"),
            False,
            {"ratio": 0.5, "late ratio": 0.2, "schedule": "linear"},
        ),
        (
            arguments(schedule="step", switch_at=0.25),
            False,
            {"ratio": 0.5, "late ratio": 0.2, "schedule": "step", "switch at": 0.25},
        ),
        (arguments(least=1024), False, {"ratio": 0.5, "schedule": "constant", "min tokens": 1024}),
        (
            arguments(level=4),
            True,
            {"ratio": 0.5, "schedule": "constant", "apply to": "both passes"},
        ),
        (
            arguments(apply_to="hires pass"),
            True,
            {"ratio": 0.5, "schedule": "constant", "apply to": "hires pass"},
        ),
        (arguments(apply_to="first pass"), False, {"ratio": 0.5, "schedule": "constant"}),
    ],
)
def test_keys_of_fields_that_have_an_effect(make, tome, hires, effective):
    processed = make(tome, steps=1, **(HIRES if hires else {}))
    expected = {**effective, "max downsample": tome[5], "rematch every": 1, "method": "paper"}
    assert keys_of(processed) == {f"ToMe {name}": value for name, value in expected.items()}


def test_keys_are_such_as_every_webui_reads_back():
    assert all(re.fullmatch(r"[\w ]+", key) for key in KEYS)


# Hires fix


@pytest.mark.parametrize("apply_to", ["both passes", "first pass", "hires pass"])
def test_apply_to_chooses_the_passes_of_hires_fix_and_each_has_its_own_schedule(
    make, attention, apply_to
):
    linear = arguments(0.7, 0.2, "linear", apply_to=apply_to)
    processed = make(linear, hr_second_pass_steps=3, sampler_name="Euler a", **HIRES)
    first = [0.7, 0.2] if apply_to != "hires pass" else [0.0] * 2
    second = [0.7, 0.45, 0.2] if apply_to != "first pass" else [0.0] * 3
    assert attention.tokens == [*map(left, first), *(left(ratio, HIRES_TOKENS) for ratio in second)]
    assert ("first pass: 3 of 4" in processed.comments) == any(first)
    assert ("hires pass: 3 of 4" in processed.comments) == any(second)


def test_a_hires_pass_without_a_first_one(make_p, host, attention, process):
    """The Upscale button's way."""
    p = make_p(
        arguments(apply_to="hires pass"), firstpass_image=Image.new("RGB", (32, 32), "red"), **HIRES
    )
    processed = process(p)
    assert attention.tokens == [left(0.5, HIRES_TOKENS)] * 2
    assert "hires pass: 3 of 4" in processed.comments


def test_an_interrupted_first_pass_skips_the_second(make, on_denoised):
    from modules import shared

    on_denoised(lambda _: shared.state.interrupt())
    assert "first pass: 3 of 4" in make(ON, **HIRES).comments


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_hires_pass_without_hires_fix_merges_nothing_and_says_so(make, attention, log_lines, tab):
    request = {"init_images": [Image.new("RGB", (32, 32))]} if tab == "img2img" else {}
    processed = make(arguments(apply_to="hires pass"), tab, **request)
    assert set(attention.tokens) == {FULL}
    assert keys_of(processed) == {}
    where = "img2img" if tab == "img2img" else "without hires fix"
    assert "nothing merged" in processed.comments and where in processed.comments
    assert len(log_lines) == 1 and where in log_lines[0]


# The schedule


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
def test_samplers_that_do_not_keep_to_their_total(make, attention, sampler_name, steps):
    make(arguments(0.7, 0.2, "linear"), steps=steps, sampler_name=sampler_name)
    tokens = attention.tokens
    assert tokens[0] == left(0.7)
    assert tokens == sorted(tokens)
    assert left(0.4) <= tokens[-1] <= left(0.2)


def test_a_shortened_run_has_the_whole_schedule(make, attention):
    request = {
        "init_images": [Image.new("RGB", (32, 32), "red")],
        "denoising_strength": 0.5,
        "steps": 6,
    }
    make(arguments(0.6, 0.3, "linear"), "img2img", **request)
    assert attention.tokens == [left(ratio) for ratio in (0.6, 0.5, 0.4, 0.3)]


def test_every_batch_begins_anew_and_a_single_step_is_early(make, attention):
    make(arguments(0.7, 0.2, "linear"), n_iter=2)
    make(arguments(0.7, 0.2, "step"), steps=1)
    assert attention.tokens == [left(0.7), left(0.2)] * 2 + [left(0.7)]


# However it ends


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_in_the_unet_leaves_nothing(host, make, merged, at):
    with failing_unet(host, at), pytest.raises(ValueError, match="on purpose"):
        make(ON, n_iter=2)
    assert hooked(host.sd_model) == []
    assert pixels(make(ON)) == merged


@pytest.mark.parametrize("how", ["interrupt", "skip", "stop_generating"])
def test_a_generation_that_is_ended_leaves_nothing(host, make, merged, on_denoised, how):
    from modules import script_callbacks, shared

    def end(_):
        getattr(shared.state, how)()

    on_denoised(end)
    assert make(ON, n_iter=2, steps=4).images
    script_callbacks.remove_callbacks_for_function(end)
    assert hooked(host.sd_model) == []
    assert pixels(make(ON)) == merged


def test_between_generations_nothing_is_attached(host, make, add_script):
    """Other scripts' `postprocess_image`, say, may run the model: it finds it as it was."""
    hooks = []
    add_script(
        **{
            name: lambda *args, **kwargs: hooks.append(hooked(host.sd_model))
            for name in (
                "process_batch",
                "post_sample",
                "postprocess_batch",
                "postprocess_image",
                "postprocess",
            )
        }
    )
    make(ON, n_iter=2)
    assert hooks == [[]] * 9


def test_unloading_scripts_ends_merging_at_once(make, on_denoised, attention):
    from modules import script_callbacks

    on_denoised(lambda _: script_callbacks.script_unloaded_callback())
    make(ON, steps=3)
    assert attention.tokens == [HALF, FULL, FULL]


# Other extensions


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "name", ["before_process", "process", "process_batch", "before_hr", "postprocess"]
)
def test_an_exception_in_another_script_changes_nothing(make, add_script, merged, first, name):
    hires = HIRES if name == "before_hr" else {}
    expected = pixels(make(ON, **hires)) if hires else merged
    add_script(first, **{name: fail})
    assert pixels(make(ON, **hires)) == expected


def wrapper(log):
    """Wraps `p.sample` on the instance as other extensions do, and takes itself off."""

    def wrap(p, *_, **__):
        before, own = p.sample, vars(p).get("sample")

        def sample(*args, **kwargs):
            log.append("begins")
            try:
                return before(*args, **kwargs)
            finally:
                log.append("ends")
                if own is None:
                    del p.sample
                else:
                    p.sample = own

        p.sample = sample

    return wrap


def test_another_script_may_wrap_sample_before(make, add_script, merged):
    log = []
    add_script(before_process_batch=wrapper(log))
    processed = make(ON, n_iter=2)
    assert processed.images[1].tobytes() == merged[0]
    assert log == ["begins", "ends"] * 2


def test_another_script_may_wrap_sample_after(host, make_p, add_script, attention, process):
    """It puts back what was there: ours, which is spent by then, does nothing, and does not pile
    up."""
    log = []
    add_script(process_batch=wrapper(log))
    p = make_p(ON, n_iter=3, steps=1)
    processed = process(p)
    assert attention.tokens == [HALF] * 3
    assert log == ["begins", "ends"] * 3
    assert processed.comments.count("ToMe") == 1
    assert not hasattr(getattr(p.sample, "__wrapped__", None), "__wrapped__")
    p.script_args = host.script_args([False])
    process(p)
    assert attention.tokens[3:] == [FULL] * 3
    vars(p).pop("sample", None)


def test_a_wrapper_that_is_put_on_before_and_stays_survives(make, add_script, merged):
    log = []

    def wrap(p):
        before = p.sample
        p.sample = lambda *args, **kwargs: log.append("sampled") or before(*args, **kwargs)

    names = []
    add_script(
        before_process=wrap, postprocess=lambda p, *_: names.append(vars(p).pop("sample").__name__)
    )
    assert make(ON, n_iter=2).images[1].tobytes() == merged[0]
    assert log == ["sampled"] * 2
    assert names == ["<lambda>"]


def test_sampling_twice_in_one_batch_merges_what_it_was_bound_to(make, add_script, attention):
    """Whoever wrapped ours and samples once more gets an unmerged second run, never one that is
    half taken off."""

    def wrap(p, *_, **__):
        before = p.sample

        def sample(*args, **kwargs):
            before(*args, **kwargs)
            del p.sample
            return before(*args, **kwargs)

        p.sample = sample

    add_script(process_batch=wrap)
    make(ON)
    assert attention.tokens == [HALF] * 2 + [FULL] * 2


def test_a_batch_that_fails_before_sampling_leaves_no_wrapped_sample(
    host, make_p, attention, process
):
    """Loops reuse `p`: switched off, the next run of it does not merge."""
    p = make_p(ON)
    p.setup_conds = fail
    with pytest.raises(ValueError, match="on purpose"):
        process(p)
    del p.setup_conds
    p.script_args = host.script_args([False])
    process(p)
    assert attention.tokens == [FULL] * 2


@pytest.fixture
def once(on_denoised):
    """Does something after the next evaluation of the model, and then no more."""
    from modules import script_callbacks

    def do(action):
        def act(_):
            script_callbacks.remove_callbacks_for_function(act)
            action()

        on_denoised(act)

    return do


@pytest.fixture
def inside(once):
    """Generates in the middle of another generation, whose state stays what it was."""
    from modules import shared

    def generate(action):
        def keep_state():
            state = dict(vars(shared.state))
            action()
            vars(shared.state).update(state)

        once(keep_state)

    return generate


@pytest.mark.parametrize(
    "inner", [None, [False], [{"ratio": 0.7}]], ids=["without scripts", "off", "on"]
)
@pytest.mark.parametrize("ends", ["made", "interrupted", "failed"])
def test_a_generation_inside_another(
    host, make, make_p, once, inside, attention, merged, inner, ends, process
):
    """As ADetailer's and others': the inner one merges as it says itself, and the outer one goes
    on."""
    from modules import shared

    def generate():
        p = make_p(inner, seed=5)
        if ends == "interrupted":
            once(shared.state.interrupt)
        if ends != "failed":
            process(p)
            return
        with failing_unet(host, at=1), pytest.raises(ValueError, match="on purpose"):
            process(p)

    attention.tokens.clear()
    inside(generate)
    processed = make(ON)
    ratio = inner[0]["ratio"] if inner and inner[0] else 0.0
    assert attention.tokens == [HALF] + [left(ratio)] * (2 if ends == "made" else 1) + [HALF]
    assert pixels(processed) == merged
    assert "1024 → 512 tokens" in processed.comments


def test_a_generation_inside_another_where_webui_does_not_say_whose_a_step_is(
    make, make_p, inside, attention, process
):
    """Before 1.8."""
    from modules import script_callbacks

    def forget(params):
        del params.denoiser

    inside(lambda: process(make_p(None, seed=5)))
    script_callbacks.on_cfg_denoiser(forget)
    callbacks = script_callbacks.callback_map["cfg_denoiser"]
    callbacks.insert(0, callbacks.pop())
    try:
        make(ON)
    finally:
        script_callbacks.remove_callbacks_for_function(forget)
    assert attention.tokens == [HALF, FULL, FULL, HALF]


# A picture of its own from a copy of `p`, which takes along what is on `p` at that time


@pytest.fixture
def copying(add_script, inside):
    """Lets another extension make a small picture from a copy of p, once, at some point of every
    batch."""
    from modules import processing

    def copy_when(when, scripts=lambda p: None):
        pictures = []

        def make_one(p):
            inner = copy(p)
            inner.is_a_copy = True
            inner.width, inner.height, inner.n_iter = 8, 8, 1
            inner.scripts = scripts(p)
            if when == "with a wrapper of its own":
                wrapper([])(inner)
            pictures.append(processing.process_images(inner))

        def process_batch(p, *_, **__):
            if getattr(p, "is_a_copy", False):
                return
            if when == "while it is sampled":
                inside(lambda: make_one(p))
            else:
                make_one(p)

        add_script(process_batch=process_batch)
        return pictures

    return copy_when


@pytest.mark.parametrize(
    "when", ["before it is sampled", "with a wrapper of its own", "while it is sampled"]
)
def test_a_copy_of_p_makes_its_own_picture_unmerged(make, copying, attention, merged, when):
    pictures = copying(when)
    make()
    attention.tokens.clear()
    processed = make(ON, n_iter=2, steps=2)
    without, *with_merging = pictures
    assert without.images[0].size == (8, 8)
    assert [pixels(one) for one in with_merging] == [pixels(without)] * 2
    assert all(keys_of(one) == {} and "ToMe" not in one.comments for one in with_merging)
    assert attention.tokens.count(8 * 8) == 4 and attention.tokens.count(HALF) == 4
    assert processed.images[1].tobytes() == merged[0]
    assert "ToMe ratio: 0.5" in processed.infotexts[1] and "1024 → 512 tokens" in processed.comments


@pytest.mark.parametrize("when", ["before_process", "process", "postprocess_image"])
@pytest.mark.parametrize("own_merging", [0.0, 0.4])
def test_a_copy_of_p_made_at_any_time_claims_no_merging(
    make, add_script, attention, merged, when, own_merging
):
    """Before ours is bound to a batch and after it was; WebUI's own merging is on for the copy as
    for any picture."""
    from modules import processing, shared

    if own_merging:
        pytest.importorskip("tomesd")
    shared.opts.data["token_merging_ratio"] = own_merging
    pictures = []

    def make_one(p, *_, **__):
        inner = copy(p)
        inner.width, inner.height, inner.scripts = 16, 16, None
        state = dict(vars(shared.state))
        pictures.append(processing.process_images(inner))
        vars(shared.state).update(state)

    add_script(**{when: make_one})
    processed = make(ON)
    (inner,) = pictures
    assert keys_of(inner) == {} and "ToMe" not in inner.comments
    assert ("Token merging ratio: 0.4" in inner.infotexts[0]) == bool(own_merging)
    assert pixels(processed) == merged
    assert keys_of(processed)["ToMe ratio"] == 0.5 and "1024 → 512 tokens" in processed.comments
    assert "Token merging ratio" not in processed.infotexts[0]
    assert HALF in attention.tokens


@pytest.mark.parametrize("when", ["before it is sampled", "while it is sampled"])
def test_a_copy_of_a_p_with_a_wrong_value_has_nothing_of_it(make, copying, when):
    """WebUI's own merging goes on in both: ours, which leaves it out elsewhere, has nothing to
    merge here."""
    from modules import shared

    pytest.importorskip("tomesd")
    shared.opts.data["token_merging_ratio"] = 0.4
    pictures = copying(when)
    without = make()
    processed = make([True, 9])
    (own_of_without, inner) = pictures
    assert keys_of(inner) == {} and "ToMe" not in inner.comments
    assert pixels(inner) == pixels(own_of_without)
    assert list(keys_of(processed)) == ["ToMe error"]
    assert pixels(processed) == pixels(without)
    assert all(
        "Token merging ratio: 0.4" in one.infotexts[0] for one in (without, processed, inner)
    )


@pytest.mark.parametrize("when", ["before it is sampled", "while it is sampled"])
def test_a_copy_of_p_for_which_the_script_runs_merges_as_that_says(
    make, copying, attention, merged, when
):
    pictures = copying(when, scripts=lambda p: p.scripts)
    processed = make(ON)
    (inner,) = pictures
    assert keys_of(inner) == {} and inner.images[0].size == (8, 8)
    assert "nothing merged: " in inner.comments, "64 tokens are too few to be worth it"
    assert keys_of(processed)["ToMe ratio"] == 0.5
    assert pixels(processed) == merged
    assert sorted(set(attention.tokens)) == [8 * 8, HALF]


# Plots and loops: copies of `p` share its dicts, and one `p` may be used again


@pytest.mark.parametrize("again", [copy, lambda p: p], ids=["a copy", "itself"])
def test_off_after_on_has_nothing_of_it(host, make_p, plain, attention, again, process):
    p = make_p(ON)
    on = again(p)
    assert "ToMe ratio" in keys_of(process(on))
    attention.tokens.clear()
    off = again(on)
    off.script_args = host.script_args([False])
    processed = process(off)
    assert keys_of(processed) == {}
    assert "get_token_merging_ratio" not in vars(off)
    assert "sample" not in vars(off)
    assert "ToMe" not in processed.comments
    assert pixels(processed) == plain
    assert attention.tokens == [FULL] * 2


def test_cells_with_other_values_and_a_wrong_one(host, make_p, plain, process):
    p, keys = make_p(ON), []
    for tome in (arguments(0.6, 0.3, "linear"), [True, 9], ON, [True, "abc"], [False]):
        p.script_args = host.script_args(tome)
        keys.append(keys_of(process(copy(p))))
    constant = {"ToMe ratio": 0.5, "ToMe schedule": "constant"}
    always = {"ToMe max downsample": 1, "ToMe rematch every": 1, "ToMe method": "paper"}
    linear = {"ToMe ratio": 0.6, "ToMe late ratio": 0.3, "ToMe schedule": "linear"}
    assert keys[0] == linear | always and keys[2] == constant | always and keys[4] == {}
    assert list(keys[1]) == list(keys[3]) == ["ToMe error"]


# Which model


def test_refiner_that_takes_over_the_module(host, make, attention):
    make(ON, refiner_checkpoint="twin", refiner_switch_at=0.5, steps=4, n_iter=2)
    assert attention.tokens == [HALF] * 8
    assert len(set(attention.unets)) == 1


@pytest.mark.parametrize("refiner", ["twin", "other"])
def test_refiner_beside_the_first_model(host, make, attention, refiner):
    """Both stay in memory: each merges in its part, and neither is hooked in the other's."""
    from modules import shared

    shared.opts.sd_checkpoints_limit = 2
    states = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: (
            states.append({unet: bool(hooked(unet)) for unet in attention.unets})
            if type(module).__name__ == "CrossAttention"
            else None
        )
    )
    processed = make(ON, refiner_checkpoint=refiner, refiner_switch_at=0.5, steps=4)
    handle.remove()
    assert attention.tokens == [HALF] * 4
    first, second = dict.fromkeys(attention.unets)
    assert attention.unets[0] is first and attention.unets[-1] is second
    assert states[-1] == {first: False, second: True}
    assert [hooked(first), hooked(second)] == [[], []]
    assert processed.comments.count("self-attention layers") == (1 if refiner == "twin" else 2)
    # Both halves merged alike: it must not read as half of the steps.
    assert ("2 of 2 steps (2 times)" in processed.comments) == (refiner == "twin")


def test_refiner_that_throws_the_first_model_away(host, make, attention):
    make(ON, refiner_checkpoint="other", refiner_switch_at=0.5, steps=4, n_iter=2)
    assert attention.tokens == [HALF] * 8
    assert {name for unet in attention.unets for name in hooked(unet)} == set()


def test_hires_fix_with_a_checkpoint_of_its_own(make, attention):
    processed = make(ON, hr_checkpoint_name="other", **HIRES)
    assert attention.tokens == [HALF] * 2 + [left(0.5, HIRES_TOKENS)] * 2
    assert attention.unets[0] is not attention.unets[-1]
    assert processed.comments.count("self-attention layers") == 2


def test_a_hires_pass_merges_whose_first_pass_has_no_such_layers(make, attention):
    joint = {
        "override_settings": {"sd_model_checkpoint": "joint"},
        "hr_checkpoint_name": "base",
        **HIRES,
    }
    expected = make(None, **joint)
    attention.tokens.clear()
    processed = make(ON, **joint)
    assert attention.tokens == [left(0.5, HIRES_TOKENS)] * 2
    assert pixels(processed) != pixels(expected)
    why_not = (
        "first pass: nothing merged: this model has no self-attention layers that can be merged; "
    )
    assert f"ToMe: {why_not}hires pass: " in processed.comments
    assert keys_of(processed)["ToMe ratio"] == 0.5


def test_another_checkpoint_in_the_next_picture(make, attention, merged):
    attention.tokens.clear()
    for name in ("other", "base", "twin", "base"):
        picture = pixels(make(ON, override_settings={"sd_model_checkpoint": name}))
        assert (picture == merged) == (name == "base")
    assert attention.tokens == [HALF] * 8


def test_nothing_holds_a_replaced_model(host, make, loaded):
    """Once another checkpoint was loaded, the first is free, with the merging that it had."""
    import gc
    import weakref

    from modules import shared

    make(ON)
    unet = weakref.ref(host.sd_model.model.diffusion_model)
    shared.opts.sd_model_checkpoint = "other"
    make(ON)
    gc.collect()
    assert unet() is None


def test_a_model_without_such_layers(make, log_lines):
    joint = {"override_settings": {"sd_model_checkpoint": "joint"}}
    expected = make(None, **joint)
    processed = make(ON, **joint)
    assert pixels(processed) == pixels(expected)
    why = "nothing merged: this model has no self-attention layers that can be merged"
    assert processed.comments == f"ToMe: {why}\n"
    assert log_lines == [why]


def test_another_unet_in_its_place(make, monkeypatch):
    from modules import sd_unet

    monkeypatch.setattr(
        sd_unet, "current_unet", SimpleNamespace(forward=lambda x, *_, **__: torch.zeros_like(x))
    )
    expected = make()
    processed = make(ON)
    assert pixels(processed) == pixels(expected)
    assert (
        "nothing merged: the model's own attention layers did not run: the UNet was replaced"
        in processed.comments
    )


def test_layers_that_hypertile_tiles_are_left_to_it_and_this_is_said(host, make, log_lines):
    attentions = [module.attn1 for module in host.sd_model.modules() if hasattr(module, "attn1")]
    tiling = SimpleNamespace(enabled=True)
    try:
        setattr(attentions[0], "__webui_hypertile_params", tiling)
        make(ON)
        for attention in attentions:
            setattr(attention, "__webui_hypertile_params", tiling)
        make(ON)
        tiling.enabled = False
        make(ON)
    finally:
        for attention in attentions:
            delattr(attention, "__webui_hypertile_params")
    some, nothing, off = map(untimed, log_lines)
    assert (
        some
        == "2 of 4 self-attention layers, 1024 → 512 tokens, 2 of 2 steps; 1 left out: tiled by Hypertile"
    )
    assert nothing.startswith("nothing merged: ") and "tiled by Hypertile" in nothing
    assert off == "3 of 4 self-attention layers, 1024 → 512 tokens, 2 of 2 steps"


# WebUI's own token merging


@pytest.fixture
def blocks(host, on_denoised):
    """The classes of the transformer blocks in each evaluation."""
    kinds = []
    on_denoised(
        lambda _: kinds.append(
            {type(m).__name__ for m in host.sd_model.modules() if hasattr(m, "attn1")}
        )
    )
    return kinds


@pytest.fixture
def own_merging():
    """WebUI's own token merging, switched on for everything."""
    pytest.importorskip("tomesd")
    from modules import shared

    for name in ("token_merging_ratio", "token_merging_ratio_img2img", "token_merging_ratio_hr"):
        shared.opts.data[name] = 0.4
    return dict(shared.opts.data)


@pytest.mark.parametrize(
    ("tab", "fields"),
    [
        ("txt2img", {}),
        ("txt2img", HIRES),
        ("img2img", {"init_images": [Image.new("RGB", (32, 32))]}),
    ],
    ids=["one pass", "hires", "img2img"],
)
def test_webuis_own_merging_is_left_out(
    make, own_merging, blocks, attention, add_script, sampling, tab, fields
):
    from modules import shared

    ratios = []
    add_script(
        process_batch=lambda p, **_: ratios.append(
            [p.get_token_merging_ratio(for_hr=hr) for hr in (False, True)]
        )
    )
    processed = make(ON, tab, **fields)
    assert ratios == [[0, 0]]
    assert set().union(*blocks) == {"BasicTransformerBlock"}
    assert attention.tokens[0] == HALF
    assert "Token merging ratio" not in processed.infotexts[0]
    assert "WebUI's own token merging is left out" in processed.comments
    assert untimed(sampling.generation.last.summary).endswith(
        "WebUI's own token merging is left out"
    )
    assert shared.opts.data == own_merging


@pytest.mark.parametrize("tome", [None, [False], [True, "abc"], arguments(apply_to="hires pass")])
def test_webuis_own_merging_works_where_ours_does_nothing(make, own_merging, blocks, tome):
    make(ON)
    blocks.clear()
    processed = make(tome)
    assert blocks == [{"ToMeBlock"}] * 2
    assert "Token merging ratio: 0.4" in processed.infotexts[0]


def test_webuis_own_merging_wins_where_the_settings_say_so(make, own_merging, blocks):
    from modules import shared

    shared.opts.data["tome_overrule_built_in"] = False
    processed = make(ON)
    assert blocks == [{"ToMeBlock"}] * 2
    assert keys_of(processed) == {}
    assert "nothing merged: WebUI's own token merging is on" in processed.comments


def test_webuis_own_merging_is_as_it_was_after_a_failure(host, make, own_merging, blocks):
    from modules import shared

    with failing_unet(host), pytest.raises(ValueError, match="on purpose"):
        make(ON)
    assert shared.opts.data == own_merging
    blocks.clear()
    assert "Token merging ratio: 0.4" in make().infotexts[0]
    assert blocks == [{"ToMeBlock"}] * 2


# Wrong values


@pytest.mark.parametrize(
    ("tome", "words"),
    [
        ([True, 1.5], ["ratio", "1.5", "[0, 0.9375]"]),
        ([True, "abc"], ["ratio", "'abc'", "[0, 0.9375]"]),
        ([True, math.nan], ["ratio", "nan", "[0, 0.9375]"]),
        ([True, 10**400], ["ratio", "inf", "[0, 0.9375]"]),
        ([True, [0.5]], ["ratio", "[0.5]", "[0, 0.9375]"]),
        ([True, {"ratio": {}}], ["ratio", "{}"]),
        (arguments(late=2, schedule="linear"), ["late_ratio", "2", "[0, 0.9375]"]),
        (arguments(schedule="zigzag"), ["schedule", "'zigzag'", "constant, linear, step"]),
        (arguments(schedule=["step"]), ["schedule", "['step']", "constant, linear, step"]),
        (arguments(switch_at=-1), ["switch_at", "-1", "[0, 1]"]),
        (arguments(level=3), ["max_downsample", "3", "1, 2, 4, 8"]),
        (arguments(least=-1), ["min_tokens", "-1", "[0, 65536]"]),
        (
            arguments(apply_to="no pass"),
            ["apply_to", "'no pass'", "both passes, first pass, hires pass"],
        ),
        (["yes"], ["enabled", "'yes'", "true or false"]),
        ([1, 0.5], ["enabled", "1", "true or false"]),
        ([{"ratio": 2}], ["ratio", "2", "[0, 0.9375]"]),
        ([{"rato": 0.5}], ["unknown setting", "'rato'", "late_ratio"]),
        ([{"stride": [2, 2]}], ["unknown setting", "'stride'"]),
        ([{"enabled": "yes"}], ["enabled", "'yes'", "true or false"]),
        ([{"preset": "No such"}], ["preset", "No such", "Balanced"]),
        ([{"preset": ["Fast"]}], ["preset", "['Fast']"]),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, list) else None,
)
def test_a_wrong_value_leaves_the_picture_unmerged_and_is_said(
    make, one_step, log_lines, attention, tome, words
):
    processed = make(tome, steps=1)
    assert pixels(processed) == one_step
    assert set(attention.tokens) == {FULL}
    keys = keys_of(processed)
    assert list(keys) == ["ToMe error"]
    assert all(word in keys["ToMe error"] for word in words)
    assert processed.comments == f"ToMe: nothing merged: {keys['ToMe error']}\n"
    assert log_lines == [f"nothing merged: {keys['ToMe error']}"]


@pytest.mark.parametrize(
    "tome",
    [
        [True, 0.5, 0, "constant", 1, 1.0, 0.0, "both passes", 1.0, "paper"],
        arguments(late=0.9),
        [*arguments(), 0, 1, 1, *["too", "many"] * 20],
    ],
    ids=["numbers of other types", "another value without effect", "more arguments than fields"],
)
def test_what_means_the_same_makes_the_same_picture(make, merged, tome):
    assert pixels(make(tome)) == merged


OF_0_1_0 = [True, 0.6, 0.4, "linear", 0.5, 1, 0, "both passes", 4]


@pytest.mark.parametrize(
    "args", [OF_0_1_0, [*OF_0_1_0, 0, 1], [*OF_0_1_0, 1, 1]], ids=["9", "11", "a map"]
)
def test_a_list_of_version_0_1_0_means_what_it_meant(make, args):
    """It had one method, which is `paper`, and the map's two numbers behind the others."""
    processed, today = make(args), make([*OF_0_1_0, "paper"])
    assert processed.images[0].tobytes() == today.images[0].tobytes()
    assert keys_of(processed)["ToMe method"] == "paper" and keys_of(processed) == keys_of(today)
    assert len(processed.images) == 1 + (args[9:10] == [1])


@pytest.mark.parametrize("args", [[True], [True, 0.8], [True, 0.8, 0.7, "linear"]], ids=len)
def test_a_shorter_list_has_the_defaults_of_today(make, args):
    assert keys_of(make(args, steps=20))["ToMe method"] == "keys"


def test_choices_may_be_texts(make, merged):
    assert pixels(make([*HALVED[:5], "1", *HALVED[6:]])) == merged


def test_wrong_values_do_not_stop_hires_fix_or_img2img(make):
    assert "ToMe error" in keys_of(make([True, 9], **HIRES))
    assert "ToMe error" in keys_of(
        make([True, 9], "img2img", init_images=[Image.new("RGB", (32, 32))])
    )


# One object instead of positions


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ratio": 0.6},
        {"ratio": 0.6, "late_ratio": 0.3, "preset": None},
        {"ratio": 0.6, "late_ratio": 0.9},
        {"late_ratio": 0.3, "schedule": "constant"},
        {"enabled": True, "min_tokens": 512},
    ],
    ids=str,
)
def test_an_object_switches_on_and_missing_keys_are_defaults(make, given):
    names = [
        "ratio",
        "late_ratio",
        "schedule",
        "max_downsample",
        "reuse_steps",
        "method",
        *(given.keys() & FIELDS),
    ]
    values = {FIELDS[name].infotext: given.get(name, FIELDS[name].default) for name in names}
    # Who gives a late ratio wants it reached.
    if "late_ratio" in given and "schedule" not in given:
        values["ToMe schedule"] = "linear"
    # A ratio alone never merges more late than early.
    if "late_ratio" not in given:
        values["ToMe late ratio"] = min(values["ToMe ratio"], FIELDS["late_ratio"].default)
    if values["ToMe schedule"] == "constant":
        del values["ToMe late ratio"]
    assert keys_of(make([given], steps=1)) == values


def test_an_object_may_name_a_preset_and_change_it(make):
    preset = keys_of(make([{"preset": "Fast"}], steps=1))
    changed = keys_of(make([{"preset": "Fast", "ratio": 0.6}], steps=1))
    assert changed == {**preset, "ToMe ratio": 0.6}
    late = keys_of(make([{"preset": "Fast", "late_ratio": 0.6}], steps=1))
    assert late == {**preset, "ToMe schedule": "linear", "ToMe late ratio": 0.6}


# Off


class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"{name} was read")


def test_off_registers_no_hook_and_reads_nothing(host, make, sampling, monkeypatch, add_script):
    registered = []
    for name in [
        name for name in dir(nn.Module) if name.startswith("register_") and "hook" in name
    ]:
        before = getattr(nn.Module, name)

        def register(*args, before=before, **kwargs):
            registered.append(before.__name__)
            return before(*args, **kwargs)

        monkeypatch.setattr(nn.Module, name, register)
    wrapped = []
    add_script(process_batch=lambda p, **_: wrapped.append("sample" in vars(p)))
    # A model that is loaded, not sampled, may register what it likes.
    host.sd_model.state_dict()
    make([False], **HIRES)
    make(None)
    assert registered == []
    assert wrapped == [False, False]
    sampling.on_denoise(Untouchable())
    make(ON)
    assert registered, "the test sees them"


# Few steps


def test_steps_of_the_schedule_decide_how_much_a_picture_of_few_steps_merges(make, attention):
    """img2img takes the last steps of as many as are asked for, each as long as in them."""
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
