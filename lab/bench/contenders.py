"""What is measured beside each other: a way to put it on a UNet and to take it off again, and its matching alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tomesd_core.hooks import attach
from tomesd_core.matching import match, tokens_removed
from tomesd_core.partition import make_partition
from tomesd_core.settings import FIELDS, MergeSettings
from tomesd_core.unet import Layer, find_layers, finest_level

from .packages import INSTALL, MissingPackage, require

UNMERGED, OURS, CORNER, RANDOM, LIMIT = "unmerged", "ours", "tomesd corner", "tomesd random", "limit"

OVER_PEERS = {"over_tomesd_corner": CORNER, "over_tomesd_random": RANDOM}
OVER_OTHERS = {**OVER_PEERS, "over_limit": LIMIT}
"""Columns that hold a contender's measure over another's."""

PEER_BYTES = 4e9
"""Where `tomesd`'s similarities alone would take more than this, it is left out."""

WHOLE_IMAGE_SIDE = 128
"""Up to this side of a grid, in tokens, our own matching over the whole image is measured too: its time is N²."""


@dataclasses.dataclass(frozen=True)
class Running:
    """A contender that is on a UNet."""

    begin_step: Callable[[int, int], None] = lambda step, total: None
    """Says that the UNet's next passes belong to this step, from 0, of so many."""
    describe: Callable[[], str] = str
    """What was merged, for people; may be empty."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run a UNet."""

    name: str
    put_on: Callable[[nn.Module, float], contextlib.AbstractContextManager[Running]]
    """(UNet, ratio): while open, the UNet runs so; nothing is left behind."""


Apply = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Matcher:
    """One way to match tokens."""

    name: str
    match: Callable[[Tensor, tuple[int, int], float, int], tuple[Apply, Apply]]
    """(x [B, N, C], grid (rows, columns), ratio, step) to merge [B, N, C] to [B, M, C], and unmerge, its reverse."""
    steps: int = 1
    """For how many steps a matching is kept."""


def contenders(
    tokens: int, dtype: torch.dtype, settings: MergeSettings | None = None
) -> tuple[list[Contender], list[str]]:
    """What can run on a UNet whose finest self-attention sees `tokens`, at batch 2; and notes on what is left out.

    Ours runs with `settings` at the ratio that is measured.
    """
    peers, notes = peers_or_why_not(tokens, dtype)
    ours = functools.partial(WAYS[OURS], settings=settings or MergeSettings())
    ways = {name: ours if name == OURS else WAYS[name] for name in (UNMERGED, OURS, *peers, LIMIT)}
    return [Contender(name, put_on) for name, put_on in ways.items()], notes


def matchers(side: int, dtype: torch.dtype, reuse_steps: int = 1) -> tuple[list[Matcher], list[str]]:
    """What can match a grid of `side`×`side` tokens at batch 2, and notes on what is left out.

    `reuse_steps` above 1 adds ours with a matching kept for so many steps. "exact" is ours without a lower precision
    for the similarities: what that brings.
    """
    windowed = functools.partial(_match_ours, window=FIELDS["window"].default, exact=False)
    found = [Matcher(OURS, windowed)]
    if reuse_steps > 1:
        found.append(Matcher(f"{OURS}, kept for {reuse_steps} steps", windowed, reuse_steps))
    found.append(Matcher(f"{OURS}, exact", functools.partial(windowed, exact=True)))
    notes = []
    if side <= WHOLE_IMAGE_SIDE:
        found.append(Matcher(f"{OURS}, whole image", functools.partial(windowed, window=None, exact=True)))
    else:
        notes.append(f"{OURS}, whole image: left out at {side}x{side} tokens, its time grows with their square")
    peers, peer_notes = peers_or_why_not(side * side, dtype)
    found += [Matcher(name, functools.partial(_match_tomesd, use_rand=name == RANDOM)) for name in peers]
    return found, notes + peer_notes


def merged_layers(unet: nn.Module) -> list[Layer]:
    """The layers that the default settings merge in."""
    layers = find_layers(unet)
    most = max(FIELDS["max_downsample"].default, finest_level(layers) or 1)
    return [layer for layer in layers if layer.is_self_attention and layer.level is not None and layer.level <= most]


def peer_versions() -> str:
    """The peers that are installed, for people."""
    try:
        return f"tomesd {importlib.metadata.version('tomesd')}"
    except importlib.metadata.PackageNotFoundError:
        return "tomesd not installed"


def similarity_bytes(tokens: int, dtype: torch.dtype) -> int:
    """What `tomesd`'s similarities of every src (three quarters) and every dst (the rest) take, at batch 2."""
    return 2 * (tokens - tokens // 4) * (tokens // 4) * torch.finfo(dtype).bits // 8


def peers_or_why_not(tokens: int, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """The names of the peers that can run where the finest self-attention sees `tokens`; a note where none can."""
    try:
        require("tomesd")
    except MissingPackage:
        return [], [f"tomesd is left out, since it is not installed: {INSTALL['tomesd']}"]
    needed = similarity_bytes(tokens, dtype)
    if needed > PEER_BYTES:
        return [], [
            f"tomesd is left out at {tokens} tokens: its similarities alone take {needed / 1e9:.1f} GB, "
            f"above {PEER_BYTES / 1e9:.0f} GB"
        ]
    return [CORNER, RANDOM], []


@contextlib.contextmanager
def _unmerged(unet: nn.Module, ratio: float) -> Iterator[Running]:
    yield Running()


@contextlib.contextmanager
def _ours(unet: nn.Module, ratio: float, settings: MergeSettings) -> Iterator[Running]:
    with attach(unet, dataclasses.replace(settings, ratio=ratio)) as merging:
        yield Running(merging.set_step, lambda: merging.report().summary)


@contextlib.contextmanager
def _tomesd(unet: nn.Module, ratio: float, use_rand: bool) -> Iterator[Running]:
    tomesd = require("tomesd")
    model = nn.Module()
    model.model = nn.Module()
    model.model.diffusion_model = unet
    tomesd.apply_patch(model, ratio=ratio, use_rand=use_rand)
    try:
        yield Running()
    finally:
        tomesd.remove_patch(model)
        for module in unet.modules():
            vars(module).pop("_tome_info", None)


@contextlib.contextmanager
def _limit(unet: nn.Module, ratio: float) -> Iterator[Running]:
    """Attention over N(1-r) tokens, at no other cost: what no merging can beat.

    The fewer tokens are the first rows of the contiguous input, taken as a view, and each token's output is a view of
    the first row of what comes out. So nothing is computed or copied besides the attention itself, and nothing is
    allocated: the two hooks are a few µs of Python. The picture is nonsense; its time is not. The number of tokens is
    rounded as ours is: over an odd length attention is slower, and this would not be the limit.
    """
    whole: dict[nn.Module, int] = {}

    def fewer(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> tuple[object, object]:
        y, *others = args
        items, whole[module], channels = y.shape
        kept = whole[module] - tokens_removed(whole[module], ratio, exact=False)
        # Not y[:, :kept], which is not contiguous: each of the three projections would copy it.
        return (y.view(-1, channels)[: items * kept].view(items, kept, channels), *others), kwargs

    def widened(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output[:, :1].expand(-1, whole[module], -1)

    with contextlib.ExitStack() as handles:
        for layer in merged_layers(unet) if ratio else []:
            attn1 = layer.block.attn1
            handles.callback(attn1.register_forward_pre_hook(fewer, with_kwargs=True).remove)
            handles.callback(attn1.register_forward_hook(widened).remove)
        yield Running()


WAYS: dict[str, Callable[..., contextlib.AbstractContextManager[Running]]] = {
    UNMERGED: _unmerged,
    OURS: _ours,
    CORNER: functools.partial(_tomesd, use_rand=False),
    RANDOM: functools.partial(_tomesd, use_rand=True),
    LIMIT: _limit,
}
"""By name: what puts a contender on a UNet at a ratio; ours takes the other `settings` besides."""


def _match_ours(
    x: Tensor, grid: tuple[int, int], ratio: float, step: int, window: int | None, exact: bool
) -> tuple[Apply, Apply]:
    split = make_partition(grid, step=step, window=window, device=x.device)
    token_map = match(x, split, exact).token_map(tokens_removed(x.shape[1], ratio, exact=window is None))
    return token_map.merge, token_map.unmerge


def _match_tomesd(x: Tensor, grid: tuple[int, int], ratio: float, step: int, use_rand: bool) -> tuple[Apply, Apply]:
    tomesd = require("tomesd")
    rows, columns = grid
    generator = torch.Generator(x.device).manual_seed(step) if use_rand else None
    return tomesd.merge.bipartite_soft_matching_random2d(
        x, columns, rows, 2, 2, int(x.shape[1] * ratio), no_rand=not use_rand, generator=generator
    )
