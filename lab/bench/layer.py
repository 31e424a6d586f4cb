"""One self-attention layer, whole and in parts: how much faster merging makes it, and what of that
is whose.

Batch 2, 320 channels, 8 heads, on smooth tokens with noise, as pictures give. "layer" is the norm
and the attention behind it with all that a contender does there: ours run by their hooks, as on a
UNet. "x faster" is the unmerged layer over it, "/limit" it over the same attention without any
merging: to as many keys for the method keys and ToDo, of as many tokens for the others. "weighting"
is keys over the same unweighed, and tokens over paper. "rule" says whether `plan.pays` lets such a
layer merge.

Match, merge and unmerge are timed alone besides, which all our methods do alike, but that keys
unmerges nothing; "merging" is their sum, and "growth" the exponent p of N^p with which it grows
with the tokens, from the first size on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd_core.plan import pays
from tomesd_core.settings import METHODS, MergeSettings

from . import output
from .contenders import (
    CORNER,
    EXACT,
    KEYS,
    LIMIT,
    LIMIT_KEYS,
    LIMIT_OF,
    MATCHING_OVER_PEERS,
    OURS,
    PAPER,
    QUERIES,
    RANDOM,
    TODO,
    TOKENS,
    UNMERGED,
    UNWEIGHTED,
    Contender,
    Matcher,
    Running,
    contenders,
    matchers,
)
from .models import OneLayer, attention, inference, one_layer
from .options import add_shared, fill_in, merge_ratio, whole_number
from .timing import compared, growth, interleaved, progress, spread, timed

ITEMS, HEADS = 2, 8

USUAL = {"tokens": [64, 128, 256], "channels": 320, "rounds": 11, "attention": "sdp"}
USUAL["ratios"] = [0.25, 0.5, 0.6, 0.75, 0.84, 0.9375]
QUICK = {"tokens": [32, 64], "rounds": 5}
TINY = {"tokens": [8, 16], "channels": 32, "rounds": 1}

MOST_SIDE = {"plain": 64, "sdp": 128}
"""Of a grid whose layers are timed: above it plain attention takes more than 4 GB, and sdp minutes
on a CPU."""

HOOKED = (UNMERGED, KEYS, UNWEIGHTED, TOKENS, PAPER, QUERIES, TODO, LIMIT_KEYS, LIMIT)
"""What runs on a layer as on a UNet. `tomesd` replaces whole blocks: around a layer its parts are
called."""

ORDER = (
    UNMERGED,
    KEYS,
    UNWEIGHTED,
    TOKENS,
    PAPER,
    EXACT,
    CORNER,
    RANDOM,
    QUERIES,
    TODO,
    LIMIT_KEYS,
    LIMIT,
)
"""In which rows stand."""

PARTS = ("match", "merge", "unmerge")
Parts = dict[str, float]
"""Seconds by part; `layer` is the whole layer."""

OVER_OTHERS = {"over_limit": LIMIT_OF, "weighting": {KEYS: UNWEIGHTED, TOKENS: PAPER}}

COLUMNS = {
    "grid": ("tokens", str),
    "ratio": ("ratio", output.number(4)),
    "contender": ("contender", str),
    **{part: (f"{part} ms", output.number(2, 1e3)) for part in PARTS},
    **output.spread("merging", "merging ms", 2, 1e3),
    "over_tomesd_corner": ("/corner", output.number(3)),
    "over_tomesd_random": ("/random", output.number(3)),
    "growth": ("growth", output.number(2)),
    "layer": ("layer ms", output.number(1, 1e3)),
    **output.spread("gain", "x faster"),
    "over_limit": ("/limit", output.number(3)),
    "weighting": ("weighting", output.number(3)),
    "rule": ("rule", str),
}

CSV_COLUMNS = (*COLUMNS, "layer_low", "layer_high", "tokens", "rounds", "attention_kind")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench layer`."""
    add_shared(parser)
    parser.add_argument(
        "--tokens", type=whole_number, nargs="+", metavar="SIDE", help="sides of square token grids"
    )
    parser.add_argument(
        "--channels", type=whole_number, metavar="C", help="a multiple of the 8 heads"
    )
    parser.add_argument(
        "--ratios", type=merge_ratio, nargs="+", metavar="R", help="shares of the tokens to remove"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny layer: tries the command, and measures nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes `layer-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    if args.channels % HEADS:
        raise ValueError(f"channels must be a multiple of the {HEADS} heads, got {args.channels}")
    if not all(args.ratios):
        raise ValueError("ratios must be above 0: there would be nothing to match")
    results = output.Results(args, f"layer-{args.attention}")
    rows = results.rows
    cases, notes = _cases(args)
    panels = [
        output.Panel(
            f"matching, merging, unmerging, ratio {args.ratios[0]:g}",
            "tokens",
            "ms",
            logarithmic=True,
        )
    ]
    faster: dict[int, output.Panel] = {}
    runs = sum(len(some) + len(hooked) for _, _, some, hooked in cases) * (args.rounds + 1)
    with (
        attention(one_layer(args.channels, HEADS, args.device, args.torch_dtype), args.attention),
        progress(runs) as tick,
    ):
        for case in cases:
            rows += _rows_of(*case, args, tick)
            _add_growth(rows)
            results.save()
    for row in rows:
        if row["ratio"] == args.ratios[0] and row["merging"] is not None:
            panels[0].add(row["contender"], row["tokens"], 1e3 * row["merging"])
        if row["gain"] is not None and row["contender"] != UNMERGED:
            title = f"{row['grid']} tokens, {args.attention} attention"
            panel = faster.setdefault(
                row["tokens"], output.Panel(title, "ratio", "times faster than unmerged")
            )
            panel.add(row["contender"], row["ratio"], row["gain"])
    results.show(COLUMNS, [*panels, *faster.values()], notes)


def image_tokens(side: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[2, side², channels]: tokens that change slowly over the image, with noise of a third of
    their strength."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.randn(ITEMS, channels, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    tokens = (
        (smooth + torch.randn(smooth.shape, generator=generator) / 3).flatten(2).transpose(1, 2)
    )
    return tokens.contiguous().to(device, dtype)


Case = tuple[int, float, Sequence[Matcher], Sequence[Contender]]
"""A grid's side, a ratio, and what is timed there: matchings, and whole layers."""


def _cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """All that is timed, and notes on what is not."""
    cases, notes = [], []
    for side in sorted(set(args.tokens)):
        is_timed = side <= MOST_SIDE[args.attention] or (args.attention, args.device.type) == (
            "sdp",
            "cuda",
        )
        notes += (
            []
            if is_timed
            else [f"layers are left out at {side}x{side} tokens: they take too long or too much"]
        )
        for ratio in args.ratios:
            some, left_out = matchers(side, ratio, args.torch_dtype)
            notes += left_out
            settings = MergeSettings(schedule="constant", full_steps=1, skip_unprofitable=False)
            hooked, left_out = contenders(HOOKED, ratio, side * side, args.torch_dtype, settings)
            notes += left_out
            cases.append((side, ratio, some, hooked if is_timed else []))
    return cases, notes


def _rows_of(
    side: int,
    ratio: float,
    some: Sequence[Matcher],
    hooked: Sequence[Contender],
    args: argparse.Namespace,
    tick: Callable[[str], None],
) -> list[dict[str, object]]:
    """The rows of one size and ratio, without their growth."""
    x = image_tokens(side, args.channels, args.device, args.torch_dtype)
    image = x.view(ITEMS, side, side, -1).permute(0, 3, 1, 2)

    def layer() -> OneLayer:
        return one_layer(args.channels, HEADS, args.device, args.torch_dtype)

    runs: dict[str, Callable[[], Parts]] = {}
    with contextlib.ExitStack() as open_contenders, inference(x):
        # Each is on a layer of its own all the time, since putting it on is no part of a step.
        for one in hooked:
            unet = layer()
            running = open_contenders.enter_context(one.put_on(unet))
            runs[one.name] = functools.partial(_whole, unet, running, image)
        for matcher in some:
            called = layer().block if hooked and matcher.name in (CORNER, RANDOM) else None
            runs[matcher.name] = functools.partial(
                _in_parts, matcher, x, (side, side), ratio, called
            )
        results = interleaved(
            runs, args.rounds, lambda name: tick(f"{name}, {side}x{side}, {ratio:g}")
        )
    return _compared(results, side, ratio, args)


def _whole(layer: OneLayer, running: Running, image: Tensor) -> Parts:
    """The time of a layer that a contender is on."""
    running.begin_step(0, 1)
    return {"layer": timed(functools.partial(layer, image), image.device)[0]}


def _in_parts(
    matcher: Matcher, x: Tensor, grid: tuple[int, int], ratio: float, block: nn.Module | None
) -> Parts:
    """The times of match, merge and unmerge; and of the whole `block`, if there is one, with these
    around it."""
    y = F.layer_norm(x, x.shape[-1:])
    parts: Parts = {}
    parts["match"], (merge, unmerge) = timed(
        functools.partial(matcher.match, x, grid, ratio, 1), x.device
    )
    parts["merge"], fewer = timed(functools.partial(merge, y), x.device)
    parts["unmerge"], _ = timed(functools.partial(unmerge, fewer), x.device)
    if block is not None:

        def whole() -> Tensor:
            merge, unmerge = matcher.match(x, grid, ratio, 1)
            return unmerge(block.attn1(merge(block.norm1(x))))

        parts["layer"], _ = timed(whole, x.device)
    return parts


def _compared(
    results: Mapping[str, Sequence[Parts]], side: int, ratio: float, args: argparse.Namespace
) -> list[dict[str, object]]:
    """A row for each contender: our methods' has the parts of our matching."""
    layers = {
        name: [one["layer"] for one in values]
        for name, values in results.items()
        if "layer" in values[0]
    }
    parts = {
        name: {part: [one[part] for one in values] for part in PARTS}
        for name, values in results.items()
        if set(PARTS) <= set(values[0])
    }
    ours = parts.pop(OURS)
    parts |= {
        KEYS: {part: ours[part] for part in PARTS if part != "unmerge"},
        TOKENS: ours,
        PAPER: ours,
    }
    merging = {
        name: [sum(one) for one in zip(*times.values(), strict=True)]
        for name, times in parts.items()
    }
    rows = {name: dict.fromkeys(CSV_COLUMNS) for name in sorted({*layers, *parts}, key=ORDER.index)}
    for row in (
        *compared(merging, "merging", None, MATCHING_OVER_PEERS),
        *compared(layers, "layer", UNMERGED, OVER_OTHERS),
    ):
        rows[row["contender"]] |= row
    for name, row in rows.items():
        row |= {part: spread(times).median for part, times in parts.get(name, {}).items()}
        row |= {"grid": f"{side}x{side}", "tokens": side * side, "ratio": ratio}
        row |= {"rounds": args.rounds, "attention_kind": args.attention}
        if name in METHODS:
            is_worth_it = pays(side * side, args.channels, HEADS, ratio, args.device.type, name)
            row["rule"] = "merge" if is_worth_it else "leave out"
    return [*rows.values()]


def _add_growth(rows: list[dict[str, object]]) -> None:
    """Sets each row's growth, over the sizes up to this one of the same contender and ratio."""
    points = defaultdict(list)
    for row in rows:
        if row["merging"] is not None:
            same = points[row["contender"], row["ratio"]]
            same.append((row["tokens"], row["merging"]))
            row["growth"] = growth(*zip(*same, strict=True))
