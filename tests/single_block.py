"""A SpatialTransformer of one block of self-attention alone, around any attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Projected(nn.Module):
    """The projections of self-attention."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        inner = heads * size
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(inner, inner), nn.Dropout(0.0))

    def project(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        """Queries, keys and values."""
        context = x if context is None else context
        return [self.to_q(x), self.to_k(context), self.to_v(context)]


class Block(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        inner = nn.Module()
        inner.norm1, inner.attn1 = nn.LayerNorm(attention.to_q.in_features), attention
        self.transformer_blocks = nn.ModuleList([inner])

    def forward(self, x: Tensor) -> Tensor:
        block, x = self.transformer_blocks[0], x.flatten(2).transpose(1, 2)
        return self.attend(block, x, block.norm1(x))

    def attend(self, block: Any, x: Tensor, y: Tensor) -> Tensor:
        """Attend to `y`, the normed `x`; may be replaced."""
        return block.attn1(y)


def block_around(attention: Any, dtype: torch.dtype = torch.float32) -> Block:
    """A block whose attention differs clearly from token to token."""
    for projection in (attention.to_q, attention.to_k):
        nn.init.normal_(projection.weight, std=1.5 * projection.in_features**-0.5)
    return Block(attention).to(dtype).requires_grad_(False)


def ldm_block(kind: type[nn.Module] | None = None) -> Block:
    """A block around ldm's attention, or a class derived from it."""
    from ldm.modules.attention import CrossAttention

    return block_around((kind or CrossAttention)(32, heads=2, dim_head=16))


def skip_without_half() -> None:
    """Older torch has no half precision on the CPU."""
    try:
        half = torch.ones(2, 2).half()
        nn.functional.layer_norm(half @ half, (2,))
    except RuntimeError as error:
        pytest.skip(str(error))
