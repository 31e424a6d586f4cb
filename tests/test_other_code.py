"""Layers with another extension's code in their attention."""

import functools

import pytest
import torch
import torch.utils.checkpoint
from layer_calls import FIRST, layer_named

import tomesd_core as tome


@pytest.mark.parametrize(
    "where", ["attn1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "attn1.to_out.0"]
)
def test_a_layer_with_a_foreign_hook_in_its_attention_is_not_merged(
    unet, small_settings, make_inputs, blocks_of, where, method
):
    inputs, calls = make_inputs(), []
    part = blocks_of(unet)[FIRST].get_submodule(where)
    handle = part.register_forward_hook(
        lambda module, args, output: calls.append((args[0], output))
    )
    unet(*inputs)
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*inputs)
        layer = layer_named(merging.report())
        assert __name__ in layer.reason and "hooks" in layer.reason
        assert layer.conflict in merging.report().summary
        assert all(torch.equal(a, b) for a, b in zip(*calls, strict=True))
        handle.remove()
        unet(*inputs)
        assert layer_named(merging.report()).merged_calls == 1


def foreign_forward(inner, x, *args, **kwargs):
    return inner(x, *args, **kwargs)


@pytest.mark.parametrize(
    "replace",
    [
        lambda inner: functools.partial(foreign_forward, inner),
        lambda inner: functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs)),
    ],
    ids=["partial", "wrapped"],
)
def test_a_layer_with_a_foreign_forward_is_not_merged_until_it_is_restored(
    unet, small_settings, make_inputs, blocks_of, method, replace
):
    attention = blocks_of(unet)[FIRST].attn1
    before, attention.forward = attention.forward, replace(attention.forward)
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*make_inputs())
        reason = layer_named(merging.report()).reason
        assert __name__ in reason and "forward" in reason
        assert "2 of 7" in merging.report().summary and __name__ in merging.report().summary
        attention.forward = before
        unet(*make_inputs())
    assert layer_named(merging.report()).merged_calls == 1


@pytest.mark.parametrize("is_whole", [False, True], ids=["fewer", "whole"])
def test_an_attention_with_an_unexpected_output_costs_no_picture(
    unet, small_settings, make_inputs, blocks_of, monkeypatch, is_whole, method
):
    kind, inputs, unmerged = type(blocks_of(unet)[FIRST].attn1), make_inputs(), unet(*make_inputs())
    usual = kind.forward

    def odd(self, x, context=None, mask=None):
        output = usual(self, x, context, mask)
        is_merged = 128 in (x.shape[1], -1 if context is None else context.shape[1])
        return output if not is_merged else output.new_zeros(2, 256 if is_whole else 7, 32)

    monkeypatch.setattr(kind, "forward", odd)
    with tome.attach(unet, small_settings(method=method)) as merging:
        first, second = unet(*inputs), unet(*inputs)
    assert torch.equal(first, unmerged) == (not is_whole)
    assert torch.equal(second, unmerged) == (not is_whole)
    for layer in (layer for layer in merging.report().layers if layer.level == 1):
        assert layer.reason is None if is_whole else "shape" in layer.reason
