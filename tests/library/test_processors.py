"""Attention processors, IP-Adapter, fused projections and LoRA of diffusers."""

from __future__ import annotations

import peft
import pytest
import torch
from diffusers.models import attention_processor
from torch import nn

import tomesd_core as tome
from tomesd_core.probe import PROBE_TOKENS, forget_heads
from tomesd_core.settings import METHODS
from tomesd_core.unet import find_layers


class Twice:
    """A processor that attends to the keys of both items of the batch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        k, v = (torch.cat([one, one.flip(0)], dim=1) for one in (k, v))
        q, k, v = (one.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for one in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class NoProjections:
    """A processor whose output doesn't depend on the projections."""

    def __call__(self, attn, hidden_states, **others):
        return hidden_states


def test_each_processor_type_is_probed_once(make_unet, run, settings, monkeypatch):
    unet, lengths = make_unet(), []
    kinds = attention_processor.AttnProcessor2_0, attention_processor.AttnProcessor
    for kind in kinds:

        def call(self, attn, hidden_states, *args, usual=kind.__call__, **kwargs):
            lengths.append(hidden_states.shape[1])
            return usual(self, attn, hidden_states, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", call)
    forget_heads()
    for make in (*kinds, kinds[0]):
        unet.set_attn_processor(make())
        with tome.attach(unet, settings()):
            run(unet)
            run(unet)
    assert lengths.count(PROBE_TOKENS) == 2


def test_a_processor_that_is_changed_while_attached(make_unet, run, settings):
    unet = make_unet()
    with tome.attach(unet, settings()) as merging:
        first = run(unet)
        unet.set_attn_processor(attention_processor.AttnProcessor())
        second = run(unet)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert merging.report().merged_steps == 2


@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_an_unknown_processor_that_uses_the_projections_is_merged(make_unet, run, settings, method):
    unet = make_unet()
    unet.set_attn_processor(Twice())
    off = run(unet)
    with tome.attach(unet, settings(method)) as merging:
        on = run(unet)
    assert len(merging.report().merged_layers) == 3 and (on - off).norm() < 0.2 * off.norm()


def test_a_processor_without_projections_is_not_merged(make_unet, run, settings):
    unet = make_unet()
    unet.set_attn_processor(NoProjections())
    off = run(unet)
    with tome.attach(unet, settings()) as merging:
        assert torch.equal(run(unet), off)
    assert "nothing merged" in merging.report().summary and "scale" in merging.report().summary


def test_an_ip_adapters_cross_attention_is_not_merged(make_unet, run, settings):
    unet, image = make_unet(), torch.ones(2, 1, 4, 24)
    for layer in find_layers(unet):
        layer.block.attn2.set_processor(
            attention_processor.IPAdapterAttnProcessor2_0(layer.channels, 24, num_tokens=(4,))
        )
    unet.encoder_hid_proj = nn.Module()
    unet.encoder_hid_proj.forward = lambda image: [image]
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")

    off = run(unet, image_embeds=image)
    with tome.attach(unet, settings()) as merging:
        assert not torch.equal(run(unet, image_embeds=image), off)
    assert len(merging.report().merged_layers) == 3
    assert torch.equal(run(unet, image_embeds=image), off)


@pytest.mark.parametrize("method", METHODS)
def test_fused_projections_merge_with_the_method_paper_only(make_unet, run, settings, method):
    unet = make_unet()
    unet.fuse_qkv_projections()
    off = run(unet)
    with tome.attach(unet, settings(method)) as merging:
        on = run(unet)
    assert torch.equal(on, off) == (method != "paper")
    assert ("fused" in merging.report().summary) == (method != "paper")
    assert torch.equal(run(unet), off)


@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_lora_of_peft_before_and_after_a_merged_pass(make_unet, run, settings, method):
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"
    )

    def add_lora(unet):
        torch.manual_seed(1)
        unet.add_adapter(config)
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)

    first, second = unets = make_unet(), make_unet()
    add_lora(first)
    mergings = [tome.attach(unet, settings(method)) for unet in unets]
    with_lora, plain = run(first), run(second)
    add_lora(second)
    torch.testing.assert_close(run(second), with_lora, rtol=0, atol=1e-5)
    assert not torch.allclose(with_lora, plain, atol=1e-3)
    for unet, merging in zip(unets, mergings, strict=True):
        unet.delete_adapters("default")
        assert torch.equal(run(unet), plain)
        merging.detach()
        assert merging.report().merged_steps == merging.report().steps
        assert len(merging.report().merged_layers) == 3
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in unet.modules())
