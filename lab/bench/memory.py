"""Peak memory above the weights: of one guided step of a whole UNet, and of the matching alone.

On a CPU it is computed from the allocations that PyTorch's profiler records (without what oneDNN
and BLAS keep), on a GPU it is `max_memory_allocated`. Inputs and weights don't count.
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
from .contenders import MATCHING_OVER_PEERS, Attached, Matcher, matchers
from .layer import image_tokens
from .options import add_options, add_unet, fill_in
from .timing import compared, interleaved, progress
from .unet_runs import Case, all_contenders, cases, count_runs, measure, panels

USUAL = {**unet_runs.USUAL, "tokens": [256], "rounds": 1}
USUAL["ratios"] = [0.25, 0.4375, 0.5, 0.6, 0.75, 0.84]
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
    """Add the options of `bench memory`."""
    add_unet(parser)
    add_options(parser, "tokens")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and write `memory-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    results = output.Results(args, f"memory-{args.attention}")

    def save(new: list[output.Row], what: str = "unet step") -> None:
        results.save({"what": what, **row} for row in new)

    def step_peak(case: Case, attached: Attached) -> int:
        attached.begin_step(0, 1)
        return peak_bytes(case.step, args.device)

    by_side = {side: matchers(side, MATCHING_RATIO, args.torch_dtype) for side in args.tokens}
    matchings = sum(len(some) for some, _ in by_side.values()) * (args.rounds + 1)
    with (
        cases(args, functools.partial(all_contenders, args)) as all_cases,
        progress(count_runs(all_cases, args.rounds) + matchings) as tick,
    ):
        notes = measure(all_cases, args, "bytes", step_peak, tick, save)
        plots = panels(results.rows, args, "times less than unmerged", output.PAPER_GIGABYTES)
        for side, (some, skipped) in by_side.items():
            notes += skipped
            save(_matching_rows(side, some, args, tick), "matching")
    results.show(COLUMNS, plots, notes)


def _matching_rows(
    side: int, some: Sequence[Matcher], args: argparse.Namespace, tick: Callable[[str], None]
) -> list[output.Row]:
    x = image_tokens(side, MATCHING_CHANNELS, args.device, args.torch_dtype)

    def peak(matcher: Matcher) -> int:
        match = functools.partial(matcher.match, x, (side, side), MATCHING_RATIO, 1)
        with torch.no_grad():
            return peak_bytes(match, args.device)

    peaks = {one.name: functools.partial(peak, one) for one in some}
    results = interleaved(peaks, args.rounds, lambda name: tick(f"{name}, {side}x{side}"))
    about = {"size": f"{side}x{side} tokens", "ratio": MATCHING_RATIO}
    how = {"rounds": args.rounds, "attention": args.attention}
    rows = compared(results, "bytes", None, MATCHING_OVER_PEERS)
    return [{**about, **row, **how} for row in rows]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch held while `work` ran, above what it held before; its result counts.

    Raises `ValueError` for a device other than cpu and cuda.
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
    # A stable sort: events of one time stay in the order in which they were recorded.
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    held = peak = 0
    for change in changes:
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak
