"""Attention kernels, imitated on the CPU: each merges, or its own error is the reason.

Head sizes and rounding follow their sources: SageAttention's `core.py` and `qattn`, flash-attn's
`flash_api.cpp`, PyTorch's `sdp_utils.cpp`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from single_block import Block, Projected, block_around, skip_without_half
from torch import Tensor

import tomesd_core as tome
from tomesd_core.partition import make_partition


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, N, size], scaled by the size of its heads."""
    return (q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v.float()


def taking(allows):
    """A kernel that takes some head sizes only."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert allows(q.shape[-1]), f"head size {q.shape[-1]} is not supported"
        return plain(q, k, v)

    return kernel


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A part of the queries at a time, as IPEX does."""
    return torch.cat([plain(part, k, v) for part in q.split(128, dim=2)], dim=2)


def in_int8(x: Tensor, block: int) -> Tensor:
    """Round to int8 with a scale per block of tokens."""
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
"""Relative root mean square error of kernels that round to int8."""


class Attention(Projected):
    """Attention like Forge's, which passes its heads to a kernel."""

    def __init__(self, heads: int, size: int, kernel) -> None:
        super().__init__(heads, size)
        self.kernel = kernel

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(x, context)
        )
        return self.to_out(self.kernel(q, k, v).to(q.dtype).transpose(1, 2).flatten(2))


def make(kernel, size: int, dtype: torch.dtype = torch.float16) -> Block:
    torch.manual_seed(0)
    return block_around(Attention(2, size, kernel), dtype)


def image(channels: int, dtype: torch.dtype = torch.float16) -> Tensor:
    low = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(low, size=(16, 16), mode="bilinear").to(dtype)


SETTINGS = tome.MergeSettings(ratio=0.75, schedule="constant", skip_unprofitable=False)


def merged(block: Block, x: Tensor) -> tuple[Tensor, str]:
    with tome.attach(block, SETTINGS) as merging:
        return block(x), merging.report().summary


@pytest.fixture(autouse=True)
def has_half():
    skip_without_half()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [40, 64, 80])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_merges_what_it_can_compute_unmerged(name, size, dtype):
    block, x = make(KERNELS[name], size, dtype), image(2 * size, dtype)
    try:
        block(x)
    except AssertionError as error:
        pytest.skip(f"unmerged it raises too: {error}")
    output, summary = merged(block, x)
    assert "1 of 1" in summary and "256 → 64 keys" in summary
    right, _ = merged(make(plain, size, torch.float32), x.float())
    error = (output.float() - right).square().mean().sqrt() / right.square().mean().sqrt()
    assert error < ROUNDING.get(name, 0) + (0.01 if dtype == torch.float16 else 0.03)


def test_a_kernel_that_takes_no_padded_heads_is_asked_once_and_its_error_is_the_reason():
    sizes = []
    block, x = make(taking(lambda size: sizes.append(size) or size == 64), 64), image(128)
    unmerged = block(x)
    for attaches in (1, 2):
        with tome.attach(block, SETTINGS) as merging:
            for _ in range(3):
                assert torch.equal(block(x), unmerged)
        assert "AssertionError: head size 72 is not supported" in merging.report().summary
        assert sizes.count(72) == attaches


def test_another_kernel_behind_the_same_function_is_probed():
    """As when the user chooses another one while the host runs."""
    block, x = make(plain, 64), image(128)
    assert "256 → 64 keys" in merged(block, x)[1]
    block.transformer_blocks[0].attn1.kernel = KERNELS["SageAttention 1"]
    assert "256 → 64 keys" in merged(block, x)[1]


def test_a_kernel_is_probed_again_after_it_refused_a_pass():
    """Nothing on the attention shows that another kernel runs."""
    kernels = [plain]
    block, x = make(lambda *heads: kernels[-1](*heads), 64), image(128)
    with tome.attach(block, SETTINGS) as merging:
        block(x)
        kernels.append(KERNELS["SageAttention 1"])
        with pytest.raises(AssertionError, match="72 is not supported"):
            block(x)
        block(x)
        assert merging.report().layers[0].merged_calls == 2


def test_a_large_grid_is_laid_out_without_a_loop_over_its_tokens(operations):
    counts = []
    for side in (44, 268):  # Sides of no other test, since layouts and draws are cached.
        with operations() as operations_run:
            make_partition((side, side), (4, 4), window=32)
        counts.append(len(operations_run.names))
    assert counts[0] == counts[1] > 0
