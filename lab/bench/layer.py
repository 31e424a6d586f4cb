"""One self-attention layer: match, merge, unmerge and attention, and how they grow with the tokens.

Batch 2, 320 channels, 8 heads, on smooth tokens with noise, as pictures give. "merging" is match, merge and unmerge
together; "growth" is the exponent p of N^p with which it grows with the tokens, from the first size on. "x faster" is
the attention over all tokens over merging and the attention over what is left: where that is below 1 merging can't pay,
and "rule" says whether `profit.pays` lets such a layer merge.
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd_core.profit import pays

from . import output
from .contenders import OURS, OVER_PEERS, UNMERGED, Matcher, matchers
from .models import attend, attention, attention_layer
from .options import add_shared, fill_in, merge_ratio, whole_number
from .timing import compared, growth, interleaved, paired, progress, spread, timed

ITEMS, HEADS = 2, 8
REUSE_STEPS = 4

USUAL = {"tokens": [64, 128, 256], "channels": 320, "rounds": 11, "attention": "sdp", "ratios": [0.5]}
QUICK = {"tokens": [32, 64], "rounds": 5}
TINY = {"tokens": [8, 16], "channels": 32, "rounds": 1}

ATTENTION_BYTES = 4e9
"""Plain attention whose similarities take more than this is not timed."""

CPU_ATTENTION_SIDE = 128
"""Nor, on a CPU, is any over more tokens than a grid of this side has: it takes minutes."""

PARTS = ("match", "merge", "unmerge", "attention")
Parts = dict[str, float]
"""Seconds by part; `merging` is match, merge and unmerge together."""

COLUMNS = {
    "grid": ("tokens", str),
    "ratio": ("ratio", output.number(2)),
    "contender": ("contender", str),
    "match": ("match ms", output.scaled(1e3, 2)),
    "merge": ("merge ms", output.scaled(1e3, 2)),
    "unmerge": ("unmerge ms", output.scaled(1e3, 2)),
    "merging": ("merging ms", output.scaled(1e3, 2)),
    "merging_low": ("25 %", output.scaled(1e3, 2)),
    "merging_high": ("75 %", output.scaled(1e3, 2)),
    "over_tomesd_corner": ("/corner", output.number(3)),
    "over_tomesd_random": ("/random", output.number(3)),
    "growth": ("growth", output.number(2)),
    "attention": ("attention ms", output.scaled(1e3, 1)),
    "gain": ("x faster", output.number(3)),
    "gain_low": ("25 %", output.number(3)),
    "gain_high": ("75 %", output.number(3)),
    "rule": ("rule", str),
}

CSV_COLUMNS = (*COLUMNS, "tokens", "rounds", "attention_kind")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench layer`."""
    add_shared(parser)
    parser.add_argument("--tokens", type=whole_number, nargs="+", metavar="SIDE", help="sides of square token grids")
    parser.add_argument("--channels", type=whole_number, metavar="C", help="a multiple of the 8 heads")
    parser.add_argument("--ratios", type=merge_ratio, nargs="+", metavar="R", help="shares of the tokens to remove")
    parser.add_argument("--tiny", action="store_true", help="a tiny layer: tries the command, and measures nothing")


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes `layer-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    if args.channels % HEADS:
        raise ValueError(f"channels must be a multiple of the {HEADS} heads, got {args.channels}")
    if not all(args.ratios):
        raise ValueError("ratios must be above 0: there would be nothing to match")
    machine = output.this_machine(args.device, args.dtype, args.command)
    csv_path, plot_path = (args.out / f"layer-{args.attention}{ending}" for ending in (".csv", ".png"))
    layer = attention_layer(args.channels, HEADS, args.device, args.torch_dtype)
    chosen = {side: matchers(side, args.torch_dtype, REUSE_STEPS) for side in sorted(set(args.tokens))}
    runs = sum(len(some) + 1 for some, _ in chosen.values()) * len(args.ratios) * (args.rounds + 1)
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    with attention(layer, args.attention), progress(runs) as tick:
        for side, (some, left_out) in chosen.items():
            notes += left_out
            attends, why_not = _attends(side, args)
            notes += why_not
            for ratio in args.ratios:
                rows += _rows_at(side, ratio, some, layer if attends else None, args, tick)
                _add_growth(rows)
                output.write_csv(csv_path, rows, machine)
    panels = {
        ratio: output.Panel(f"match + merge + unmerge, ratio {ratio:g}", "tokens", "ms", logarithmic=True)
        for ratio in args.ratios
    }
    for row in rows:
        if row["merging"] is not None:
            panels[row["ratio"]].add(row["contender"], row["tokens"], 1e3 * row["merging"])
    output.plot(plot_path, [*panels.values()], machine)
    output.show(output.table(COLUMNS, rows), machine, notes, [csv_path, plot_path])


def image_tokens(side: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[2, side², channels]: tokens that change slowly over the image, with noise of a third of their strength."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.randn(ITEMS, channels, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    tokens = (smooth + torch.randn(smooth.shape, generator=generator) / 3).flatten(2).transpose(1, 2)
    return tokens.contiguous().to(device, dtype)


def _attends(side: int, args: argparse.Namespace) -> tuple[bool, list[str]]:
    """Whether attention is timed at this size; if not, a note that says why."""
    needed = ITEMS * HEADS * side**4 * 4
    if args.attention == "plain" and needed > ATTENTION_BYTES:
        return False, [
            f"attention is left out at {side}x{side} tokens: its similarities alone take {needed / 1e9:.1f} GB"
        ]
    if args.device.type == "cpu" and side > CPU_ATTENTION_SIDE:
        return False, [f"attention is left out at {side}x{side} tokens: on a CPU it takes minutes"]
    return True, []


def _rows_at(
    side: int,
    ratio: float,
    some: list[Matcher],
    layer: nn.Module | None,
    args: argparse.Namespace,
    tick: Callable[[str], None],
) -> list[dict[str, object]]:
    """The rows of one size and ratio, without their growth; `layer` None leaves attention out."""
    x = image_tokens(side, args.channels, args.device, args.torch_dtype)
    y = F.layer_norm(x, x.shape[-1:])
    step = 0

    def unmerged() -> Parts:
        return {} if layer is None else {"attention": timed(functools.partial(attend, layer, y), args.device)[0]}

    def merged(matcher: Matcher) -> Parts:
        nonlocal step
        step += 1
        parts = dict.fromkeys(("match", "merge", "unmerge"), 0.0)
        for number in range(matcher.steps):
            if not number:
                parts["match"], (merge, unmerge) = timed(
                    functools.partial(matcher.match, x, (side, side), ratio, step), args.device
                )
            seconds, fewer = timed(functools.partial(merge, y), args.device)
            parts["merge"] += seconds
            parts["unmerge"] += timed(functools.partial(unmerge, fewer), args.device)[0]
        parts = {part: seconds / matcher.steps for part, seconds in parts.items()}
        parts["merging"] = sum(parts.values())
        if layer is not None:
            parts["attention"] = timed(functools.partial(attend, layer, fewer), args.device)[0]
        return parts

    runs = {UNMERGED: unmerged, **{one.name: lambda one=one: merged(one) for one in some}}
    with torch.no_grad():
        results = interleaved(runs, args.rounds, lambda name: tick(f"{name}, {side}x{side}"))
    merging = {name: [parts["merging"] for parts in values] for name, values in results.items() if name != UNMERGED}
    comparisons = {row["contender"]: row for row in compared(merging, "merging", None, OVER_PEERS)}
    pays_off = pays(side * side, args.channels, ratio, args.device.type)
    rows = []
    for name, values in results.items():
        row: dict[str, object] = dict.fromkeys(CSV_COLUMNS)
        row |= {"grid": f"{side}x{side}", "tokens": side * side, "ratio": ratio, "contender": name}
        row |= {"rounds": args.rounds, "attention_kind": args.attention}
        row |= {part: spread([parts[part] for parts in values]).median for part in PARTS if part in values[0]}
        if name in merging and layer is not None:
            whole = [parts["merging"] + parts["attention"] for parts in values]
            row["gain"], row["gain_low"], row["gain_high"] = paired(
                [parts["attention"] for parts in results[UNMERGED]], whole
            )
        if name.startswith(OURS):
            row["rule"] = "merge" if pays_off else "leave out"
        rows.append(row | comparisons.get(name, {}))
    return rows


def _add_growth(rows: list[dict[str, object]]) -> None:
    """Sets each row's growth, over the sizes up to this one of the same contender and ratio."""
    points = defaultdict(list)
    for row in rows:
        if row["merging"] is not None:
            same = points[row["contender"], row["ratio"]]
            same.append((row["tokens"], row["merging"]))
            row["growth"] = growth(*zip(*same, strict=True))
