"""Merge and unmerge: one integer per token, the slot that it falls into."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BAG_DEVICES = {"cpu", "cuda"}
"""Where `embedding_bag` exists, sums each bag in one thread in a fixed order, and accumulates in fp32."""


class TokenMap:
    """Which tokens fall together: `slots`, int64 [B, N], each item's values covering [0, merged_tokens)."""

    def __init__(self, slots: Tensor, merged_tokens: int) -> None:
        self.slots = slots
        self.merged_tokens = merged_tokens
        first_row = torch.arange(slots.shape[0], device=slots.device)[:, None] * merged_tokens
        self._rows = (slots + first_row).flatten()
        self._members: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens before merging."""
        return self.slots.shape[1]

    @property
    def counts(self) -> Tensor:
        """How many tokens fell into each slot: int64 [B, merged_tokens]."""
        members, starts = self._tokens_by_slot()
        return starts.diff(append=starts.new_full((1,), members.shape[0])).view(-1, self.merged_tokens)

    def merge(self, x: Tensor) -> Tensor:
        """The mean over each slot (paper, section 3.1): [B, N, C] to [B, merged_tokens, C], dtype and grad kept.

        The same bits on every run on one device. Raises `ValueError` when x has other items or tokens than the map.
        """
        self._check(x, self.tokens)
        mean: Tensor = _Mean.apply(x.reshape(-1, x.shape[-1]), self)  # type: ignore[no-untyped-call]
        return mean.view(x.shape[0], self.merged_tokens, x.shape[-1])

    def unmerge(self, y: Tensor) -> Tensor:
        """Each token's slot's value: [B, merged_tokens, C] to [B, N, C]. Raises `ValueError` as `merge` does."""
        self._check(y, self.merged_tokens)
        return y.reshape(-1, y.shape[-1]).index_select(0, self._rows).view(*self.slots.shape, y.shape[-1])

    def _check(self, x: Tensor, tokens: int) -> None:
        if x.ndim != 3 or x.shape[:2] != (self.slots.shape[0], tokens):
            raise ValueError(f"x must be [{self.slots.shape[0]}, {tokens}, C] for this map, got {list(x.shape)}")

    def _tokens_by_slot(self) -> tuple[Tensor, Tensor]:
        """[B·N]: the tokens sorted by slot; [B·merged_tokens]: where each slot's begin. Of all items in one row."""
        if self._members is None:
            rows, members = self._rows.sort(stable=True)
            slots = torch.arange(self.slots.shape[0] * self.merged_tokens, device=rows.device)
            self._members = members, torch.searchsorted(rows, slots)
        return self._members

    def mean(self, x: Tensor) -> Tensor:
        """[B·N, C] to [B·merged_tokens, C], as `merge` does it."""
        members, starts = self._tokens_by_slot()
        if x.device.type in BAG_DEVICES:
            # Half types are summed in fp32: a bag's rounded sum, divided, would be rounded twice.
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            return F.embedding_bag(members, wide, starts, mode="mean").to(x.dtype)
        return _scanned_mean(x, self._rows, members, starts)

    def shares(self, y: Tensor) -> Tensor:
        """[B·merged_tokens, C] to [B·N, C]: each slot's value in equal shares for its tokens."""
        return (y / self.counts.flatten()[:, None]).to(y.dtype).index_select(0, self._rows)


class _Mean(torch.autograd.Function):
    """The mean with a gradient that has a gradient itself, which `embedding_bag` has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_map: TokenMap) -> Tensor:
        ctx.token_map = token_map
        return token_map.mean(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.token_map.shares(grad), None


def _scanned_mean(x: Tensor, rows: Tensor, members: Tensor, starts: Tensor) -> Tensor:
    """The mean over each slot by a segmented scan, of operations that every device has.

    Sums run in fp32 over doubling distances, so the order is fixed, and a NaN stays inside its slot.
    """
    total = x.index_select(0, members).to(torch.promote_types(x.dtype, torch.float32))
    rows = rows.index_select(0, members)
    distance = 1
    while distance < total.shape[0]:
        together = (rows[distance:] == rows[:-distance])[:, None]
        addends = torch.where(together, total[:-distance], torch.zeros_like(total[:1]))
        total = torch.cat([total[:distance], total[distance:] + addends])
        distance *= 2
    ends = torch.cat([starts[1:], starts.new_full((1,), members.shape[0])])
    return (total.index_select(0, ends - 1) / (ends - starts)[:, None]).to(x.dtype)
