"""The contenders: each attached to a UNet, and their matching alone."""

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

from . import peers
from .packages import INSTALL, MissingPackage, require
from .peers import CORNER, QUERIES, RANDOM, TODO, TODO_FACTORS, Apply, Attached, Attachment

UNMERGED = "unmerged"
KEYS, TOKENS, PAPER = METHODS
UNWEIGHTED = "keys unweighted"
LIMIT_KEYS, LIMIT = "limit keys", "limit"

MATCHING = "matching"
"""The matching that all of the extension's methods share."""
EXACT = f"{MATCHING}, exact"
"""The same with similarities in full precision."""

LIMIT_OF = {
    **dict.fromkeys((KEYS, UNWEIGHTED, TODO), LIMIT_KEYS),
    **dict.fromkeys((TOKENS, PAPER, CORNER, RANDOM), LIMIT),
}
"""By contender: the limit of every method that merges the same way."""

PEERS = {"over_tomesd_corner": CORNER, "over_tomesd_random": RANDOM}
_MATCHERS = (MATCHING, EXACT, *METHODS, CORNER, RANDOM)
MATCHING_OVER_PEERS = {name: dict.fromkeys(_MATCHERS, peer) for name, peer in PEERS.items()}
OVER_OTHERS = {
    # At one ratio these leave as many query-key pairs as the peers; keys leaves more.
    **{name: dict.fromkeys((TOKENS, PAPER, CORNER, RANDOM), peer) for name, peer in PEERS.items()},
    "over_limit": LIMIT_OF,
}
"""By column and contender: the contender that it is divided by."""

PEER_BYTES = 4e9
"""`tomesd` is skipped if its similarities alone take more than this."""

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
"""Settings of a table's row that names no others: the paper's method, over the whole image.

They repeat the defaults, which are set from the tables and must not move them. The tiny models'
layers are too small for merging to pay, so `skip_unprofitable` is off.
"""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run a UNet."""

    name: str
    attach: Callable[[nn.Module], Attachment]


@dataclasses.dataclass(frozen=True)
class Matcher:
    """One way to match tokens."""

    name: str
    match: Callable[[Tensor, tuple[int, int], float, int], tuple[Apply, Apply]]
    """(x [B, N, C], grid, ratio, step) to merge, [B, N, C] to [B, M, C], and unmerge."""


def available(
    names: Sequence[str],
    ratio: float,
    tokens: int,
    dtype: torch.dtype,
    settings: MergeSettings | None = None,
) -> tuple[list[Contender], list[str]]:
    """Contenders that can remove `ratio` of a UNet's finest tokens; notes on the others.

    The extension's methods merge by `settings`, except for the method and the ratio.
    """
    reasons = {name: reason_skipped(name, ratio, tokens, dtype) for name in names}
    call = functools.partial(attach, ratio=ratio, settings=settings)
    able = [
        Contender(name, functools.partial(call, name=name))
        for name in names
        if reasons[name] is None
    ]
    return able, [reason for reason in reasons.values() if reason is not None]


def reason_skipped(name: str, ratio: float, tokens: int, dtype: torch.dtype) -> str | None:
    """Reason to skip a contender at this ratio and number of tokens; None to run it."""
    if name == TODO and ratio not in TODO_FACTORS:
        return f"{TODO} is skipped: its ratios are {' and '.join(map(str, TODO_FACTORS))} only"
    if name == peers.CA_TOME and importlib.util.find_spec("ca_tome") is None:
        return f"{peers.CA_TOME} is skipped, since it is not installed: {INSTALL['ca_tome']}"
    if name not in (CORNER, RANDOM, QUERIES):
        return None
    try:
        require("tomesd")
    except MissingPackage:
        return f"tomesd is skipped, since it is not installed: {INSTALL['tomesd']}"
    # Similarities of every src (three quarters) and every dst (one quarter), at batch 2.
    needed = 2 * (tokens - tokens // 4) * (tokens // 4) * torch.finfo(dtype).bits // 8
    if needed > PEER_BYTES:
        return f"tomesd is skipped at {tokens} tokens: its similarities take {needed / 1e9:.1f} GB"
    if ratio > peers.TOMESD_MOST:
        return f"tomesd is skipped above its highest ratio, {peers.TOMESD_MOST}"
    return None


def peer_versions() -> str:
    """Versions of the peers' installed packages."""
    versions = []
    for package in ("tomesd", "ca-tome"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(versions) or "tomesd not installed"


def matchers(side: int, ratio: float, dtype: torch.dtype) -> tuple[list[Matcher], list[str]]:
    """Matchers of a grid of `side`×`side` tokens at batch 2, and notes on skipped ones."""
    calls: dict[str, Any] = {
        MATCHING: functools.partial(_match, exact=False),
        EXACT: functools.partial(_match, exact=True),
        CORNER: functools.partial(peers.match_tomesd, use_rand=False),
        RANDOM: functools.partial(peers.match_tomesd, use_rand=True),
    }
    reasons = {name: reason_skipped(name, ratio, side * side, dtype) for name in calls}
    able = [Matcher(name, call) for name, call in calls.items() if reasons[name] is None]
    return able, [reason for reason in reasons.values() if reason is not None]


def attach(
    unet: nn.Module, name: str, ratio: float, settings: MergeSettings | None = None
) -> Attachment:
    """Attach a contender to a UNet, to remove `ratio` of the tokens.

    The extension's methods merge by `settings`, except for the method and the ratio.
    """
    if name not in (*METHODS, UNWEIGHTED):
        return _OTHERS[name](unet, ratio)
    method = KEYS if name == UNWEIGHTED else name
    base = settings or MergeSettings(full_steps=1)
    settings = dataclasses.replace(base, method=method, ratio=ratio)
    return attach_merging(unet, Unweighted(**vars(settings)) if name == UNWEIGHTED else settings)


@contextlib.contextmanager
def attach_merging(unet: nn.Module, settings: MergeSettings) -> Iterator[Attached]:
    """Attach the extension's merging."""
    with hooks.attach(unet, settings) as attached:
        yield Attached(attached.set_step, lambda: attached.report().summary)


class Unweighted(MergeSettings):
    """The method keys with every merged key weighted 1, to measure proportional attention."""

    weights_keys = False


def _first_tokens(y: Tensor, ratio: float) -> Tensor:
    """View the first rows in memory of [B, N, C] as [B, M, C].

    Unlike y[:, :M] the view is contiguous, so no projection copies it. M is rounded as in merging:
    attention over an odd length is slower.
    """
    items, tokens, channels = y.shape
    count = tokens - tokens_removed(tokens, ratio, rounded=True)
    return y.view(-1, channels)[: items * count].view(items, count, channels)


def _limit(y: Tensor, grid: peers.Grid, ratio: float) -> tuple[Tensor, Tensor, Apply]:
    """Attention over N(1-r) tokens at no other cost: a bound on merging queries, keys and values.

    Each token's output is a view of the first row of the result, so nothing else is computed,
    copied or allocated. The picture is nonsense; its time is not.
    """
    fewer = _first_tokens(y, ratio)
    return fewer, fewer, lambda output: output[:, :1].expand(-1, y.shape[1], -1)


_OTHERS: dict[str, Callable[[nn.Module, float], Attachment]] = {
    **peers.ATTACH_PEER,
    UNMERGED: lambda unet, ratio: contextlib.nullcontext(Attached()),
    # Keys and values at no cost: a bound on merging keys and values.
    LIMIT_KEYS: functools.partial(
        peers.attending_to, choose=lambda y, grid, ratio: _first_tokens(y, ratio)
    ),
    LIMIT: functools.partial(peers.around_attention, wrap=_limit),
}
"""By name: the contenders that are not the extension's."""


def _match(
    x: Tensor, grid: tuple[int, int], ratio: float, step: int, exact: bool
) -> tuple[Apply, Apply]:
    settings = MergeSettings(ratio=ratio, schedule="constant")
    split = make_partition(grid, settings.cell, step=step, window=settings.window, device=x.device)
    token_map = match(x, split, exact).token_map(tokens_removed(x.shape[1], ratio, rounded=True))
    return token_map.merge, token_map.unmerge
