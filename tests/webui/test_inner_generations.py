"""Generations inside a generation, copies of `p`, and a `p` that is used again."""

from __future__ import annotations

import contextlib
from copy import copy

import pytest
from in_host import FULL, HALF, HALVED, arguments, failing_unet, keys_of, left, pixels, wrapper


@contextlib.contextmanager
def state_kept():
    """Restore the state of the job after a generation inside it."""
    from modules import shared

    state = dict(vars(shared.state))
    yield
    vars(shared.state).update(state)


@pytest.mark.parametrize(
    "inner", [None, [False], [{"ratio": 0.7}]], ids=["without scripts", "off", "on"]
)
@pytest.mark.parametrize("ends", ["made", "interrupted", "failed"])
def test_a_generation_inside_another(
    host, make, make_p, at_evaluation, attention, merged, inner, ends, process
):
    """As ADetailer does: each merges by its own settings."""
    from modules import shared

    @state_kept()
    def generate():
        p = make_p(inner, seed=5)
        if ends == "interrupted":
            at_evaluation(1, shared.state.interrupt)
        if ends != "failed":
            process(p)
            return
        with failing_unet(host, at=1), pytest.raises(ValueError, match="on purpose"):
            process(p)

    attention.tokens.clear()
    at_evaluation(1, generate)
    processed = make(HALVED)
    ratio = inner[0]["ratio"] if inner and inner[0] else 0.0
    assert attention.tokens == [HALF] + [left(ratio)] * (2 if ends == "made" else 1) + [HALF]
    assert pixels(processed) == merged
    assert "1024 → 512 tokens" in processed.comments


def test_a_generation_inside_another_without_a_denoiser(
    make, make_p, at_evaluation, attention, process
):
    """WebUI before 1.8 doesn't pass it to callbacks."""
    from modules import script_callbacks

    def without_denoiser(params):
        del params.denoiser

    @state_kept()
    def generate():
        process(make_p(None, seed=5))

    at_evaluation(1, generate)
    script_callbacks.on_cfg_denoiser(without_denoiser)
    callbacks = script_callbacks.callback_map["cfg_denoiser"]
    callbacks.insert(0, callbacks.pop())
    try:
        make(HALVED)
    finally:
        script_callbacks.remove_callbacks_for_function(without_denoiser)
    assert attention.tokens == [HALF, FULL, FULL, HALF]


@pytest.fixture
def copying(add_script, at_evaluation):
    """Let another extension make a small picture from a copy of `p`, in each batch or callback."""
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
            with state_kept():
                pictures.append(processing.process_images(inner))

        def callback(p, *_, **__):
            if getattr(p, "is_a_copy", False):
                return
            if when == "while it is sampled":
                at_evaluation(1, lambda: make_one(p))
            else:
                make_one(p)

        add_script(**{when if when in CALLBACKS else "process_batch": callback})
        return pictures

    return copy_when


CALLBACKS = ["before_process", "process", "postprocess_image"]
MOMENTS = ["before it is sampled", "with a wrapper of its own", "while it is sampled", *CALLBACKS]


@pytest.mark.parametrize("when", MOMENTS)
def test_a_copy_of_p_makes_its_own_picture_unmerged(make, copying, attention, merged, when):
    pictures = copying(when)
    make()
    attention.tokens.clear()
    processed = make(HALVED)
    without, inner = pictures
    assert without.images[0].size == (8, 8) and pixels(inner) == pixels(without)
    assert keys_of(inner) == {} and "ToMe" not in inner.comments
    assert attention.tokens.count(8 * 8) == 2 and attention.tokens.count(HALF) == 2
    assert pixels(processed) == merged
    assert keys_of(processed)["ToMe ratio"] == 0.5 and "1024 → 512 tokens" in processed.comments


@pytest.mark.parametrize("when", ["before it is sampled", "process", "postprocess_image"])
def test_webuis_own_merging_works_for_a_copy_of_p(make, copying, merged, own_merging, when):
    pictures = copying(when)
    processed = make(HALVED)
    (inner,) = pictures
    assert keys_of(inner) == {} and "Token merging ratio: 0.4" in inner.infotexts[0]
    assert pixels(processed) == merged
    assert "Token merging ratio" not in processed.infotexts[0]


@pytest.mark.parametrize("when", ["before it is sampled", "while it is sampled"])
def test_a_copy_of_a_p_with_a_wrong_value_reports_nothing(make, copying, own_merging, when):
    """WebUI's own merging works in both, since the extension merges in neither."""
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
def test_a_copy_of_p_whose_script_runs_merges_by_its_own_settings(
    make, copying, attention, merged, when
):
    pictures = copying(when, scripts=lambda p: p.scripts)
    processed = make(HALVED)
    (inner,) = pictures
    assert keys_of(inner) == {} and inner.images[0].size == (8, 8)
    assert "nothing merged" in inner.comments, "64 tokens are too few"
    assert keys_of(processed)["ToMe ratio"] == 0.5
    assert pixels(processed) == merged
    assert sorted(set(attention.tokens)) == [8 * 8, HALF]


@pytest.mark.parametrize("again", [copy, lambda p: p], ids=["a copy", "itself"])
def test_off_after_on_leaves_no_trace(host, make_p, plain, attention, again, process):
    p = make_p(HALVED)
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


def test_copies_with_other_arguments_have_their_own_parameters(host, make_p, process):
    p, keys = make_p(HALVED), []
    for tome in (arguments(0.6, 0.3, "linear"), [True, 9], HALVED, [True, "abc"], [False]):
        p.script_args = host.script_args(tome)
        keys.append(keys_of(process(copy(p))))
    constant = {"ToMe ratio": 0.5, "ToMe schedule": "constant"}
    always = {"ToMe max downsample": 1, "ToMe rematch every": 1, "ToMe method": "paper"}
    linear = {"ToMe ratio": 0.6, "ToMe late ratio": 0.3, "ToMe schedule": "linear"}
    assert keys[0] == linear | always and keys[2] == constant | always and keys[4] == {}
    assert list(keys[1]) == list(keys[3]) == ["ToMe error"]
