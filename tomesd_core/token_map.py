"""Merge and unmerge by one integer per token: the slot that it is merged into."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BAG_DEVICES = {"cpu", "cuda"}
"""Devices whose `embedding_bag` sums each bag in one thread, in a fixed order, in fp32."""

SHORT = 4096
"""Longest row that one CUDA kernel sorts; longer rows are sorted faster as one row of all items."""


class TokenMap:
    """The slot of each token: `slots`, int64 [B, N], whose values cover [0, merged_tokens)."""

    def __init__(self, slots: Tensor, merged_tokens: int) -> None:
        """`slots` may have any integer type."""
        self._slots = slots.int()
        self.merged_tokens = merged_tokens

    @functools.cached_property
    def slots(self) -> Tensor:
        """[B, N], int64: the slot of each token."""
        return self._slots.long()

    @property
    def shape(self) -> tuple[int, int]:
        """Items and tokens before merging."""
        return self._slots.shape[0], self._slots.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens before merging."""
        return self._slots.shape[1]

    @property
    def counts(self) -> Tensor:
        """[B, merged_tokens], int64: the tokens in each slot."""
        return self._members[2].view(-1, self.merged_tokens)

    def merge(self, x: Tensor) -> Tensor:
        """The mean of each slot (paper, section 3.1): [B, N, C] to [B, merged_tokens, C].

        Keeps dtype and gradient, and gives the same bits on every run on one device. Raises
        `ValueError` if the items or tokens of x don't fit the map.
        """
        self._check(x, self.tokens)
        mean: Tensor = _Mean.apply(x.reshape(-1, x.shape[-1]), self)  # type: ignore[no-untyped-call]
        return mean.view(x.shape[0], self.merged_tokens, x.shape[-1])

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy each slot to its tokens: [B, merged_tokens, C] to [B, N, C]. Raises `ValueError`."""
        self._check(y, self.merged_tokens)
        return y.reshape(-1, y.shape[-1]).index_select(0, self._rows).view(*self.shape, y.shape[-1])

    def _check(self, x: Tensor, tokens: int) -> None:
        if x.ndim != 3 or x.shape[:2] != (self._slots.shape[0], tokens):
            raise ValueError(
                f"x must be [{self._slots.shape[0]}, {tokens}, C] for this map, got {list(x.shape)}"
            )

    @functools.cached_property
    def _rows(self) -> Tensor:
        """[B·N], int32: the slot of each token with the slots of all items in one row."""
        return (
            self._slots + first_rows(len(self._slots), self.merged_tokens, self._slots.device)
        ).flatten()

    @functools.cached_property
    def _members(self) -> tuple[Tensor, Tensor, Tensor]:
        """[B·N]: tokens sorted by slot; [B·merged_tokens], twice: each slot's first place and its
        count.

        Tokens and slots of all items are numbered in one row.
        """
        (items, tokens), device = self.shape, self._slots.device
        rows = max(items, 1) if tokens <= SHORT else 1
        slots, members = self._rows.view(rows, -1).sort(stable=True)
        members = members + first_rows(rows, members.shape[1], device)
        edges = numbers(items * tokens + 1, device)[: items * self.merged_tokens + 1]
        starts = torch.searchsorted(slots.flatten(), edges)
        return members.flatten(), starts[:-1], starts[1:] - starts[:-1]

    def mean(self, x: Tensor) -> Tensor:
        """[B·N, C] to [B·merged_tokens, C]; see `merge`."""
        members, starts, counts = self._members
        if x.device.type in BAG_DEVICES:
            # CUDA sums halves in fp32 and rounds once. The CPU would round a bag's sum before
            # dividing it.
            is_summed_wide = x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64)
            return F.embedding_bag(
                members, x if is_summed_wide else x.float(), starts, mode="mean"
            ).to(x.dtype)
        rows = self._rows.index_select(0, members)
        return _scanned_mean(x, rows, members, starts + counts, counts)

    def shares(self, y: Tensor) -> Tensor:
        """[B·merged_tokens, C] to [B·N, C]: each slot's value in equal shares."""
        return (y / self.counts.flatten()[:, None]).to(y.dtype).index_select(0, self._rows)


class _Mean(torch.autograd.Function):
    """The mean, with a gradient that is differentiable itself, which `embedding_bag` lacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_map: TokenMap) -> Tensor:
        ctx.token_map = token_map
        return token_map.mean(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.token_map.shares(grad), None


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def first_rows(items: int, length: int, device: torch.device) -> Tensor:
    """[items, 1], int32: the first place of each item of `length` with all items in one row."""
    return (torch.arange(items, device=device, dtype=torch.int32) * length)[:, None]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def numbers(count: int, device: torch.device) -> Tensor:
    """[count], int32: 0, 1, 2, …"""
    return torch.arange(count, device=device, dtype=torch.int32)


def _scanned_mean(x: Tensor, rows: Tensor, members: Tensor, ends: Tensor, counts: Tensor) -> Tensor:
    """The mean of each slot by a segmented scan, with operations that every device has.

    Sums run in fp32 over doubling distances, so that their order is fixed and a NaN stays in its
    slot.
    """
    total = x.index_select(0, members).to(torch.promote_types(x.dtype, torch.float32))
    distance = 1
    while distance < total.shape[0]:
        together = (rows[distance:] == rows[:-distance])[:, None]
        addends = torch.where(together, total[:-distance], torch.zeros_like(total[:1]))
        total = torch.cat([total[:distance], total[distance:] + addends])
        distance *= 2
    return (total.index_select(0, ends - 1) / counts[:, None]).to(x.dtype)
