"""Which source falls into which destination: bipartite soft matching (paper, section 3.1), inside
windows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import token_map as token_maps
from .partition import Partition, make_partition
from .plan import tokens_removed
from .settings import MergeSettings
from .token_map import TokenMap, numbers

SIMILARITY_BYTES = 64 * 2**20
"""The similarity matrix never takes more than this at once."""

CACHED_BYTES = 4 * 2**20
"""On the CPU the similarities of a few windows at a time stay in its cache, where their maximum is
found."""


@dataclasses.dataclass(frozen=True)
class Matching:
    """Every src's best dst, and how similar it is. Keeps indices and similarities, never
    activations."""

    partition: Partition
    best: Tensor
    """[B, W·S], int32: the best dst of each src, as its place in the partition's `dst`, in the
    order of the windows."""
    similarity: Tensor
    """[B, W·S]: its similarity, times the length of the src, which `inverse_length` takes off."""
    inverse_length: Tensor | None
    """[B, W·S]; None where the src were of length one."""

    def least_similar(self, count: int) -> Tensor:
        """[B, count]: the places of the `count` least similar src, in the order of the windows."""
        place = self.partition.windows.src_place
        similarity = (
            self.similarity
            if self.inverse_length is None
            else self.similarity * self.inverse_length
        )
        similarity = similarity.index_select(1, place)
        if similarity.device.type in token_maps.BAG_DEVICES - {"cpu"}:
            # On CUDA one kernel, where sorting all takes a dozen; which of equal ones it gives is
            # fixed.
            least = similarity.topk(count, dim=1, largest=False, sorted=False).indices
        else:
            least = similarity.sort(dim=1, descending=True, stable=True).indices[:, -count:]
        return place[least]

    def token_map(self, removed: int) -> TokenMap:
        """The map that merges the `removed` most similar src into their dst; at most as many as can
        merge."""
        partition, items = self.partition, self.best.shape[0]
        removed = max(0, min(removed, partition.most_removed))
        rows, dst_count, best = partition.rows(items), partition.dst.shape[1], self.best
        if kept := partition.src.shape[1] - removed:
            own = numbers(partition.tokens, best.device)[dst_count : dst_count + kept].expand(
                items, -1
            )
            best = best.scatter(1, self.least_similar(kept), own)
        slots = torch.cat([rows.dst_slots, best], dim=1).gather(1, rows.inverse)
        return TokenMap(slots, partition.tokens - removed)


@torch.no_grad()
def match(x: Tensor, partition: Partition, exact: bool = False) -> Matching:
    """Finds every src's most similar dst of its window, by the cosine of x's tokens ([B, N, C]).

    A token of zero norm is similar to none. What isn't finite in one batch item leaves the other
    items' matching as it is; inside its own item attention spreads it to every token, whatever is
    merged. `exact` keeps at least x's own precision; else a lower one may be used where that is
    faster: `similarity_dtype`.
    """
    items, windows = x.shape[0], partition.windows
    if not partition.most_removed or not items:
        best = torch.zeros(items, windows.src.numel(), dtype=torch.int32, device=x.device)
        return Matching(partition, best, best.float(), None)
    has_autocast = x.device.type in ("cpu", "cuda")
    with (
        torch.autocast(x.device.type, enabled=False)
        if exact and has_autocast
        else contextlib.nullcontext()
    ):
        return _match_in_windows(x, partition, similarity_dtype(x, exact), exact)


def similarity_dtype(x: Tensor, exact: bool = False) -> torch.dtype:
    """The dtype in which x's similarities are computed: x's own, but on the CPU the one that it
    multiplies fastest.

    `exact` is never less precise than x. Where the CPU multiplies bf16 by itself, matching 64×64
    tokens of 320 channels took 0.68 of the time that it takes in fp32, and 256×256 tokens 0.61
    (`bench layer`, "keys" and "ours, exact").
    """
    if x.device.type != "cpu":
        return x.dtype
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return (
        torch.bfloat16 if not exact and has_bf16() else torch.promote_types(x.dtype, torch.float32)
    )


def _match_in_windows(x: Tensor, partition: Partition, dtype: torch.dtype, exact: bool) -> Matching:
    """Goes through the windows, as many at once as the limit on the similarities' bytes allows."""
    items = x.shape[0]
    flat, rows = x.reshape(-1, x.shape[-1]), partition.rows(items)
    count, destinations = rows.dst.shape
    sources = rows.tokens.shape[1] - destinations
    limit = CACHED_BYTES if x.device.type == "cpu" else SIMILARITY_BYTES
    row_bytes = destinations * torch.finfo(dtype).bits // 8
    rows_at_once = min(sources, max(1, limit // row_bytes))
    # Rows are divided only where not even one window fits.
    windows_at_once = max(1, limit // (rows_at_once * row_bytes)) if rows_at_once == sources else 1
    values, indices, lengths = [], [], []
    for some in range(0, count, windows_at_once):
        tokens, inverse = _with_inverse_length(flat, rows.tokens[some : some + windows_at_once])
        b = _product(tokens[:, sources:], inverse[:, sources:], dtype).transpose(1, 2)
        # The length of a src changes neither its best dst nor, taken off afterwards, its
        # similarity. With a dst of length one a product is at most that length, so that fp16 holds
        # it. The paper's code has both of length one.
        a = tokens[:, :sources]
        a = _product(a, inverse[:, :sources], dtype) if exact else a.to(dtype)
        lengths.append(inverse[:, :sources, 0])
        for top in range(0, sources, rows_at_once):
            value, index = torch.bmm(a[:, top : top + rows_at_once], b).max(dim=-1)
            values.append(value)
            indices.append(index)
    # Windows in which several parts were looked at are one window each.
    best = rows.dst.gather(1, _joined(indices).view(count, sources)).view(items, -1)
    length = None if exact else _joined(lengths).reshape(items, -1)
    return Matching(partition, best, _joined(values).view(items, -1), length)


def _with_inverse_length(flat: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[…, C]: the tokens ([n, C]) in `rows`; and […, 1], at least in fp32: one over their lengths,
    0 where infinite."""
    tokens = flat.index_select(0, rows.flatten()).view(*rows.shape, -1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=wide)
    return tokens, length.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, rounded once, to `dtype`."""
    return torch.mul(a, b, out=torch.empty(a.shape, dtype=dtype, device=a.device))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def match_tokens(
    x: Tensor, grid: Sequence[int], ratio: float, *, step: int = 0, **options: Any
) -> TokenMap:
    """The map that removes `ratio` of x's tokens, the most similar ones.

    x is a transformer block's input, [B, rows·columns, C] in row order; `grid` is (rows, columns),
    `step` tells which random choice is made. The options are those fields of `MergeSettings` that
    say how tokens are matched: `stride`, here (2, 2) if it isn't given, `partition`, `window` and
    `shared_draw`. Raises `SettingsError` (a `ValueError`) for an option out of its range, and
    `ValueError` where x is not on the grid. With a window the number of tokens left is rounded, see
    `tokens_removed`.
    """
    rows, columns = grid
    settings = MergeSettings(ratio=ratio, schedule="constant", **{"stride": (2, 2), **options})
    if x.ndim != 3 or x.shape[1] != rows * columns:
        raise ValueError(
            f"x must be [B, {rows * columns}, C] on a grid of {rows}×{columns}, got {list(x.shape)}"
        )
    draws = 1 if settings.shared_draw else x.shape[0]
    split = make_partition(
        (rows, columns), settings.cell, settings.partition, step, settings.window, draws, x.device
    )
    removed = tokens_removed(x.shape[1], settings.ratio, rounded=not settings.exact)
    return match(x, split, settings.exact).token_map(removed)
