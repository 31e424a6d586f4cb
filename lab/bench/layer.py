"""Time of one self-attention layer, whole and in parts.

Batch 2, 320 channels, 8 heads, on smooth tokens with noise, similar to those of pictures. "layer"
is the norm and the attention with everything that a contender does there; the extension runs by its
hooks, as on a UNet. "x faster" is the unmerged layer over it; "/limit" is it over the same
attention without any merging: over as many keys for the method keys and ToDo, over as many tokens
for the others. "weighting" is keys over unweighted keys, and tokens over paper. "rule" is the
decision of `plan.pays`.

Match, merge and unmerge, which the extension's methods share (keys unmerges nothing), are also
timed alone. "merging" is their sum, and "growth" the exponent p of its growth N^p with the tokens,
from the first size on.
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

from . import contenders, output
from .contenders import KEYS, LIMIT, LIMIT_KEYS, LIMIT_OF, PAPER, TOKENS, UNMERGED, UNWEIGHTED
from .models import OneLayer, attention, inference, one_layer
from .options import SHARED, add_options, fill_in, whole_number
from .peers import CORNER, QUERIES, RANDOM, TODO, Attached
from .timing import compared, growth, interleaved, progress, spread, timed

ITEMS, HEADS = 2, 8

USUAL = {"tokens": [64, 128, 256], "channels": 320, "rounds": 11, "attention": "sdp"}
USUAL["ratios"] = [0.25, 0.5, 0.6, 0.75, 0.84, 0.9375]
QUICK = {"tokens": [32, 64], "rounds": 5}
TINY = {"tokens": [8, 16], "channels": 32, "rounds": 1}

MOST_SIDE = {"plain": 64, "sdp": 128}
"""Largest side of timed grids: above, plain takes more than 4 GB, and sdp minutes on a CPU."""

HOOKED = (UNMERGED, KEYS, UNWEIGHTED, TOKENS, PAPER, QUERIES, TODO, LIMIT_KEYS, LIMIT)
"""Contenders attached to a layer; `tomesd` replaces blocks, so its parts are called around it."""

ORDER = (*HOOKED[:5], contenders.EXACT, CORNER, RANDOM, *HOOKED[5:])

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
    """Add the options of `bench layer`."""
    add_options(parser, *SHARED, "rounds", "tokens", "ratios", "tiny")
    parser.add_argument("--channels", type=whole_number, metavar="C", help="a multiple of 8 heads")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and write `layer-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    if args.channels % HEADS:
        raise ValueError(f"channels must be a multiple of the {HEADS} heads, got {args.channels}")
    if not all(args.ratios):
        raise ValueError("ratios must be above 0: there would be nothing to match")
    results = output.Results(args, f"layer-{args.attention}")
    rows = results.rows
    cases, notes = _cases(args)
    runs = sum(len(some) + len(hooked) for _, _, some, hooked in cases) * (args.rounds + 1)
    with (
        attention(one_layer(args.channels, HEADS, args.device, args.torch_dtype), args.attention),
        progress(runs) as tick,
    ):
        for case in cases:
            rows += _rows_of(*case, args, tick)
            _add_growth(rows)
            results.save()
    results.show(COLUMNS, _panels(rows, args), notes)


def _panels(rows: Sequence[output.Row], args: argparse.Namespace) -> list[output.Panel]:
    """Plot the time of merging over tokens at the first ratio, and speed-ups by grid."""
    title = f"matching, merging, unmerging, ratio {args.ratios[0]:g}"
    merging = output.Panel(title, "tokens", "ms", logarithmic=True)
    faster: dict[int, output.Panel] = {}
    for row in rows:
        if row["ratio"] == args.ratios[0] and row["merging"] is not None:
            merging.add(row["contender"], row["tokens"], 1e3 * row["merging"])
        if row["gain"] is not None and row["contender"] != UNMERGED:
            title = f"{row['grid']} tokens, {args.attention} attention"
            empty = output.Panel(title, "ratio", "times faster than unmerged")
            faster.setdefault(row["tokens"], empty).add(row["contender"], row["ratio"], row["gain"])
    return [merging, *faster.values()]


def image_tokens(side: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Tokens that vary slowly over the image, with a third as much noise: [2, N, C]."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.randn(ITEMS, channels, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    tokens = (
        (smooth + torch.randn(smooth.shape, generator=generator) / 3).flatten(2).transpose(1, 2)
    )
    return tokens.contiguous().to(device, dtype)


Case = tuple[int, float, Sequence[contenders.Matcher], Sequence[contenders.Contender]]
"""Side of a grid, ratio, matchers, and contenders on whole layers."""


def _cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """All cases, and notes on skipped ones."""
    cases, notes = [], []
    settings = MergeSettings(schedule="constant", full_steps=1, skip_unprofitable=False)
    is_fast = (args.attention, args.device.type) == ("sdp", "cuda")
    for side in sorted(set(args.tokens)):
        is_timed = is_fast or side <= MOST_SIDE[args.attention]
        if not is_timed:
            notes.append(f"layers are skipped at {side}x{side} tokens: too much time or memory")
        for ratio in args.ratios:
            some, skipped = contenders.matchers(side, ratio, args.torch_dtype)
            notes += skipped
            hooked, skipped = contenders.available(
                HOOKED, ratio, side * side, args.torch_dtype, settings
            )
            notes += skipped
            cases.append((side, ratio, some, hooked if is_timed else []))
    return cases, notes


def _rows_of(
    side: int,
    ratio: float,
    some: Sequence[contenders.Matcher],
    hooked: Sequence[contenders.Contender],
    args: argparse.Namespace,
    tick: Callable[[str], None],
) -> list[dict[str, object]]:
    """Rows of one size and ratio, without their growth."""
    x = image_tokens(side, args.channels, args.device, args.torch_dtype)
    image = x.view(ITEMS, side, side, -1).permute(0, 3, 1, 2)

    layer = functools.partial(one_layer, args.channels, HEADS, args.device, args.torch_dtype)
    runs: dict[str, Callable[[], Parts]] = {}
    with contextlib.ExitStack() as open_contenders, inference(x):
        # Each contender stays attached to its own layer, since attaching is no part of a step.
        for one in hooked:
            unet = layer()
            attached = open_contenders.enter_context(one.attach(unet))
            runs[one.name] = functools.partial(_whole, unet, attached, image)
        for matcher in some:
            block = layer().block if hooked and matcher.name in (CORNER, RANDOM) else None
            run = functools.partial(_in_parts, matcher, x, (side, side), ratio, block)
            runs[matcher.name] = run
        at = f"{side}x{side}, {ratio:g}"
        results = interleaved(runs, args.rounds, lambda name: tick(f"{name}, {at}"))
    return _compared(results, side, ratio, args)


def _whole(layer: OneLayer, attached: Attached, image: Tensor) -> Parts:
    """Time of a layer with its contender."""
    attached.begin_step(0, 1)
    return {"layer": timed(functools.partial(layer, image), image.device)[0]}


def _in_parts(
    matcher: contenders.Matcher,
    x: Tensor,
    grid: tuple[int, int],
    ratio: float,
    block: nn.Module | None,
) -> Parts:
    """Times of match, merge and unmerge, and of the `block`, if given, with these around it."""
    y = F.layer_norm(x, x.shape[-1:])
    match = functools.partial(matcher.match, x, grid, ratio, 1)
    parts: Parts = {}
    parts["match"], (merge, unmerge) = timed(match, x.device)
    parts["merge"], fewer = timed(functools.partial(merge, y), x.device)
    parts["unmerge"], _ = timed(functools.partial(unmerge, fewer), x.device)
    if block is not None:

        def whole() -> Tensor:
            merge, unmerge = match()
            return unmerge(block.attn1(merge(block.norm1(x))))

        parts["layer"], _ = timed(whole, x.device)
    return parts


def _compared(
    results: Mapping[str, Sequence[Parts]], side: int, ratio: float, args: argparse.Namespace
) -> list[dict[str, object]]:
    """Rows by contender; the extension's methods have the parts of its matching."""
    layers: dict[str, list[float]] = {}
    parts: dict[str, dict[str, list[float]]] = {}
    for name, values in results.items():
        if "layer" in values[0]:
            layers[name] = [one["layer"] for one in values]
        if set(PARTS) <= set(values[0]):
            parts[name] = {part: [one[part] for one in values] for part in PARTS}
    own = parts.pop(contenders.MATCHING)
    parts[KEYS] = {part: own[part] for part in PARTS if part != "unmerge"}
    parts[TOKENS] = parts[PAPER] = own
    merging = {
        name: [sum(one) for one in zip(*times.values(), strict=True)]
        for name, times in parts.items()
    }
    rows = {name: dict.fromkeys(CSV_COLUMNS) for name in sorted({*layers, *parts}, key=ORDER.index)}
    for row in (
        *compared(merging, "merging", None, contenders.MATCHING_OVER_PEERS),
        *compared(layers, "layer", UNMERGED, OVER_OTHERS),
    ):
        rows[row["contender"]] |= row
    for name, row in rows.items():
        row |= {part: spread(times).median for part, times in parts.get(name, {}).items()}
        row |= {"grid": f"{side}x{side}", "tokens": side * side, "ratio": ratio}
        row |= {"rounds": args.rounds, "attention_kind": args.attention}
        if name in METHODS:
            merges = pays(side * side, args.channels, HEADS, ratio, args.device.type, name)
            row["rule"] = "merge" if merges else "skip"
    return [*rows.values()]


def _add_growth(rows: list[dict[str, object]]) -> None:
    """Set each row's growth over the sizes up to its own, of the same contender and ratio."""
    points = defaultdict(list)
    for row in rows:
        if row["merging"] is not None:
            same = points[row["contender"], row["ratio"]]
            same.append((row["tokens"], row["merging"]))
            row["growth"] = growth(*zip(*same, strict=True))
