"""Peak memory above the weights: of one guided step of the whole UNet, and of the matching alone.

On a CPU PyTorch's profiler lists what its allocator gives and takes (what oneDNN and BLAS keep for
themselves is not in it); on a GPU it is `max_memory_allocated`. Inputs and weights do not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import output, unet_runs
from .contenders import MATCHING_OVER_PEERS, Matcher, Running, matchers
from .layer import image_tokens
from .options import add_shared, add_unet, fill_in, whole_number
from .timing import compared, interleaved, progress
from .unet_runs import Case, cases, count_runs, everyone, measure, panels

USUAL = {
    **unet_runs.USUAL,
    "ratios": [0.25, 0.4375, 0.5, 0.6, 0.75, 0.84],
    "tokens": [256],
    "rounds": 1,
}
QUICK = {"sizes": [(256, 256)], "ratios": [0.6], "tokens": [64]}
TINY = {"sizes": [(128, 128)], "ratios": [0.6], "tokens": [16]}

MATCHING_RATIO, MATCHING_CHANNELS = 0.5, 320

COLUMNS = {
    "what": ("peak of", str),
    "size": ("size", str),
    "ratio": ("ratio", output.number(2)),
    "contender": ("contender", str),
    "bytes": ("MB", output.number(1, 1e-6)),
    "gain": ("x less", output.number(3)),
    **output.OVER_OTHERS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench memory`."""
    add_shared(parser)
    add_unet(parser)
    parser.add_argument(
        "--tokens", type=whole_number, nargs="+", metavar="SIDE", help="of grids for matching alone"
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes `memory-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    results = output.Results(args, f"memory-{args.attention}")

    def save(new: list[output.Row], what: str = "unet step") -> None:
        results.save({"what": what, **row} for row in new)

    def step_peak(case: Case, running: Running) -> int:
        running.begin_step(0, 1)
        return peak_bytes(case.step, args.device)

    by_side = {side: matchers(side, MATCHING_RATIO, args.torch_dtype) for side in args.tokens}
    matchings = sum(len(some) for some, _ in by_side.values()) * (args.rounds + 1)
    with (
        cases(args, functools.partial(everyone, args)) as all_cases,
        progress(count_runs(all_cases, args.rounds) + matchings) as tick,
    ):
        notes = measure(all_cases, args, "bytes", step_peak, tick, save)
        plots = panels(results.rows, args, "times less than unmerged", output.PAPER_GIGABYTES)
        for side, (some, left_out) in by_side.items():
            notes += left_out
            save(_matching_rows(side, some, args, tick), "matching")
    results.show(COLUMNS, plots, notes)


def _matching_rows(
    side: int, some: Sequence[Matcher], args: argparse.Namespace, tick: Callable[[str], None]
) -> list[output.Row]:
    x = image_tokens(side, MATCHING_CHANNELS, args.device, args.torch_dtype)

    def peak(matcher: Matcher) -> int:
        with torch.no_grad():
            return peak_bytes(
                lambda: matcher.match(x, (side, side), MATCHING_RATIO, 1), args.device
            )

    peaks = {one.name: functools.partial(peak, one) for one in some}
    results = interleaved(peaks, args.rounds, lambda name: tick(f"{name}, {side}x{side}"))
    about = {"size": f"{side}x{side} tokens", "ratio": MATCHING_RATIO}
    how = {"rounds": args.rounds, "attention": args.attention}
    return [
        {**about, **row, **how} for row in compared(results, "bytes", None, MATCHING_OVER_PEERS)
    ]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch held at once while `work` ran, above what it held before; its
    result counts.

    Raises `ValueError` for a device that is neither cpu nor cuda.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"memory can be measured on cpu and cuda, not on {device.type}")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = work()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    # In the order in which they happened: where two share a time, as they were recorded.
    changes = sorted(
        (event for event in events if event.get("name") == "[memory]"),
        key=lambda event: event["ts"],
    )
    held = peak = 0
    for change in changes:
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak
