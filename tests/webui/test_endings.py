"""However merging ends in a generation, the picture is made, and nothing that is said of it is
untrue."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading

import pytest
import torch
from in_host import HALVED, SIDE, left, pixels, running
from PIL import Image
from torch import nn

HALF, FULL = left(0.5), left(0.0)
WEIGHTED = [*HALVED[:-1], "keys"]


def claims(processed):
    keys = [key for key in processed.extra_generation_params if "ToMe" in key]
    assert all(("ToMe ratio" in text) == ("ToMe ratio" in keys) for text in processed.infotexts)
    return keys


@pytest.fixture
def in_first_pass(host):
    """Calls a function in the first pass of the UNet, between two of its layers."""
    with contextlib.ExitStack() as handles:

        def call(function):
            block = [
                module
                for module in host.sd_model.model.diffusion_model.modules()
                if hasattr(module, "attn1")
            ][1]
            calls = []

            def once(*_):
                if not calls:
                    calls.append(None)
                    function()

            handles.callback(block.norm1.register_forward_pre_hook(once).remove)

        yield call


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_reload_ui_in_the_middle_of_a_pass_lets_it_end_as_it_began(
    make, in_first_pass, sampling, attention
):
    in_first_pass(lambda: in_a_thread(sampling.stop))
    processed = make(WEIGHTED, steps=3)
    assert attention.tokens == [HALF, FULL, FULL]
    assert "1 of 1 steps; the UI was reloaded meanwhile" in processed.comments
    assert claims(processed) == ["ToMe error"]


def test_a_copy_of_the_model_made_while_a_generation_runs_works(host, make, in_first_pass):
    copies = []
    in_first_pass(lambda: copies.append(copy.deepcopy(host.sd_model.model.diffusion_model)))
    make(WEIGHTED)
    assert len(copies) == 1
    # What the test itself has put there calls nothing any more.
    assert copies[0](torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.zeros(1, 4, 96)).shape == (
        1,
        3,
        8,
        8,
    )


def test_a_failure_midway_is_in_the_summary_and_the_parameters_claim_no_ratio(
    make, sampling, monkeypatch, log_lines
):
    set_step = sampling.Merging.set_step

    def fail(self, step, *total):
        if step == 1:
            raise LookupError("midway")
        set_step(self, step, *total)

    monkeypatch.setattr(sampling.Merging, "set_step", fail)
    processed = make(HALVED, steps=4)
    reason = "merging failed (LookupError: midway)"
    assert f"1 of 1 steps; {reason}" in processed.comments
    assert claims(processed) == ["ToMe error"] and reason in processed.infotexts[0]
    assert sum(reason in line for line in log_lines if "Traceback" not in line) >= 1
    monkeypatch.undo()
    assert "ToMe ratio" in claims(make(HALVED))


def test_a_batch_in_which_nothing_merged_claims_nothing_and_the_next_one_does(
    make, host, monkeypatch
):
    """As in generations of several batches, of which one fails."""
    layers = running("layer_hooks")
    merge, passes = layers.LayerHooks._merge, []

    def fail_in_the_first_batch(self, attention, inputs):
        if len(passes) < 2:
            raise layers.NotMerged("on purpose")
        return merge(self, attention, inputs)

    monkeypatch.setattr(layers.LayerHooks, "_merge", fail_in_the_first_batch)
    handle = host.sd_model.model.diffusion_model.register_forward_hook(
        lambda *_: passes.append(None)
    )
    processed = make(HALVED, n_iter=2)
    handle.remove()
    first, second = processed.infotexts[-2:]
    assert "ToMe ratio" not in first and "ToMe ratio: 0.5" in second


def full(message="CUDA out of memory. Tried to allocate 960.00 MiB"):
    raise RuntimeError(message)


def test_memory_that_a_hook_on_the_projections_lacks_costs_no_picture(
    make, plain, merged, monkeypatch
):
    heads = running("proportional").Heads
    pad = heads.pad
    monkeypatch.setattr(
        heads, "pad", lambda self, x, *rest: full() if x.shape[1] >= FULL else pad(self, x, *rest)
    )
    processed = make(WEIGHTED)
    assert pixels(processed) == plain
    assert "nothing merged" in processed.comments
    assert "merging failed: RuntimeError: CUDA out of" in processed.comments
    assert claims(processed) == ["ToMe error"]
    monkeypatch.undo()
    assert "ToMe ratio" in claims(make(WEIGHTED))


@pytest.fixture
def lacking(host, monkeypatch):
    """An attention that lacks memory over merged keys."""
    kind = type(
        next(m for m in host.sd_model.model.diffusion_model.modules() if hasattr(m, "attn1")).attn1
    )
    usual = kind.forward

    def forward(self, x, context=None, mask=None):
        if context is not None and context.shape[1] >= HALF:
            full()
        return usual(self, x, context, mask)

    monkeypatch.setattr(kind, "forward", forward)


def test_memory_that_merged_attention_itself_lacks_is_webuis_error_and_the_next_picture_runs_unmerged(
    make, plain, lacking, attention, sampling, log_lines, monkeypatch
):
    with pytest.raises(RuntimeError, match="Tried to allocate 960"):
        make(WEIGHTED)
    assert any("ran out of memory" in line and "960.00 MiB" in line for line in log_lines)
    processed = make(WEIGHTED)
    assert pixels(processed) == plain and claims(processed) == []
    assert "nothing merged: merged attention ran out of memory at this size" in processed.comments
    with pytest.raises(RuntimeError, match="Tried to allocate 960"):
        make(WEIGHTED, width=SIDE + 8)
    sampling.stop()
    monkeypatch.undo()
    assert "ToMe ratio" in claims(make(WEIGHTED))


def test_a_recorder_that_fails_costs_no_picture(make, plain, sampling, monkeypatch):
    monkeypatch.setattr(sampling.host, "prompted_items", lambda *_: [][0])
    processed = make([*HALVED, 1, 1])
    assert pixels(processed) == plain and claims(processed) == ["ToMe error"]


def alternative(p, *_):
    """As WebUI's "img2img alternative test": it samples with a sampler of its own."""
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
    fields = {
        "init_images": [Image.new("RGB", (SIDE, SIDE), "red")],
        "denoising_strength": 0.9,
        "steps": 4,
    }
    processed = make([True, 0.5, 0.3, "linear", *HALVED[4:]], "img2img", **fields)
    assert attention.tokens[0] == HALF and attention.tokens[-1] == left(0.3)
    assert "ToMe ratio" in claims(processed) and "1024 → " in processed.comments


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("tome_log_level", "debug", "one of WARNING, INFO, DEBUG"),
        ("tome_log_level", None, "one of WARNING, INFO, DEBUG"),
        ("tome_log_level", ["INFO"], "one of WARNING, INFO, DEBUG"),
        ("tome_log_layers", "yes", "true or false"),
        ("tome_overrule_built_in", 1, "true or false"),
    ],
)
def test_an_option_of_a_wrong_kind_is_its_default_and_is_said_once(
    make, merged, log_lines, name, value, allowed
):
    from modules import shared

    options = running("webui.options")
    options._wrong.clear()
    shared.opts.data[name] = value
    options.apply_log_level()
    assert options.option(name) == options.OPTIONS[name][0]
    assert pixels(make(HALVED)) == merged
    assert sum(f"{name} must be {allowed}, got {value!r}" in line for line in log_lines) == 1
    assert logging.getLogger("ToMe").level == logging.INFO


def test_a_wrong_log_level_in_config_json_lets_the_extension_load(host, log_lines):
    from modules import scripts, shared

    shared.opts.data["tome_log_level"] = "debug"
    host.reload_ui()
    assert scripts.scripts_txt2img.script("ToMe") is not None
    shared.opts.reset()


def test_a_module_in_the_place_of_attention_is_left_whole(host, make, plain):
    class Sharing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.heads, self.inner = inner.heads, [inner]

        def forward(self, x, context=None, mask=None):
            return self.inner[0](
                x + {FULL: 0.0, FULL // 4: 0.0}[x.shape[1]], context=context, mask=mask
            )

    blocks = [
        module
        for module in host.sd_model.model.diffusion_model.modules()
        if hasattr(module, "attn1")
    ]
    usual = [block.attn1 for block in blocks]
    for block in blocks:
        block.attn1 = Sharing(block.attn1)
    for method in ("keys", "tokens", "paper"):
        processed = make([*HALVED[:-1], method])
        assert pixels(processed) == plain and claims(processed) == []
        assert f"left to {__name__}, which replaces attn1" in processed.comments
    for block, attention in zip(blocks, usual, strict=True):
        block.attn1 = attention
