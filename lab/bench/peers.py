"""The methods of others that ours are measured beside, each put on a UNet's finest self-attention
as it was published.

`tomesd` is the package of the paper (arXiv 2303.17604), with its corner or a random token of each
2×2 cell as destination; WebUI's own token merging is its corner. Forge and ComfyUI merge queries
alone by the same matching. ToDo (arXiv 2402.13573) keeps every second or fourth token as key in
each direction. CA-ToMe (arXiv 2501.00946, the package `ca-tome`) merges tokens more similar than a
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
"""The highest ratio that `tomesd`'s cells of 2×2 allow; above it, it removes as much, and says
nothing."""

TODO_FACTORS = {0.75: 2, 0.9375: 4}
"""By ratio: of how many tokens in each direction ToDo keeps one."""

CA_TOME_STEPS, CA_TOME_MATCHES = 50, (0, 8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49)
"""In which of 50 steps CA-ToMe matches: the third of its published configurations, its best."""

TOMA_TILE, TOMA_TEMPERATURE = 8, 0.1
"""Side of ToMA's tiles, in tokens, and what its similarities are divided by."""

Apply = Callable[[Tensor], Tensor]
Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Running:
    """A contender that is on a UNet."""

    begin_step: Callable[[int, int], None] = lambda step, total: None
    """Called with the step, from 0, and the number of steps, before the UNet's passes of that step.
    """
    describe: Callable[[], str] = str
    """What was merged, for people; may be empty."""
    pairs: Callable[[], float | None] = lambda: None
    """The share of query-key pairs that was left in merged layers; None where the ratio alone
    decides."""


OnUnet = contextlib.AbstractContextManager[Running]
"""While open, a UNet runs as a contender says; nothing is left behind."""


def merged_layers(unet: nn.Module) -> list[Layer]:
    """The layers that the default settings merge in."""
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
    """`tomesd`'s own matching: what merges, and what unmerges."""
    tomesd = require("tomesd")
    rows, columns = grid
    generator = torch.Generator(x.device).manual_seed(step) if use_rand else None
    return tomesd.merge.bipartite_soft_matching_random2d(
        x, columns, rows, 2, 2, int(x.shape[1] * ratio), no_rand=not use_rand, generator=generator
    )


def _as_checkpoint(unet: nn.Module) -> nn.Module:
    """What packages that patch models look for in ldm: a module with `.model.diffusion_model`."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.diffusion_model = unet
    return model


@contextlib.contextmanager
def _tomesd(unet: nn.Module, ratio: float, use_rand: bool) -> Iterator[Running]:
    tomesd = require("tomesd")
    model = _as_checkpoint(unet) if names_in(unet) is LDM else unet
    tomesd.apply_patch(model, ratio=ratio, use_rand=use_rand)
    try:
        yield Running()
    finally:
        tomesd.remove_patch(model)
        for module in unet.modules():
            vars(module).pop("_tome_info", None)


def _ca_tome_patch() -> types.ModuleType:
    """`ca_tome.patch`, which needs torch alone, while its package imports pipelines of an older
    diffusers."""
    if "ca_tome" not in sys.modules:
        spec = importlib.util.find_spec("ca_tome")
        if spec is None:
            require("ca_tome")
        package = types.ModuleType("ca_tome")
        package.__path__, package.__spec__ = spec.submodule_search_locations, spec
        sys.modules["ca_tome"] = package
    return importlib.import_module("ca_tome.patch")


@contextlib.contextmanager
def _ca_tome(unet: nn.Module, threshold: float) -> Iterator[Running]:
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

            def count(attn1: nn.Module, args: tuple[Tensor, ...], layer: Layer = layer) -> None:
                shares.append((args[0].shape[1] / wholes[layer.block]) ** 2)

            handles.callback(layer.block.register_forward_pre_hook(see_whole).remove)
            handles.callback(layer.block.attn1.register_forward_pre_hook(count).remove)
        try:
            begin_step(0, CA_TOME_STEPS)
            yield Running(begin_step, pairs=lambda: sum(shares) / len(shares) if shares else None)
        finally:
            patch.remove_patch(model)
            for module in unet.modules():
                for name in ("_ca_tome_info", "_cache_info", "inference_step"):
                    vars(module).pop(name, None)


Wrap = Callable[[Tensor, Grid, float], "tuple[Tensor, Tensor, Apply]"]
"""(y [B, N, C], its grid, ratio) to the inputs of queries and keys, [B, M, C], and what unmerges
attention's output."""


@contextlib.contextmanager
def _around_attention(unet: nn.Module, ratio: float, wrap: Wrap) -> Iterator[Running]:
    """Every merged layer makes its queries and its keys from the tokens that `wrap` returns."""
    grids: dict[nn.Module, Grid] = {}
    unmerging: dict[nn.Module, Apply] = {}

    def see_grid(transformer: nn.Module, args: tuple[Tensor, ...]) -> None:
        grids[transformer] = tuple(args[0].shape[-2:])

    with contextlib.ExitStack() as handles:
        for layer in merged_layers(unet) if ratio else []:

            def before(
                attn1: nn.Module,
                args: tuple[Tensor, ...],
                kwargs: dict[str, object],
                layer: Layer = layer,
            ) -> tuple[object, object]:
                queries, keys, unmerging[attn1] = wrap(args[0], grids[layer.transformer], ratio)
                return (queries,), {**kwargs, layer.names.context: keys}

            def after(attn1: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return unmerging.pop(attn1)(output)

            handles.callback(layer.transformer.register_forward_pre_hook(see_grid).remove)
            handles.callback(
                layer.block.attn1.register_forward_pre_hook(before, with_kwargs=True).remove
            )
            handles.callback(layer.block.attn1.register_forward_hook(after).remove)
        yield Running()


def attending_to(
    unet: nn.Module, ratio: float, choose: Callable[[Tensor, Grid, float], Tensor]
) -> OnUnet:
    """All tokens attend to those that `choose` gives: ([B, N, C], their grid, ratio) to [B, M, C]."""
    return _around_attention(
        unet, ratio, lambda y, grid, ratio: (y, choose(y, grid, ratio), lambda output: output)
    )


def _every_second(y: Tensor, grid: Grid, ratio: float) -> Tensor:
    """ToDo's keys and values: every second, or fourth, token in each direction (section 3.1)."""
    factor = TODO_FACTORS[ratio]
    return y.unflatten(1, grid)[:, ::factor, ::factor].flatten(1, 2)


def _merged_queries(y: Tensor, grid: Grid, ratio: float) -> tuple[Tensor, Tensor, Apply]:
    merge, unmerge = match_tomesd(y, grid, ratio, step=0, use_rand=False)
    return merge(y), y, unmerge


def _soft(y: Tensor, grid: Grid, ratio: float) -> tuple[Tensor, Tensor, Apply]:
    """ToMA's destinations and weights, anew in every call; the paper keeps them for ten and five
    steps."""
    weights = toma_weights(y, grid, ratio)
    merged = _of_tiles(weights / weights.sum(-1, keepdim=True), y, grid)
    return merged, merged, lambda output: _to_tiles_back(weights, output, grid)


def _tiles(y: Tensor, grid: Grid) -> Tensor:
    """[B, N, C] to [B, tiles, tokens of a tile, C]; a grid that no tile divides is one tile."""
    rows, columns = (side // TOMA_TILE if side % TOMA_TILE == 0 else 1 for side in grid)
    high, wide = grid[0] // rows, grid[1] // columns
    tiled = y.view(len(y), rows, high, columns, wide, -1).transpose(2, 3)
    return tiled.reshape(len(y), rows * columns, high * wide, -1)


def _untiled(tiles: Tensor, grid: Grid) -> Tensor:
    """The way back from `_tiles`."""
    rows, columns = (side // TOMA_TILE if side % TOMA_TILE == 0 else 1 for side in grid)
    high, wide = grid[0] // rows, grid[1] // columns
    y = tiles.view(len(tiles), rows, columns, high, wide, -1).transpose(2, 3)
    return y.reshape(len(tiles), grid[0] * grid[1], -1)


def facility_locations(similarity: Tensor, count: int) -> Tensor:
    """[..., count] of [..., N, N]: tokens that stand for all others, found greedily (ToMA, section
    4.1).

    Each is the token that most raises the sum, over all tokens, of the similarity to the nearest
    one found so far.
    """
    covered = torch.full_like(similarity[..., 0], -1.0)
    found = []
    for _ in range(count):
        gains = (similarity - covered.unsqueeze(-1)).clamp(min=0).sum(-2)
        found.append(gains.argmax(-1, keepdim=True))
        nearest = similarity.gather(-1, found[-1].unsqueeze(-2).expand(*covered.shape, 1)).squeeze(
            -1
        )
        covered = torch.maximum(covered, nearest)
    return torch.cat(found, -1)


def toma_weights(y: Tensor, grid: Grid, ratio: float) -> Tensor:
    """How much of each token falls to each destination of its tile: [B, tiles, destinations,
    tokens]."""
    tiles = F.normalize(_tiles(y, grid).float(), dim=-1)
    similarity = tiles @ tiles.mT
    destinations = facility_locations(similarity, max(1, round(similarity.shape[-1] * (1 - ratio))))
    rows = destinations.unsqueeze(-1).expand(-1, -1, -1, similarity.shape[-1])
    return (similarity.gather(-2, rows) / TOMA_TEMPERATURE).softmax(-2)


def _of_tiles(weights: Tensor, y: Tensor, grid: Grid) -> Tensor:
    return (weights.to(y.dtype) @ _tiles(y, grid)).flatten(1, 2)


def _to_tiles_back(weights: Tensor, output: Tensor, grid: Grid) -> Tensor:
    merged = output.unflatten(1, weights.shape[1:3])
    return _untiled(weights.to(output.dtype).mT @ merged, grid)


PUT_ON: dict[str, Callable[[nn.Module, float], OnUnet]] = {
    CORNER: functools.partial(_tomesd, use_rand=False),
    RANDOM: functools.partial(_tomesd, use_rand=True),
    QUERIES: functools.partial(_around_attention, wrap=_merged_queries),
    TODO: functools.partial(attending_to, choose=_every_second),
    CA_TOME: _ca_tome,
    TOMA: functools.partial(_around_attention, wrap=_soft),
}
"""By name: puts a peer on a UNet, at a ratio; CA-ToMe takes the threshold of similarity in its
place."""
