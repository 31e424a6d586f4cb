"""Attention kernels, imitated on the CPU by their published rules: each merges, or its own words
are the reason.

Which head sizes a kernel takes, and what it rounds, is what its sources say: SageAttention's
`core.py` and `qattn`, flash-attn's `flash_api.cpp`, PyTorch's `sdp_utils.cpp`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tomesd_core as tome
from tomesd_core import hooks
from tomesd_core.partition import make_partition
from tomesd_core.proportional import Weighted
from tomesd_core.token_map import TokenMap


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, N, size], with the scale of the heads that it sees."""
    return (q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v.float()


def taking(allows):
    """A kernel that takes some sizes of heads alone."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert allows(q.shape[-1]), f"head size {q.shape[-1]} is not supported"
        return plain(q, k, v)

    return kernel


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As IPEX's: a part of the queries at a time."""
    return torch.cat([plain(part, k, v) for part in q.split(128, dim=2)], dim=2)


def in_int8(x: Tensor, block: int) -> Tensor:
    """Rounded to int8 with a scale for each block of tokens, and back."""
    groups = torch.arange(x.shape[-2]) // block
    most = torch.stack(
        [x[..., groups == group, :].abs().amax((-2, -1)) for group in groups.unique()], -1
    )
    scale = (most / 127 + 1e-7)[..., groups, None]
    return (x / scale).round().clamp(-127, 127) * scale


def sage_2(is_fp8: bool):
    """SageAttention 2.x: heads padded to 64 or 128, queries and keys in int8, probabilities in fp8
    or fp16."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[-1]
        if size > 128:
            raise ValueError(f"Unsupported head_dim: {size}")
        q, k, v = (F.pad(t.float(), (0, (64 if size <= 64 else 128) - size)) for t in (q, k, v))
        k = k - k.mean(-2, keepdim=True)
        logits = in_int8(q, 32) @ in_int8(k, 64).transpose(-1, -2) * size**-0.5 * math.log2(math.e)
        p = torch.exp2(logits - logits.amax(-1, keepdim=True) + (8.807 if is_fp8 else 0))
        total = p.sum(-1, keepdim=True)
        p = p.clamp(max=448).to(torch.float8_e4m3fn).float() if is_fp8 else p.half().float()
        return (p @ v / total)[..., :size]

    return kernel


KERNELS = {
    "SDP, math": plain,
    "SDP, CUTLASS": taking(lambda size: size % 8 == 0),
    "SDP, cuDNN": taking(lambda size: size % 8 == 0 and size <= 128),
    "flash 1": taking(lambda size: size % 8 == 0 and size <= 128),
    "flash 2": taking(lambda size: size <= 256),
    "Triton, powers of 2": taking(lambda size: size in (16, 32, 64, 128)),
    "IPEX, sliced": sliced,
    "SageAttention 1": taking(lambda size: size in (64, 96, 128)),
    "SageAttention 2, fp16": sage_2(is_fp8=False),
    "SageAttention 2, fp8": sage_2(is_fp8=True),
}
ROUNDING = {"SageAttention 2, fp16": 0.06, "SageAttention 2, fp8": 0.12}
"""Root mean square of the errors of those that round to int8, over that of the output; others round
to half."""


class Attention(nn.Module):
    """As Forge's: the kernel sees the heads, and has the scale of their size."""

    def __init__(self, heads: int, size: int, kernel) -> None:
        super().__init__()
        inner = heads * size
        self.heads, self.kernel = heads, kernel
        self.to_q, self.to_k, self.to_v = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(inner, inner), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(self.kernel(q, k, v).to(q.dtype).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A SpatialTransformer of one block, of attention alone."""

    def __init__(self, attention: Attention, channels: int) -> None:
        super().__init__()
        inner = nn.Module()
        inner.norm1, inner.attn1 = nn.LayerNorm(channels), attention
        self.transformer_blocks = nn.ModuleList([inner])

    def forward(self, x: Tensor) -> Tensor:
        block = self.transformer_blocks[0]
        return block.attn1(block.norm1(x.flatten(2).transpose(1, 2)))


def make(kernel, heads: int, size: int, dtype: torch.dtype) -> Block:
    torch.manual_seed(0)
    block = Block(Attention(heads, size, kernel), heads * size)
    for projection in (
        block.transformer_blocks[0].attn1.to_q,
        block.transformer_blocks[0].attn1.to_k,
    ):
        nn.init.normal_(projection.weight, std=1.5 * (heads * size) ** -0.5)
    return block.to(dtype).requires_grad_(False)


def image(channels: int, dtype: torch.dtype) -> Tensor:
    low = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(low, size=(16, 16), mode="bilinear").to(dtype)


def merged(block: Block, x: Tensor) -> tuple[Tensor, str]:
    settings = tome.MergeSettings(ratio=0.75, schedule="constant", skip_unprofitable=False)
    with tome.attach(block, settings) as merging:
        return block(x), merging.report().summary


@pytest.fixture(autouse=True)
def has_half():
    """Older torch has no half precision on the CPU."""
    try:
        F.layer_norm(torch.ones(2, 2).half() @ torch.ones(2, 2).half(), (2,))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [40, 64, 80])
@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_can_compute_unmerged_it_merges(name, size, dtype):
    block, x = make(KERNELS[name], 2, size, dtype), image(2 * size, dtype)
    try:
        block(x)
    except AssertionError as error:
        pytest.skip(f"unmerged it raises too: {error}")
    output, summary = merged(block, x)
    assert summary.startswith("1 of 1 self-attention layers, 256 → 64 keys")
    right, _ = merged(make(plain, 2, size, torch.float32), x.float())
    error = (output.float() - right).square().mean().sqrt() / right.square().mean().sqrt()
    assert error < ROUNDING.get(name, 0) + (0.01 if dtype == torch.float16 else 0.03)


def test_a_kernel_that_takes_no_padded_heads_says_so_in_its_own_words():
    block = make(taking(lambda size: size == 64), 2, 64, torch.float16)
    x = image(128, torch.float16)
    unmerged = block(x)
    output, summary = merged(block, x)
    assert torch.equal(output, unmerged)
    assert "refuses padded heads: AssertionError: head size 72 is not supported" in summary


def test_a_refusal_is_probed_once_in_an_attach():
    sizes = []
    kernel = taking(lambda size: sizes.append(size) or size == 64)
    block, x = make(kernel, 2, 64, torch.float16), image(128, torch.float16)
    settings = tome.MergeSettings(ratio=0.75, schedule="constant", skip_unprofitable=False)
    for attaches in (1, 2):
        with tome.attach(block, settings) as merging:
            for _ in range(3):
                block(x)
        assert sizes.count(72) == attaches and "72 is not supported" in merging.report().summary


def test_another_kernel_behind_the_same_function_is_probed_anew():
    """As where a person chooses another one while the host runs."""
    block, x = make(plain, 2, 64, torch.float16), image(128, torch.float16)
    assert "256 → 64 keys" in merged(block, x)[1]
    block.transformer_blocks[0].attn1.kernel = KERNELS["SageAttention 1"]
    assert "256 → 64 keys" in merged(block, x)[1]


def test_after_a_pass_that_a_kernel_refused_it_is_probed_anew(monkeypatch):
    """Where nothing on the attention tells that another one runs."""
    kernels = [plain]
    block = make(lambda *heads: kernels[-1](*heads), 2, 64, torch.float16)
    x = image(128, torch.float16)
    settings = tome.MergeSettings(ratio=0.75, schedule="constant", skip_unprofitable=False)
    with tome.attach(block, settings) as merging:
        block(x)
        kernels.append(KERNELS["SageAttention 1"])
        with pytest.raises(AssertionError, match="72 is not supported"):
            block(x)
        block(x)
        assert merging.report().layers[0].merged_calls == 2


# What a GPU would wait for.


@pytest.mark.parametrize("reuse_steps", [1, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "step"])
@pytest.mark.parametrize("method", ["keys", "tokens", "paper"])
def test_no_step_but_the_first_waits_for_the_device(
    make_unet, make_inputs, crossings, method, schedule, reuse_steps
):
    """On the meta device whatever reads a value raises, and a tensor from the CPU is seen on its
    way."""
    settings = tome.MergeSettings(
        ratio=0.8,
        late_ratio=0.3,
        schedule=schedule,
        method=method,
        reuse_steps=reuse_steps,
        skip_unprofitable=False,
    )
    unet, inputs = make_unet().to("meta"), [each.to("meta") for each in make_inputs((32, 24))]
    with crossings() as unmerged:  # ldm makes its timesteps' frequencies on the CPU.
        unet(*inputs)
    copies = []
    with tome.attach(unet, settings) as merging:
        for step in range(6):
            merging.set_step(step, 6)
            with crossings() as crossed:
                unet(*inputs)
            copies.append(len(crossed.names) - len(unmerged.names))
    assert len(merging.report().merged_layers) == 3
    assert copies[0] <= 1, "a new grid costs one copy"
    assert copies[1:] == [0] * 5


@pytest.mark.parametrize(
    ("module", "name"),
    [(hooks, "match"), (Weighted, "keys"), (TokenMap, "merge")],
    ids=lambda one: str(one)[-20:],
)
def test_a_copy_anywhere_in_a_merged_call_is_seen(
    make_unet, make_inputs, crossings, monkeypatch, small_settings, module, name
):
    unet, inputs = make_unet().to("meta"), [each.to("meta") for each in make_inputs()]
    usual = getattr(module, name)
    with tome.attach(unet, small_settings(method="keys")) as merging:
        counts = []
        for copies in (False, True):
            if copies:
                copy = lambda *args: (torch.zeros(1).to("meta", non_blocking=True), usual(*args))[1]  # noqa: E731
                monkeypatch.setattr(module, name, copy)
            for step in range(2):
                merging.set_step(step, 2)
                with crossings() as crossed:
                    unet(*inputs)
            counts.append(len(crossed.names))
    assert counts[1] == counts[0] + 3


def test_a_large_grid_is_laid_out_without_a_loop_over_its_tokens(operations):
    def operations_of(side):
        with operations() as operations_run:
            make_partition((side, side), (4, 4), window=32)
        return len(operations_run.names)

    # Sides that nothing else has: layouts and draws are kept.
    assert operations_of(44) == operations_of(268) > 0
