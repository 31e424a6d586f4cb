"""What is measured beside each other: a way to put it on a UNet and to take it off again, and its
matching alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_core import hooks
from tomesd_core.matching import match
from tomesd_core.partition import make_partition
from tomesd_core.plan import tokens_removed
from tomesd_core.settings import METHODS, MergeSettings

from .packages import INSTALL, MissingPackage, require
from .peers import (
    CA_TOME,
    CORNER,
    PUT_ON,
    QUERIES,
    RANDOM,
    TODO,
    TODO_FACTORS,
    TOMESD_MOST,
    Apply,
    OnUnet,
    Running,
    attending_to,
    match_tomesd,
    merged_layers,
)

UNMERGED = "unmerged"
KEYS, TOKENS, PAPER = METHODS
UNWEIGHTED = "keys unweighted"
LIMIT_KEYS, LIMIT = "limit keys", "limit"

OURS = "ours"
"""The matching of all our methods."""
EXACT = f"{OURS}, exact"
"""It without a lower precision for the similarities: what that brings."""

LIMIT_OF = {
    **dict.fromkeys((KEYS, UNWEIGHTED, TODO), LIMIT_KEYS),
    **dict.fromkeys((TOKENS, PAPER, CORNER, RANDOM), LIMIT),
}
"""By contender: what none that merges as it does can beat."""

PEERS = {"over_tomesd_corner": CORNER, "over_tomesd_random": RANDOM}
MATCHING_OVER_PEERS = {
    column: dict.fromkeys((OURS, EXACT, *METHODS, CORNER, RANDOM), peer)
    for column, peer in PEERS.items()
}
OVER_OTHERS = {
    # At one ratio these leave as many pairs of queries and keys as the peers; keys leaves more.
    **{
        column: dict.fromkeys((TOKENS, PAPER, CORNER, RANDOM), peer)
        for column, peer in PEERS.items()
    },
    "over_limit": LIMIT_OF,
}
"""Columns that hold a contender's measure over that of another: by contender, whose."""

PEER_BYTES = 4e9
"""Where `tomesd`'s similarities alone would take more than this, it is left out."""

BASE: dict[str, Any] = {
    "ratio": 0.5,
    "schedule": "constant",
    "late_ratio": 0.2,
    "switch_at": 0.5,
    "max_downsample": 1,
    "min_tokens": 0,
    "reuse_steps": 1,
    "full_steps": 1,
    "method": PAPER,
    "stride": None,
    "partition": "random",
    "window": None,
    "skip_unprofitable": False,
    "shared_draw": True,
    "redraw": None,
}
"""What a table's row does not say otherwise: the paper's method, over the whole image.

Spelled out, never taken from the defaults: these are set from the tables, and must not move them.
In layers as small as the tiny model's merging hardly pays, and is seen all the same
(`skip_unprofitable`).
"""

_FORMER_SETTINGS = BASE | {"late_ratio": 0.4, "schedule": "linear", "reuse_steps": 4, "window": 32}
FORMER = {
    name: MergeSettings(**{**_FORMER_SETTINGS, **values})
    for name, values in {
        "Quality": {"ratio": 0.4, "late_ratio": 0.2},
        "Balanced": {"ratio": 0.6},
        "Fast": {"ratio": 0.75, "late_ratio": 0.5, "max_downsample": 2},
        "Paper (60 %)": {"ratio": 0.6, "late_ratio": 0.6, "schedule": "constant", "reuse_steps": 1},
    }.items()
}
"""The presets of version 0.1.0, whose names the shipped ones still have. `Balanced` was the
default."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run a UNet."""

    name: str
    put_on: Callable[[nn.Module], OnUnet]


@dataclasses.dataclass(frozen=True)
class Matcher:
    """One way to match tokens."""

    name: str
    match: Callable[[Tensor, tuple[int, int], float, int], tuple[Apply, Apply]]
    """(x [B, N, C], grid (rows, columns), ratio, step) to merge [B, N, C] to [B, M, C], and
    unmerge, its reverse."""


def contenders(
    names: Sequence[str],
    ratio: float,
    tokens: int,
    dtype: torch.dtype,
    settings: MergeSettings | None = None,
) -> tuple[list[Contender], list[str]]:
    """Those of `names` that can remove `ratio` of the `tokens` of a UNet's finest layers, at batch
    2; notes on others.

    Ours merge by `settings`, but for the method and the ratio.
    """
    contenders, notes = [], []
    for name in names:
        note = why_left_out(name, ratio, tokens, dtype)
        if note is None:
            contenders.append(
                Contender(
                    name, functools.partial(put_on, name=name, ratio=ratio, settings=settings)
                )
            )
        else:
            notes.append(note)
    return contenders, notes


def why_left_out(name: str, ratio: float, tokens: int, dtype: torch.dtype) -> str | None:
    """Why a contender can't remove this ratio of so many tokens; None where it can."""
    if name == TODO and ratio not in TODO_FACTORS:
        return f"{TODO} is left out but at the ratios {' and '.join(map(str, TODO_FACTORS))}, the only ones that it has"
    if name == CA_TOME and importlib.util.find_spec("ca_tome") is None:
        return f"{CA_TOME} is left out, since it is not installed: {INSTALL['ca_tome']}"
    if name not in (CORNER, RANDOM, QUERIES):
        return None
    try:
        require("tomesd")
    except MissingPackage:
        return f"tomesd is left out, since it is not installed: {INSTALL['tomesd']}"
    # Similarities of every src (three quarters) and every dst (the rest), at batch 2.
    needed = 2 * (tokens - tokens // 4) * (tokens // 4) * torch.finfo(dtype).bits // 8
    if needed > PEER_BYTES:
        return (
            f"tomesd is left out at {tokens} tokens: its similarities alone take {needed / 1e9:.1f} GB, "
            f"above {PEER_BYTES / 1e9:.0f} GB"
        )
    return (
        f"tomesd is left out above its highest ratio, {TOMESD_MOST}"
        if ratio > TOMESD_MOST
        else None
    )


def peer_versions() -> str:
    """The peers' packages that are installed, for people."""
    versions = []
    for package in ("tomesd", "ca-tome"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(versions) or "tomesd not installed"


def matchers(side: int, ratio: float, dtype: torch.dtype) -> tuple[list[Matcher], list[str]]:
    """What can match a grid of `side`×`side` tokens at batch 2, and notes on what is left out."""
    every_matcher = [
        Matcher(name, functools.partial(_match_ours, exact=name == EXACT)) for name in (OURS, EXACT)
    ]
    notes = []
    for name in (CORNER, RANDOM):
        note = why_left_out(name, ratio, side * side, dtype)
        if note is None:
            every_matcher.append(
                Matcher(name, functools.partial(match_tomesd, use_rand=name == RANDOM))
            )
        else:
            notes.append(note)
    return every_matcher, notes


def put_on(
    unet: nn.Module, name: str, ratio: float, settings: MergeSettings | None = None
) -> OnUnet:
    """Puts a contender on a UNet, to remove `ratio` of the tokens.

    Ours merge by `settings`, but for the method and the ratio.
    """
    if name not in (*METHODS, UNWEIGHTED):
        return _OTHERS[name](unet, ratio)
    method = KEYS if name == UNWEIGHTED else name
    settings = dataclasses.replace(
        settings or MergeSettings(full_steps=1), method=method, ratio=ratio
    )
    return merging(unet, Unweighted(**vars(settings)) if name == UNWEIGHTED else settings)


@contextlib.contextmanager
def merging(unet: nn.Module, settings: MergeSettings) -> Iterator[Running]:
    """Ours, as the settings say."""
    with hooks.attach(unet, settings) as attached:
        yield Running(attached.set_step, lambda: attached.report().summary)


class Unweighted(MergeSettings):
    """The method keys with each merged key counted once: what proportional attention brings, and
    what it takes."""

    weights_keys = False


def _first_tokens(y: Tensor, ratio: float) -> Tensor:
    """[B, M, C] of [B, N, C]: so many of the first rows in memory, taken as a view.

    Not y[:, :M], which is not contiguous: each of the projections would copy it. The number of
    tokens is rounded as ours is: over an odd length attention is slower, and this would not be the
    limit.
    """
    items, tokens, channels = y.shape
    count = tokens - tokens_removed(tokens, ratio, rounded=True)
    return y.view(-1, channels)[: items * count].view(items, count, channels)


@contextlib.contextmanager
def _limit(unet: nn.Module, ratio: float) -> Iterator[Running]:
    """Attention over N(1-r) tokens, at no other cost: what no merging of queries, keys and values
    can beat.

    Each token's output is a view of the first row of what comes out. So nothing is computed or
    copied besides the attention itself, and nothing is allocated: the two hooks are a few µs of
    Python. The picture is nonsense; its time is not.
    """
    whole: dict[nn.Module, int] = {}

    def fewer(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[object, object]:
        y, *others = args
        whole[module] = y.shape[1]
        return (_first_tokens(y, ratio), *others), kwargs

    def widened(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output[:, :1].expand(-1, whole[module], -1)

    with contextlib.ExitStack() as handles:
        for layer in merged_layers(unet) if ratio else []:
            attn1 = layer.block.attn1
            handles.callback(attn1.register_forward_pre_hook(fewer, with_kwargs=True).remove)
            handles.callback(attn1.register_forward_hook(widened).remove)
        yield Running()


_OTHERS: dict[str, Callable[[nn.Module, float], OnUnet]] = {
    **PUT_ON,
    UNMERGED: lambda unet, ratio: contextlib.nullcontext(Running()),
    # Keys and values that cost nothing: what no choice or merging of them can beat.
    LIMIT_KEYS: functools.partial(
        attending_to, choose=lambda y, grid, ratio: _first_tokens(y, ratio)
    ),
    LIMIT: _limit,
}
"""By name, the contenders that are not ours."""


def _match_ours(
    x: Tensor, grid: tuple[int, int], ratio: float, step: int, exact: bool
) -> tuple[Apply, Apply]:
    settings = MergeSettings(ratio=ratio, schedule="constant")
    split = make_partition(grid, settings.cell, step=step, window=settings.window, device=x.device)
    token_map = match(x, split, exact).token_map(tokens_removed(x.shape[1], ratio, rounded=True))
    return token_map.merge, token_map.unmerge
