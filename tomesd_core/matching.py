"""Which source falls into which destination: bipartite soft matching (paper, section 3.1), inside windows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .partition import Partition, make_partition
from .plan import tokens_removed
from .settings import MergeSettings
from .token_map import TokenMap

SIMILARITY_BYTES = 64 * 2**20
"""The similarity matrix never takes more than this at once."""

CACHED_BYTES = 4 * 2**20
"""On the CPU the similarities of a few windows at a time stay in its cache, where their maximum is found."""


@dataclasses.dataclass(frozen=True)
class Matching:
    """Every src's best dst, and the src in the order of their similarity. Keeps indices, never activations."""

    partition: Partition
    best: Tensor
    """[B, n_src]: the best dst of each src, as its place in the partition's `dst`."""
    order: Tensor
    """[B, n_src]: the src, most similar first."""

    def token_map(self, removed: int) -> TokenMap:
        """The map that merges the `removed` most similar src into their dst; at most as many as can merge."""
        (items, sources), partition = self.best.shape, self.partition
        removed = max(0, min(removed, partition.most_removed))
        dst_count, device = partition.dst.shape[1], self.best.device
        own = torch.arange(dst_count, dst_count + sources - removed, device=device).expand(items, -1)
        src_slots = self.best.scatter(1, self.order[:, removed:], own)
        dst_slots = torch.arange(dst_count, device=device).expand(items, -1)
        slots = torch.empty(items, partition.tokens, dtype=torch.long, device=device)
        slots.scatter_(1, partition.dst.expand(items, -1), dst_slots)
        slots.scatter_(1, partition.src.expand(items, -1), src_slots)
        return TokenMap(slots, partition.tokens - removed)


@torch.no_grad()
def match(x: Tensor, partition: Partition, exact: bool = False) -> Matching:
    """Finds every src's most similar dst of its window, by the cosine of x's tokens ([B, N, C]).

    A token of zero norm is similar to none. What isn't finite in one batch item leaves the other items' matching as it
    is; inside its own item attention spreads it to every token, whatever is merged.
    `exact` keeps at least x's own precision; else a lower one may be used where that is faster: `similarity_dtype`.
    """
    items = x.shape[0]
    if not partition.most_removed or not items:
        order = torch.arange(partition.src.shape[1], device=x.device).expand(items, -1)
        return Matching(partition, torch.zeros_like(order), order)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    # In norm's own precision: in a half type the inverse of a small norm is infinite.
    scale = torch.where(norm.reciprocal().isfinite(), norm.reciprocal(), torch.zeros_like(norm)).flatten()
    has_autocast = x.device.type in ("cpu", "cuda")
    with torch.autocast(x.device.type, enabled=False) if exact and has_autocast else contextlib.nullcontext():
        dtype = similarity_dtype(x, exact)
        similarity, best = _best_in_windows(x, partition, scale, dtype, exact)
    return Matching(partition, best, similarity.sort(dim=1, descending=True, stable=True).indices)


def similarity_dtype(x: Tensor, exact: bool = False) -> torch.dtype:
    """The dtype in which x's similarities are computed: x's own, but on the CPU the one that it multiplies fastest.

    `exact` is never less precise than x. Where the CPU multiplies bf16 by itself, matching 64×64 tokens of 320 channels
    took 0.68 of the time that it takes in fp32, and 256×256 tokens 0.61 (`bench layer`, "keys" and "ours, exact").
    """
    if x.device.type != "cpu":
        return x.dtype
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if not exact and has_bf16() else torch.promote_types(x.dtype, torch.float32)


def _best_in_windows(
    x: Tensor, partition: Partition, scale: Tensor, dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor]:
    """[B, n_src] twice: the highest similarity of each src, and the place in `partition.dst` where it was found."""
    items, windows = x.shape[0], partition.windows
    flat = x.reshape(-1, x.shape[-1])
    src, dst = partition.rows(items)
    (count, sources), destinations = src.shape, dst.shape[1]
    # A src's own length changes neither its best dst nor, divided out afterwards, its similarity. But unit vectors are
    # what can't overflow in fp16, and what the paper's code multiplies.
    src_is_unit = exact or dtype == torch.float16

    def tokens_at(rows: Tensor, unit: bool) -> Tensor:
        """[…, C]: the tokens in `rows`, of length one where `unit` says so."""
        numbers = rows.flatten()
        tokens = flat.index_select(0, numbers)
        return (tokens * scale.index_select(0, numbers)[:, None] if unit else tokens).view(*rows.shape, -1)

    limit = CACHED_BYTES if x.device.type == "cpu" else SIMILARITY_BYTES
    row_bytes = destinations * torch.finfo(dtype).bits // 8
    rows_at_once = min(sources, max(1, limit // row_bytes))
    # Rows are divided only where not even one window fits.
    windows_at_once = max(1, limit // (rows_at_once * row_bytes)) if rows_at_once == sources else 1
    values, indices = [], []
    for some in range(0, count, windows_at_once):
        b = tokens_at(dst[some : some + windows_at_once], unit=True).to(dtype).transpose(1, 2)
        for top in range(0, sources, rows_at_once):
            a = tokens_at(src[some : some + windows_at_once, top : top + rows_at_once], src_is_unit).to(dtype)
            value, index = torch.bmm(a, b).max(dim=-1)
            values.append(value.to(scale.dtype).flatten())
            indices.append(index.flatten())
    similarity, best = torch.cat(values), torch.cat(indices).view(items, -1, sources)
    if not src_is_unit:
        similarity = similarity * scale.index_select(0, src.flatten())
    best = best + torch.arange(count // items, device=x.device)[:, None] * destinations
    best = windows.dst.flatten()[best.flatten(1)]
    return similarity.view(items, -1)[:, windows.src_place], best[:, windows.src_place]


def match_tokens(x: Tensor, grid: Sequence[int], ratio: float, *, step: int = 0, **options: Any) -> TokenMap:
    """The map that removes `ratio` of x's tokens, the most similar ones.

    x is a transformer block's input, [B, rows·columns, C] in row order; `grid` is (rows, columns), `step` tells which
    random choice is made. The options are those fields of `MergeSettings` that say how tokens are matched: `stride`,
    here (2, 2) if it isn't given, `partition`, `window` and `shared_draw`. Raises `SettingsError` (a `ValueError`) for
    an option out of its range, and `ValueError` where x is not on the grid. With a window the number of tokens left is
    rounded, see `tokens_removed`.
    """
    rows, columns = grid
    settings = MergeSettings(ratio=ratio, schedule="constant", **{"stride": (2, 2), **options})
    if x.ndim != 3 or x.shape[1] != rows * columns:
        raise ValueError(f"x must be [B, {rows * columns}, C] on a grid of {rows}×{columns}, got {list(x.shape)}")
    draws = 1 if settings.shared_draw else x.shape[0]
    split = make_partition((rows, columns), settings.cell, settings.partition, step, settings.window, draws, x.device)
    removed = tokens_removed(x.shape[1], settings.ratio, rounded=not settings.exact)
    return match(x, split, settings.exact).token_map(removed)
