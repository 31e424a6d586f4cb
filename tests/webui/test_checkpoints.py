"""The model that is sampled: refiners, hires checkpoints, replaced and other UNets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from in_host import HALF, HALVED, HIRES, HIRES_TOKENS, hooked, keys_of, left, pixels
from torch import nn


@pytest.mark.parametrize("refiner", ["twin", "other"])
def test_refiner_that_takes_the_first_models_place(make, attention, refiner):
    """One of the same shape takes over the module, too."""
    make(HALVED, refiner_checkpoint=refiner, refiner_switch_at=0.5, steps=4, n_iter=2)
    assert attention.tokens == [HALF] * 8
    assert (len(set(attention.unets)) == 1) == (refiner == "twin")
    assert {name for unet in attention.unets for name in hooked(unet)} == set()


@pytest.mark.parametrize("refiner", ["twin", "other"])
def test_refiner_that_stays_next_to_the_first_model(make, attention, refiner):
    """Both stay in memory, and each is hooked in its own part only."""
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
    processed = make(HALVED, refiner_checkpoint=refiner, refiner_switch_at=0.5, steps=4)
    handle.remove()
    assert attention.tokens == [HALF] * 4
    first, second = dict.fromkeys(attention.unets)
    assert attention.unets[0] is first and attention.unets[-1] is second
    assert states[-1] == {first: False, second: True}
    assert [hooked(first), hooked(second)] == [[], []]
    assert processed.comments.count("self-attention layers") == (1 if refiner == "twin" else 2)
    # Equal halves are reported as two runs of two steps, not as half of the steps.
    assert ("2 of 2 steps (2 times)" in processed.comments) == (refiner == "twin")


def test_hires_fix_with_a_checkpoint_of_its_own(make, attention):
    processed = make(HALVED, hr_checkpoint_name="other", **HIRES)
    assert attention.tokens == [HALF] * 2 + [left(0.5, HIRES_TOKENS)] * 2
    assert attention.unets[0] is not attention.unets[-1]
    assert processed.comments.count("self-attention layers") == 2


def test_a_hires_pass_merges_after_a_first_pass_without_mergeable_layers(make, attention):
    joint = {
        "override_settings": {"sd_model_checkpoint": "joint"},
        "hr_checkpoint_name": "base",
        **HIRES,
    }
    expected = make(None, **joint)
    attention.tokens.clear()
    processed = make(HALVED, **joint)
    assert attention.tokens == [left(0.5, HIRES_TOKENS)] * 2
    assert pixels(processed) != pixels(expected)
    first, _, second = processed.comments.partition("hires pass: ")
    assert "first pass: nothing merged" in first and "no self-attention layers" in first
    assert "3 of 4" in second
    assert keys_of(processed)["ToMe ratio"] == 0.5


def test_another_checkpoint_in_the_next_picture(make, attention, merged):
    attention.tokens.clear()
    for name in ("other", "base", "twin", "base"):
        picture = pixels(make(HALVED, override_settings={"sd_model_checkpoint": name}))
        assert (picture == merged) == (name == "base")
    assert attention.tokens == [HALF] * 8


def test_a_replaced_model_is_freed(host, make):
    import gc
    import weakref

    from modules import shared

    make(HALVED)
    unet = weakref.ref(host.sd_model.model.diffusion_model)
    shared.opts.sd_model_checkpoint = "other"
    make(HALVED)
    gc.collect()
    assert unet() is None


def test_a_model_without_mergeable_layers(make, log_lines):
    joint = {"override_settings": {"sd_model_checkpoint": "joint"}}
    expected = make(None, **joint)
    processed = make(HALVED, **joint)
    assert pixels(processed) == pixels(expected)
    (line,) = log_lines
    assert processed.comments == f"ToMe: {line}\n"
    assert "nothing merged" in line and "no self-attention layers" in line


def test_a_replaced_unet(make, monkeypatch):
    from modules import sd_unet

    monkeypatch.setattr(
        sd_unet, "current_unet", SimpleNamespace(forward=lambda x, *_, **__: torch.zeros_like(x))
    )
    expected = make()
    processed = make(HALVED)
    assert pixels(processed) == pixels(expected)
    assert "nothing merged" in processed.comments and "UNet was replaced" in processed.comments


def test_layers_that_hypertile_tiles_are_not_merged(host, make, log_lines, blocks_of, monkeypatch):
    tiling = SimpleNamespace(enabled=True)
    first, *others = blocks_of(host.sd_model).values()
    for blocks in ([first], others):
        for block in blocks:
            monkeypatch.setattr(block.attn1, "__webui_hypertile_params", tiling, raising=False)
        make(HALVED)
    tiling.enabled = False
    make(HALVED)
    some, nothing, off = log_lines
    assert "2 of 4" in some and "Hypertile" in some
    assert "nothing merged" in nothing and "Hypertile" in nothing
    assert "3 of 4" in off and "Hypertile" not in off


def test_layers_whose_hypertile_is_switched_off_again_merge(host, make, log_lines):
    code = {"__name__": "hypertile"}
    exec("def wrap(inner):\n    return lambda *args, **kwargs: inner(*args, **kwargs)", code)
    attentions = [m for m in host.sd_model.modules() if type(m).__name__ == "CrossAttention"]
    for attention in attentions:
        attention.forward = code["wrap"](attention.forward)
    try:
        make(HALVED)
    finally:
        for attention in attentions:
            del attention.forward
    assert "3 of 4" in log_lines[-1]
