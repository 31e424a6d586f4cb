"""Proportional attention: softmax with log n added, exact where merged tokens are equal."""

import math

import pytest
import torch
from single_block import Projected, block_around, skip_without_half

import tomesd_core as tome
from tomesd_core.probe import PROBE_TOKENS
from tomesd_core.proportional import BIAS_CHANNELS, WIDTH, has_projections

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def has_half(request):
    if "torch.float16" in request.node.name:
        skip_without_half()


class Attention(Projected):
    """Attention like WebUI's; `kind` chooses where its scale and head size come from.

    `seen` has the number of queries and the head size of each call.
    """

    def __init__(self, kind, heads, size):
        super().__init__(heads, size)
        self.kind, self.scale, self.seen = kind, size**-0.5, []

    def forward(self, x, context=None, mask=None):
        q, k, v = self.project(x, context)
        size = x.shape[-1] // self.heads if self.kind == "by input" else q.shape[-1] // self.heads
        q, k, v = (
            each.view(each.shape[0], -1, self.heads, size).transpose(1, 2) for each in (q, k, v)
        )
        self.seen.append((q.shape[2], size))
        scale = self.scale if self.kind == "own scale" else size**-0.5
        out = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        return self.to_out(out.transpose(1, 2).flatten(2))


class Strange(Attention):
    """Attention with an unusual scale."""

    def forward(self, x, context=None, mask=None):
        self.scale = 0.5 * (self.to_q.in_features // self.heads) ** -0.5
        out = super().forward(x, context)
        self.scale = 1.0
        return out


def make(kind, heads=2, size=8, dtype=torch.float32, cls=Attention):
    torch.manual_seed(0)

    class New(cls):
        """Another function, so that it is probed."""

        def forward(self, *args, **named):
            return super().forward(*args, **named)

    return block_around(New(kind, heads, size), dtype)


def image(channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 8, 8, generator=generator, dtype=torch.double).to(dtype)


def run(block, x, how):
    maps = []
    with tome.attach(
        block, how, on_map=lambda name, step, grid, token_map: maps.append(token_map)
    ) as merging:
        out = block(x)
    assert merging.report().layers[0].merged_calls == 1, merging.report()
    return out, maps[0]


def reference(block, x, token_map, method):
    """Softmax with log-counts added, in double precision."""
    inner = block.transformer_blocks[0]
    attention, y = inner.attn1.double(), inner.norm1.double()(x.double().flatten(2).transpose(1, 2))
    merged = token_map.merge(y)
    q = attention.to_q(y if method == "keys" else merged)
    k = attention.to_k(merged)
    v = attention.to_v(merged)
    heads = attention.heads
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    similarity = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if method != "paper":
        similarity = similarity + token_map.counts.double().log()[:, None, None]
    out = attention.to_out((similarity.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return out if method == "keys" else token_map.unmerge(out)


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


KINDS = "own scale", "by heads", "by input"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ratio", [0.3, 0.9])
@pytest.mark.parametrize(("heads", "size"), [(2, 4), (3, 7), (2, 8), (8, 40), (1, 64), (1, 160)])
def test_any_tokens_give_softmax_with_log_counts_added(
    whole, kind, dtype, heads, size, ratio, method
):
    block, x = make(kind, heads, size, dtype), image(heads * size, dtype)
    out, token_map = run(block, x, whole(method=method, ratio=ratio))
    assert out.dtype == dtype
    assert relative(out, reference(block, x, token_map, method)) < TOLERANCE[dtype]
    # Heads have the least padding that holds the bias.
    wide = size if method == "paper" else math.ceil((size + BIAS_CHANNELS) / WIDTH) * WIDTH
    assert {width for _, width in block.transformer_blocks[0].attn1.seen} == {wide}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_gradients_are_the_references(whole, kind, method):
    block, x = make(kind, 2, 8, torch.double), image(16, torch.double).requires_grad_()
    out, token_map = run(block, x, whole(method=method))
    weights = torch.randn(out.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((out * weights).sum(), x)
    (right,) = torch.autograd.grad((reference(block, x, token_map, method) * weights).sum(), x)
    assert relative(ours, right) < 1e-6


@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_an_attention_of_unknown_scale_is_not_merged(whole, method):
    block, x = make("own scale", cls=Strange), image(16)
    unmerged = block(x)
    with tome.attach(block, whole(method=method)) as merging:
        assert torch.equal(block(x), unmerged)
    assert "unknown logit scale" in merging.report().summary
    assert run(block, x, whole(method="paper"))


def test_a_counter_on_an_attention_does_not_have_it_probed_again(whole):
    block, x = make("by heads"), image(16)
    attention = block.transformer_blocks[0].attn1
    with tome.attach(block, whole(method="keys")):
        for count in range(3):
            attention.calls = count
            block(x)
    assert [queries for queries, _ in attention.seen] == [PROBE_TOKENS, 64, 64, 64]


def test_an_attention_without_heads_cannot_be_merged():
    attention = make("own scale").transformer_blocks[0].attn1
    assert has_projections(attention)
    del attention.heads
    assert not has_projections(attention)


@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_foreign_pre_hooks_on_projections_see_unpadded_inputs(whole, method):
    block, x, widths = make("by input"), image(16), set()
    attention = block.transformer_blocks[0].attn1
    for module in (attention.to_q, attention.to_out, attention.to_out[0]):
        module.register_forward_pre_hook(lambda _, args: widths.add(args[0].shape[-1]))
    run(block, x, whole(method=method))
    assert widths == {16}
