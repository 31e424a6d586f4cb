"""Merging that ends or fails in a generation: the picture is made, and what is claimed is true."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from in_host import FULL, HALF, HALVED, SIDE, left, pixels, running
from PIL import Image

KEYS_METHOD = [*HALVED[:-1], "keys"]


def claims(processed):
    keys = [key for key in processed.extra_generation_params if "ToMe" in key]
    assert all(("ToMe ratio" in text) == ("ToMe ratio" in keys) for text in processed.infotexts)
    return keys


@pytest.fixture
def blocks(host, blocks_of):
    """The transformer blocks of the model."""
    return [*blocks_of(host.sd_model).values()]


@pytest.fixture
def in_first_pass(blocks):
    """Call a function in the UNet's first pass, between two of its layers."""

    def call(function):
        def once(*_):
            handle.remove()
            function()

        handle = blocks[1].norm1.register_forward_pre_hook(once)

    return call


def test_reload_ui_during_a_pass_ends_merging_after_it(
    make, in_first_pass, at_evaluation, attention
):
    """A second one finds nothing to end."""
    from modules import script_callbacks

    def unload():
        thread = threading.Thread(target=script_callbacks.script_unloaded_callback)
        thread.start()
        thread.join()

    in_first_pass(unload)
    at_evaluation(2, unload)
    processed = make(KEYS_METHOD, steps=3)
    assert attention.tokens == [HALF, FULL, FULL]
    assert "1 of 1 steps" in processed.comments and "reloaded" in processed.comments
    assert claims(processed) == ["ToMe error"]


def test_a_copy_of_the_model_made_during_a_generation_works(host, make, in_first_pass):
    copies = []
    in_first_pass(lambda: copies.append(copy.deepcopy(host.sd_model.model.diffusion_model)))
    make(KEYS_METHOD)
    assert len(copies) == 1
    output = copies[0](torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.zeros(1, 4, 96))
    assert output.shape == (1, 3, 8, 8)


def test_after_a_failure_midway_the_parameters_claim_no_ratio(
    make, sampling, monkeypatch, log_lines
):
    set_step = sampling.Merging.set_step

    def fail(self, step, *total):
        if step == 1:
            raise LookupError("midway")
        set_step(self, step, *total)

    monkeypatch.setattr(sampling.Merging, "set_step", fail)
    processed = make(HALVED, steps=4)
    reason = "LookupError: midway"
    assert "1 of 1 steps" in processed.comments and reason in processed.comments
    assert claims(processed) == ["ToMe error"] and reason in processed.infotexts[0]
    assert any(reason in line for line in log_lines)
    monkeypatch.undo()
    assert "ToMe ratio" in claims(make(HALVED))


def test_only_the_batches_that_merged_claim_it(make, blocks, at_evaluation):
    """In the first of two batches another extension hooks every attention."""
    foreign = [block.attn1.register_forward_hook(lambda *_: None) for block in blocks]
    at_evaluation(2, lambda: [handle.remove() for handle in foreign])
    first, second = make(HALVED, n_iter=2).infotexts[-2:]
    assert "ToMe ratio" not in first and "ToMe ratio: 0.5" in second


def full():
    raise RuntimeError("CUDA out of memory. Tried to allocate 960.00 MiB")


def test_too_little_memory_in_a_projections_hook_costs_no_picture(make, plain, monkeypatch):
    heads = running("proportional").Heads
    pad = heads.pad
    monkeypatch.setattr(
        heads, "pad", lambda self, x, *rest: full() if x.shape[1] >= FULL else pad(self, x, *rest)
    )
    processed = make(KEYS_METHOD)
    assert pixels(processed) == plain
    assert "nothing merged" in processed.comments and "CUDA out of" in processed.comments
    assert claims(processed) == ["ToMe error"]
    monkeypatch.undo()
    assert "ToMe ratio" in claims(make(KEYS_METHOD))


def test_after_merged_attention_ran_out_of_memory_pictures_of_that_size_are_unmerged(
    make, plain, blocks, sampling, log_lines, monkeypatch
):
    kind = type(blocks[0].attn1)
    usual = kind.forward

    def forward(self, x, context=None, mask=None):
        merged = context is not None and context.shape[1] >= HALF
        return full() if merged else usual(self, x, context, mask)

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(RuntimeError, match="Tried to allocate 960"):
        make(KEYS_METHOD)
    assert any("out of memory" in line and "960.00 MiB" in line for line in log_lines)
    processed = make(KEYS_METHOD)
    assert pixels(processed) == plain and claims(processed) == []
    assert "nothing merged" in processed.comments and "out of memory" in processed.comments
    with pytest.raises(RuntimeError, match="Tried to allocate 960"):
        make(KEYS_METHOD, width=SIDE + 8)
    sampling.stop()
    monkeypatch.undo()
    assert "ToMe ratio" in claims(make(KEYS_METHOD))


def test_a_failing_map_recorder_costs_no_picture(make, plain, sampling, monkeypatch):
    monkeypatch.setattr(sampling.host, "prompted_items", lambda *_: [][0])
    processed = make([*HALVED, 1, 1])
    assert pixels(processed) == plain and claims(processed) == ["ToMe error"]


def alternative(p, *_):
    """Sample with another sampler, like WebUI's "img2img alternative test"."""
    from modules import sd_samplers

    def sample_extra(conditioning, unconditional_conditioning):
        p.sampler = sd_samplers.Sampler(p)
        own = sd_samplers.Sampler(p)
        return own.sample_img2img(
            p, p.init_latent, p.rng.next(), conditioning, unconditional_conditioning
        )

    p.sample = sample_extra


@pytest.mark.parametrize("says_whose", [True, False], ids=["1.8", "before 1.8"])
def test_a_script_with_a_sampler_of_its_own_merges(
    make, add_script, attention, monkeypatch, says_whose
):
    from modules import script_callbacks

    if not says_whose:
        kind = script_callbacks.CFGDenoiserParams
        monkeypatch.setattr(
            script_callbacks, "CFGDenoiserParams", lambda denoiser, **others: kind(**others)
        )
    add_script(before_process=alternative, postprocess=lambda p, *_: vars(p).pop("sample"))
    picture = Image.new("RGB", (SIDE, SIDE), "red")
    fields = {"init_images": [picture], "denoising_strength": 0.9, "steps": 4}
    processed = make([True, 0.5, 0.3, "linear", *HALVED[4:]], "img2img", **fields)
    assert attention.tokens[0] == HALF and attention.tokens[-1] == left(0.3)
    assert "ToMe ratio" in claims(processed) and "1024 → " in processed.comments


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("tome_log_level", "debug", "WARNING, INFO, DEBUG"),
        ("tome_log_level", None, "WARNING, INFO, DEBUG"),
        ("tome_log_level", ["INFO"], "WARNING, INFO, DEBUG"),
        ("tome_log_layers", "yes", "true or false"),
        ("tome_overrule_built_in", 1, "true or false"),
    ],
)
def test_an_option_of_a_wrong_kind_is_its_default_and_logged_once(
    host, make, merged, log_lines, name, value, allowed
):
    from modules import scripts, shared

    options = running("webui.options")
    shared.opts.data[name] = value
    host.reload_ui()
    assert scripts.scripts_txt2img.script("ToMe") is not None
    assert options.value_of(name) == options.OPTIONS[name].default
    assert pixels(make(HALVED)) == merged
    (line,) = [line for line in log_lines if name in line]
    assert allowed in line and repr(value) in line
    assert logging.getLogger("ToMe").level == logging.INFO
