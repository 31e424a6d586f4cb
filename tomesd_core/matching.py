"""Bipartite soft matching (paper, section 3.1), inside windows."""

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
"""Limit on the size of the similarity matrix."""

CACHED_BYTES = 4 * 2**20
"""Limit on the CPU, so that the similarities stay in its cache until their maximum is found."""


@dataclasses.dataclass(frozen=True)
class Matching:
    """The most similar dst of every src. Holds indices and similarities, no activations."""

    partition: Partition
    best: Tensor
    """[B, W·S], int32: the best dst of each src, an index into `partition.dst`."""
    similarity: Tensor
    """[B, W·S]: the cosine similarity of each src and its best dst."""

    def least_similar(self, count: int) -> Tensor:
        """[B, count]: the `count` least similar src, as places in window order."""
        place = self.partition.src_place
        similarity = self.similarity.index_select(1, place)
        if similarity.device.type in token_maps.BAG_DEVICES - {"cpu"}:
            # On CUDA topk is one kernel, and a full sort a dozen. Its choice among equal values is
            # fixed.
            least = similarity.topk(count, dim=1, largest=False, sorted=False).indices
        else:
            least = similarity.sort(dim=1, descending=True, stable=True).indices[:, -count:]
        return place[least]

    def token_map(self, removed: int) -> TokenMap:
        """Merge the `removed` most similar src into their dst, or as many as possible."""
        partition, best = self.partition, self.best
        items, dst_count = best.shape[0], partition.dst.shape[1]
        kept = partition.src.shape[1] - max(0, min(removed, partition.most_removed))
        own = numbers(partition.tokens, best.device)[: dst_count + kept].expand(items, -1)
        if kept:
            best = best.scatter(1, self.least_similar(kept), own[:, dst_count:])
        slots = torch.cat([own[:, :dst_count], best], dim=1)
        return TokenMap(slots.gather(1, partition.rows(items).inverse), dst_count + kept)


@torch.no_grad()
def match(x: Tensor, partition: Partition, exact: bool = False) -> Matching:
    """Find the most similar dst of every src in its window, by the cosine of x's tokens ([B, N,
    C]).

    A token of norm zero is similar to none. Non-finite values in one batch item don't affect the
    matching of other items; within the item attention spreads them to every token anyway. `exact`
    keeps at least x's precision; otherwise `similarity_dtype` may choose a faster one.
    """
    items = x.shape[0]
    if not partition.most_removed or not items:
        best = torch.zeros(items, partition.window_src.numel(), dtype=torch.int32, device=x.device)
        return Matching(partition, best, best.float())
    has_autocast = x.device.type in ("cpu", "cuda")
    with (
        torch.autocast(x.device.type, enabled=False)
        if exact and has_autocast
        else contextlib.nullcontext()
    ):
        return _match_in_windows(x, partition, similarity_dtype(x, exact), exact)


def similarity_dtype(x: Tensor, exact: bool = False) -> torch.dtype:
    """The dtype of x's similarities: x's own, but on the CPU the one that it multiplies fastest.

    `exact` is never less precise than x. On a CPU with bf16 instructions matching took 0.68 of the
    fp32 time for 64×64 tokens of 320 channels, and 0.61 for 256×256 tokens (`bench layer`, "keys"
    and "ours, exact").
    """
    if x.device.type != "cpu":
        return x.dtype
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return (
        torch.bfloat16 if not exact and has_bf16() else torch.promote_types(x.dtype, torch.float32)
    )


def _match_in_windows(x: Tensor, partition: Partition, dtype: torch.dtype, exact: bool) -> Matching:
    """Match as many windows at a time as the limit on the similarities' size allows."""
    items = x.shape[0]
    flat, rows = x.reshape(-1, x.shape[-1]), partition.rows(items)
    count, destinations = rows.dst.shape
    sources = rows.tokens.shape[1] - destinations
    limit = CACHED_BYTES if x.device.type == "cpu" else SIMILARITY_BYTES
    row_bytes = destinations * torch.finfo(dtype).bits // 8
    rows_at_once = min(sources, max(1, limit // row_bytes))
    # Rows are divided only if a single window doesn't fit.
    windows_at_once = max(1, limit // (rows_at_once * row_bytes))
    values, indices = [], []
    for some in range(0, count, windows_at_once):
        tokens, inverse = _with_inverse_length(flat, rows.tokens[some : some + windows_at_once])
        b = _product(tokens[:, sources:], inverse[:, sources:], dtype).transpose(1, 2)
        # Dividing by the length of the src changes neither its best dst nor, applied afterwards,
        # its similarity. With normalized dst a product is at most that length, which fp16 holds.
        # The paper's code normalizes both.
        a, length = tokens[:, :sources], inverse[:, :sources]
        a = _product(a, length, dtype) if exact else a.to(dtype)
        for top in range(0, sources, rows_at_once):
            value, index = torch.bmm(a[:, top : top + rows_at_once], b).max(dim=-1)
            values.append(value if exact else value * length[:, top : top + rows_at_once, 0])
            indices.append(index)
    # Join the parts of divided windows.
    best = rows.dst.gather(1, _joined(indices).view(count, sources)).view(items, -1)
    return Matching(partition, best, _joined(values).view(items, -1))


def _with_inverse_length(flat: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[…, C]: the tokens ([n, C]) at `rows`; […, 1]: one over their lengths, in fp32 or wider."""
    tokens = flat.index_select(0, rows.flatten()).view(*rows.shape, -1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=wide)
    return tokens, length.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in `dtype`, rounded once."""
    return torch.mul(a, b, out=torch.empty(a.shape, dtype=dtype, device=a.device))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def match_tokens(
    x: Tensor, grid: Sequence[int], ratio: float, *, step: int = 0, **options: Any
) -> TokenMap:
    """The map that merges the fraction `ratio` of x's tokens, the most similar ones.

    x is [B, N, C] in row order; `grid` is (rows, columns), and `step` selects the random draw. The
    options are the matching fields of `MergeSettings`: `stride`, here (2, 2) by default,
    `partition`, `window` and `shared_draw`. With a window the number of tokens left is rounded, see
    `tokens_removed`.

    Raises `SettingsError` (a `ValueError`) for an option out of its range, and `ValueError` if x
    doesn't fit the grid.
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
