"""Other token merging methods, attached to a UNet's finest self-attention as published.

`tomesd` is the package of the paper (arXiv 2303.17604), with the corner or a random token of each
2×2 cell as destination; WebUI's own token merging is its corner. Forge and ComfyUI merge queries
alone with the same matching. ToDo (arXiv 2402.13573) keeps every second or fourth token as key in
each direction. CA-ToMe (arXiv 2501.00946, the package `ca-tome`) merges tokens above a similarity
threshold, and matches in a few steps only. ToMA (arXiv 2509.10918) chooses destinations by facility
location in tiles, and merges and unmerges by products with soft weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd_core.plan import coarsest_level
from tomesd_core.settings import MergeSettings
from tomesd_core.unet import LDM, Layer, find_layers, names_in

from .packages import require

CORNER, RANDOM = "tomesd corner", "tomesd random"
QUERIES = "queries only"
TODO, CA_TOME, TOMA = "ToDo", "CA-ToMe", "ToMA"

TOMESD_MOST = 0.75
"""Highest ratio that `tomesd`'s 2×2 cells allow; it silently clips higher ones."""

TODO_FACTORS = {0.75: 2, 0.9375: 4}
"""By ratio: ToDo keeps one token of this many in each direction."""

CA_TOME_STEPS, CA_TOME_MATCHES = 50, (0, 8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49)
"""Steps of 50 in which CA-ToMe matches: the third and best of its published configurations."""

TOMA_TILE, TOMA_TEMPERATURE = 8, 0.1
"""Side of ToMA's tiles in tokens, and the temperature of its softmax."""

Apply = Callable[[Tensor], Tensor]
Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Attached:
    """A contender attached to a UNet."""

    begin_step: Callable[[int, int], None] = lambda step, total: None
    """Called with the step, from 0, and the number of steps, before the passes of that step."""
    describe: Callable[[], str] = str
    """Summary of what was merged; may be empty."""
    pairs: Callable[[], float | None] = lambda: None
    """Fraction of query-key pairs left in merged layers; None if the ratio alone decides."""


Attachment = contextlib.AbstractContextManager[Attached]
"""While open, the contender is attached to a UNet; closing it leaves nothing behind."""


def merged_layers(unet: nn.Module) -> list[Layer]:
    """Layers that the default settings merge in."""
    layers = find_layers(unet)
    coarsest = coarsest_level(MergeSettings(), layers)
    return [
        layer
        for layer in layers
        if layer.is_self_attention and (layer.level or coarsest + 1) <= coarsest
    ]


def match_tomesd(
    x: Tensor, grid: Grid, ratio: float, step: int, use_rand: bool
) -> tuple[Apply, Apply]:
    """Run `tomesd`'s matching; return its merge and unmerge functions."""
    tomesd = require("tomesd")
    rows, columns = grid
    generator = torch.Generator(x.device).manual_seed(step) if use_rand else None
    return tomesd.merge.bipartite_soft_matching_random2d(
        x, columns, rows, 2, 2, int(x.shape[1] * ratio), no_rand=not use_rand, generator=generator
    )


def _as_checkpoint(unet: nn.Module) -> nn.Module:
    """Wrap a UNet as `.model.diffusion_model`, where packages that patch ldm models look."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.diffusion_model = unet
    return model


@contextlib.contextmanager
def _tomesd(unet: nn.Module, ratio: float, use_rand: bool) -> Iterator[Attached]:
    tomesd = require("tomesd")
    model = _as_checkpoint(unet) if names_in(unet) is LDM else unet
    tomesd.apply_patch(model, ratio=ratio, use_rand=use_rand)
    try:
        yield Attached()
    finally:
        tomesd.remove_patch(model)
        for module in unet.modules():
            vars(module).pop("_tome_info", None)


def _ca_tome_patch() -> types.ModuleType:
    """Import `ca_tome.patch` without its package, which imports an older diffusers."""
    if "ca_tome" not in sys.modules:
        spec = importlib.util.find_spec("ca_tome")
        if spec is None:
            require("ca_tome")
        package = types.ModuleType("ca_tome")
        package.__path__, package.__spec__ = spec.submodule_search_locations, spec
        sys.modules["ca_tome"] = package
    return importlib.import_module("ca_tome.patch")


@contextlib.contextmanager
def _ca_tome(unet: nn.Module, threshold: float) -> Iterator[Attached]:
    patch, model = _ca_tome_patch(), _as_checkpoint(unet)
    patch.apply_patch(model, compute_on=list(CA_TOME_MATCHES), r=threshold)
    blocks = [module for module in unet.modules() if hasattr(module, "_ca_tome_info")]
    shares: list[float] = []
    wholes: dict[nn.Module, int] = {}

    def begin_step(step: int, total: int) -> None:
        of_50 = range(step * CA_TOME_STEPS // total, (step + 1) * CA_TOME_STEPS // total)
        here = next((one for one in of_50 if one in CA_TOME_MATCHES), -1)
        for block in blocks:
            block.inference_step = here

    def see_whole(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        wholes[block] = args[0].shape[1]

    with contextlib.ExitStack() as handles:
        for layer in merged_layers(unet):

            def count(
                _: nn.Module, args: tuple[Tensor, ...], block: nn.Module = layer.block
            ) -> None:
                shares.append((args[0].shape[1] / wholes[block]) ** 2)

            handles.callback(layer.block.register_forward_pre_hook(see_whole).remove)
            handles.callback(layer.block.attn1.register_forward_pre_hook(count).remove)
        try:
            begin_step(0, CA_TOME_STEPS)
            yield Attached(begin_step, pairs=lambda: sum(shares) / len(shares) if shares else None)
        finally:
            patch.remove_patch(model)
            for module in unet.modules():
                for name in ("_ca_tome_info", "_cache_info", "inference_step"):
                    vars(module).pop(name, None)


Wrap = Callable[[Tensor, Grid, float], "tuple[Tensor, Tensor, Apply]"]
"""(y [B, N, C], grid, ratio) to the inputs of queries and keys, [B, M, C], and the unmerging."""


@contextlib.contextmanager
def around_attention(unet: nn.Module, ratio: float, wrap: Wrap) -> Iterator[Attached]:
    """Make the queries and keys of merged layers from the tokens that `wrap` returns."""
    grids: dict[nn.Module, Grid] = {}
    unmerging: dict[nn.Module, Apply] = {}

    def see_grid(transformer: nn.Module, args: tuple[Tensor, ...]) -> None:
        grids[transformer] = tuple(args[0].shape[-2:])

    def merge(
        layer: Layer, attn1: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[object, object]:
        queries, keys, unmerging[attn1] = wrap(args[0], grids[layer.transformer], ratio)
        return (queries,), {**kwargs, layer.names.context: keys}

    def unmerge(attn1: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return unmerging.pop(attn1)(output)

    with contextlib.ExitStack() as handles:
        for layer in merged_layers(unet) if ratio else []:
            attn1, transformer = layer.block.attn1, layer.transformer
            before = functools.partial(merge, layer)
            handles.callback(transformer.register_forward_pre_hook(see_grid).remove)
            handles.callback(attn1.register_forward_pre_hook(before, with_kwargs=True).remove)
            handles.callback(attn1.register_forward_hook(unmerge).remove)
        yield Attached()


def attending_to(
    unet: nn.Module, ratio: float, choose: Callable[[Tensor, Grid, float], Tensor]
) -> Attachment:
    """Let all tokens attend to those, [B, M, C], that `choose` returns for (y, grid, ratio)."""

    def wrap(y: Tensor, grid: Grid, ratio: float) -> tuple[Tensor, Tensor, Apply]:
        return y, choose(y, grid, ratio), lambda output: output

    return around_attention(unet, ratio, wrap)


def _every_second(y: Tensor, grid: Grid, ratio: float) -> Tensor:
    """ToDo's keys and values: every second or fourth token in each direction (section 3.1)."""
    factor = TODO_FACTORS[ratio]
    return y.unflatten(1, grid)[:, ::factor, ::factor].flatten(1, 2)


def _merged_queries(y: Tensor, grid: Grid, ratio: float) -> tuple[Tensor, Tensor, Apply]:
    merge, unmerge = match_tomesd(y, grid, ratio, step=0, use_rand=False)
    return merge(y), y, unmerge


def merge_softly(y: Tensor, grid: Grid, ratio: float) -> tuple[Tensor, Tensor, Apply]:
    """ToMA's merged tokens, recomputed in every call; the paper keeps them for several steps."""
    weights = toma_weights(y, grid, ratio)
    means = (weights / weights.sum(-1, keepdim=True)).to(y.dtype)
    merged = (means @ in_tiles(y, grid)).flatten(1, 2)

    def unmerge(output: Tensor) -> Tensor:
        tiles = output.unflatten(1, weights.shape[1:3])
        return untiled(weights.to(output.dtype).mT @ tiles, grid)

    return merged, merged, unmerge


def _tile_shape(grid: Grid) -> tuple[int, int, int, int]:
    """Rows and columns of tiles, and rows and columns of tokens in each."""
    rows, columns = (side // TOMA_TILE if side % TOMA_TILE == 0 else 1 for side in grid)
    return rows, columns, grid[0] // rows, grid[1] // columns


def in_tiles(y: Tensor, grid: Grid) -> Tensor:
    """[B, N, C] to [B, tiles, tokens, C]; one tile if `TOMA_TILE` doesn't divide the sides."""
    rows, columns, high, wide = _tile_shape(grid)
    tiled = y.view(len(y), rows, high, columns, wide, -1).transpose(2, 3)
    return tiled.reshape(len(y), rows * columns, high * wide, -1)


def untiled(tiles: Tensor, grid: Grid) -> Tensor:
    """Inverse of `in_tiles`."""
    rows, columns, high, wide = _tile_shape(grid)
    y = tiles.view(len(tiles), rows, columns, high, wide, -1).transpose(2, 3)
    return y.reshape(len(tiles), grid[0] * grid[1], -1)


def facility_locations(similarity: Tensor, count: int) -> Tensor:
    """Choose `count` tokens that represent all N, greedily (ToMA, section 4.1): [..., count].

    Each is the token that most raises the sum, over all tokens, of the similarity ([..., N, N]) to
    the nearest chosen one.
    """
    covered = torch.full_like(similarity[..., 0], -1.0)
    chosen = []
    for _ in range(count):
        gains = (similarity - covered.unsqueeze(-1)).clamp(min=0).sum(-2)
        chosen.append(gains.argmax(-1, keepdim=True))
        index = chosen[-1].unsqueeze(-2).expand(*covered.shape, 1)
        covered = torch.maximum(covered, similarity.gather(-1, index).squeeze(-1))
    return torch.cat(chosen, -1)


def toma_weights(y: Tensor, grid: Grid, ratio: float) -> Tensor:
    """Weight of each token in each destination of its tile: [B, tiles, destinations, tokens]."""
    tiles = F.normalize(in_tiles(y, grid).float(), dim=-1)
    similarity = tiles @ tiles.mT
    destinations = facility_locations(similarity, max(1, round(similarity.shape[-1] * (1 - ratio))))
    rows = destinations.unsqueeze(-1).expand(-1, -1, -1, similarity.shape[-1])
    return (similarity.gather(-2, rows) / TOMA_TEMPERATURE).softmax(-2)


ATTACH_PEER: dict[str, Callable[[nn.Module, float], Attachment]] = {
    CORNER: functools.partial(_tomesd, use_rand=False),
    RANDOM: functools.partial(_tomesd, use_rand=True),
    QUERIES: functools.partial(around_attention, wrap=_merged_queries),
    TODO: functools.partial(attending_to, choose=_every_second),
    CA_TOME: _ca_tome,
    TOMA: functools.partial(around_attention, wrap=merge_softly),
}
"""By name: attaches a peer to a UNet at a ratio; for CA-ToMe, a similarity threshold."""
