"""Layers with another extension's code in their attention."""

import functools

import pytest
import torch
from ldm.modules.attention import CrossAttention
from single_block import ldm_block
from torch import nn

import tomesd_core as tome


def hook(where):
    return lambda attention: (
        attention.get_submodule(where).register_forward_hook(lambda *_: None).remove
    )


def replace_forward(make):
    """Restoring a method leaves it on the instance."""

    def replace(attention):
        before, attention.forward = attention.forward, make(attention.forward)
        return lambda: setattr(attention, "forward", before)

    return replace


def foreign_forward(inner, x):
    return inner(x)


@pytest.mark.parametrize(
    ("intrude", "what"),
    [
        *(
            pytest.param(hook(where), "hooks", id=f"hook on attn1.{where}")
            for where in ["", "to_q", "to_k", "to_v", "to_out", "to_out.0"]
        ),
        (replace_forward(lambda inner: functools.partial(foreign_forward, inner)), "forward"),
        (replace_forward(lambda inner: functools.wraps(inner)(lambda x: inner(x))), "forward"),
    ],
)
def test_a_layer_with_foreign_code_in_its_attention_is_not_merged_until_it_is_gone(
    small_settings, method, intrude, what
):
    model, x = ldm_block(), torch.randn(2, 32, 8, 8)
    unmerged, remove = model(x), intrude(model.transformer_blocks[0].attn1)
    with tome.attach(model, small_settings(method=method)) as merging:
        assert torch.equal(model(x), unmerged)
        (layer,) = merging.report().layers
        assert __name__ in layer.reason and what in layer.reason
        assert layer.conflict in merging.report().summary
        remove()
        model(x)
    assert merging.report().layers[0].merged_calls == 1


class Foreign(nn.Identity):
    """Another extension's module in place of attn1, without its projections."""

    heads = 2


def test_a_layer_with_a_foreign_module_as_attention_is_not_merged(small_settings, method):
    model, x = ldm_block(), torch.randn(2, 32, 8, 8)
    model.transformer_blocks[0].attn1 = Foreign()
    unmerged = model(x)
    with tome.attach(model, small_settings(method=method)) as merging:
        assert torch.equal(model(x), unmerged)
    assert __name__ in merging.report().summary and "attn1" in merging.report().summary


@pytest.mark.parametrize("is_whole", [False, True], ids=["fewer", "whole"])
def test_an_attention_with_an_unexpected_output_costs_no_picture(small_settings, method, is_whole):
    class Odd(CrossAttention):
        def forward(self, x, context=None, mask=None):
            is_merged = (x if context is None else context).shape[1] == 32
            output = super().forward(x, context, mask)
            return output.new_zeros(2, 64 if is_whole else 7, 32) if is_merged else output

    model, x = ldm_block(Odd), torch.randn(2, 32, 8, 8)
    unmerged = model(x)
    with tome.attach(model, small_settings(method=method)) as merging:
        for _ in range(2):
            assert torch.equal(model(x), unmerged) == (not is_whole)
    (layer,) = merging.report().layers
    assert layer.reason is None if is_whole else "shape" in layer.reason
