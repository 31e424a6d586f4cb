"""Proportional attention: softmax with log n added, exact where merged tokens are equal."""

import contextlib
import math

import pytest
import torch
from single_block import Projected, block_around, skip_without_half

import tomesd_core as tome
from tomesd_core.probe import PROBE_TOKENS, probe_heads
from tomesd_core.proportional import (
    BIAS_CHANNELS,
    WIDTH,
    Heads,
    Projections,
    has_projections,
)
from tomesd_core.settings import MergeSettings

GRID = (8, 8)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def has_half(request):
    if "torch.float16" in request.node.name:
        skip_without_half()


def plain_softmax(q, k, v, scale):
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


class Attention(Projected):
    """Attention like WebUI's; `kind` chooses where its scale and head size come from."""

    def __init__(self, kind, heads, size):
        super().__init__(heads, size)
        self.kind, self.scale = kind, size**-0.5

    def forward(self, x, context=None, mask=None):
        q, k, v = self.project(x, context)
        size = x.shape[-1] // self.heads if self.kind == "by input" else q.shape[-1] // self.heads
        q, k, v = (
            each.view(each.shape[0], -1, self.heads, size).transpose(1, 2) for each in (q, k, v)
        )
        out = plain_softmax(q, k, v, self.scale if self.kind == "own scale" else size**-0.5)
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


def image(channels, dtype=torch.float32, cells=False, batch=2):
    """Tokens on `GRID`; with `cells` those of each 2×2 cell are equal."""
    generator = torch.Generator().manual_seed(1)
    side = 4 if cells else 8
    x = torch.randn(batch, channels, side, side, generator=generator, dtype=torch.double)
    return (x.repeat_interleave(2, -1).repeat_interleave(2, -2) if cells else x).to(dtype)


def settings(method, ratio=0.75, **values):
    always = {"schedule": "constant", "window": None, "skip_unprofitable": False}
    return MergeSettings(ratio=ratio, method=method, **always, **values)


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
@pytest.mark.parametrize(
    ("heads", "size"), [(8, 40), (1, 64), (10, 64), (5, 80), (2, 160), (3, 7), (2, 4)]
)
@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_merging_equal_tokens_changes_nothing(kind, heads, size, method):
    block, x = make(kind, heads, size), image(heads * size, cells=True)
    out, token_map = run(block, x, settings(method))
    assert token_map.merged_tokens == 16 and token_map.counts.unique().tolist() != [1]
    assert relative(out, block(x)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
@pytest.mark.parametrize("method", ["keys", "tokens", "paper"])
def test_any_tokens_give_softmax_with_log_counts_added(kind, dtype, ratio, method):
    block, x = make(kind, 2, 40, dtype), image(80, dtype)
    out, token_map = run(block, x, settings(method, ratio))
    assert out.dtype == dtype
    assert relative(out, reference(block, x, token_map, method)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_gradients_are_the_references(kind, method):
    block, x = make(kind, 2, 8, torch.double), image(16, torch.double).requires_grad_()
    out, token_map = run(block, x, settings(method))
    weights = torch.randn(out.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((out * weights).sum(), x)
    (right,) = torch.autograd.grad((reference(block, x, token_map, method) * weights).sum(), x)
    assert relative(ours, right) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [4, 8, 40, 64, 80, 160])
def test_the_probe_finds_the_scale_of_an_attention(kind, dtype, size):
    attention = make(kind, 2, size, dtype).transformer_blocks[0].attn1
    running = []

    @contextlib.contextmanager
    def run_as(call):
        running.append(call)
        yield
        running.pop()

    projections = Projections(attention, lambda: running[-1] if running else None, None)
    with projections.handles:
        projections.register()
        heads = probe_heads(attention, torch.zeros(2, 64, 2 * size, dtype=dtype), run_as, {})
    wide = math.ceil((size + BIAS_CHANNELS) / WIDTH) * WIDTH
    assert heads == Heads(2, size, wide, size**-0.5 if kind == "own scale" else wide**-0.5)


@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_an_attention_of_unknown_scale_is_not_merged(method):
    block, x = make("own scale", cls=Strange), image(16)
    unmerged = block(x)
    with tome.attach(block, settings(method)) as merging:
        assert torch.equal(block(x), unmerged)
    assert "unknown logit scale" in merging.report().summary
    assert run(block, x, settings("paper"))


def test_a_counter_on_an_attention_does_not_have_it_probed_again():
    lengths = []

    class Counting(Attention):
        def forward(self, x, context=None, mask=None):
            lengths.append(x.shape[1])
            return super().forward(x, context)

    block, x = make("by heads", cls=Counting), image(16)
    with tome.attach(block, settings("keys")):
        for count in range(3):
            block.transformer_blocks[0].attn1.calls = count
            block(x)
    assert lengths.count(PROBE_TOKENS) == 1 and lengths.count(x[0, 0].numel()) == 3


def test_an_attention_without_heads_cannot_be_merged():
    attention = make("own scale").transformer_blocks[0].attn1
    assert has_projections(attention)
    del attention.heads
    assert not has_projections(attention)


@pytest.mark.parametrize("method", ["keys", "tokens"])
def test_foreign_pre_hooks_on_projections_see_unpadded_inputs(method):
    block, x, widths = make("by input"), image(16), set()
    attention = block.transformer_blocks[0].attn1
    for module in (attention.to_q, attention.to_out, attention.to_out[0]):
        module.register_forward_pre_hook(lambda _, args: widths.add(args[0].shape[-1]))
    run(block, x, settings(method))
    assert widths == {16}
