"""Peak memory above the weights: of one guided step of the whole UNet, and of the matching alone.

On a CPU PyTorch's profiler lists what its allocator gives and takes (what oneDNN and BLAS keep for themselves is not in
it); on a GPU it is `max_memory_allocated`. Inputs and weights do not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tomesd_core.settings import MergeSettings

from . import output
from .contenders import OVER_OTHERS, UNMERGED, Contender, Matcher, matchers
from .layer import image_tokens
from .options import add_shared, add_unet, fill_in, whole_number
from .timing import compared, interleaved, progress
from .unet_runs import Case, cases

USUAL = {
    "sizes": [(512, 512)],
    "ratios": [0.2, 0.4, 0.5, 0.6],
    "tokens": [256],
    "rounds": 1,
    "attention": "plain",
}
QUICK = {"sizes": [(256, 256)], "ratios": [0.6], "tokens": [64]}
TINY = {"sizes": [(128, 128)], "ratios": [0.6], "tokens": [16]}

MATCHING_RATIO, MATCHING_CHANNELS = 0.5, 320

COLUMNS = {
    "what": ("peak of", str),
    "size": ("size", str),
    "ratio": ("ratio", output.number(2)),
    "contender": ("contender", str),
    "bytes": ("MB", output.scaled(1e-6, 1)),
    "gain": ("x less", output.number(3)),
    "over_tomesd_corner": ("/corner", output.number(3)),
    "over_tomesd_random": ("/random", output.number(3)),
    "over_limit": ("/limit", output.number(3)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench memory`."""
    add_shared(parser)
    add_unet(parser)
    parser.add_argument(
        "--tokens",
        type=whole_number,
        nargs="+",
        metavar="SIDE",
        help="sides of square token grids for the matching alone",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes `memory-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    machine = output.this_machine(args.device, args.dtype, args.command)
    csv_path, plot_path = (args.out / f"memory-{args.attention}{ending}" for ending in (".csv", ".png"))
    rows: list[output.Row] = []
    panels, notes = [], []
    chosen = {side: matchers(side, args.torch_dtype) for side in args.tokens}
    with cases(args, MergeSettings()) as found:
        runs = sum(len(case.contenders) for case in found) * len(args.ratios) + sum(len(m) for m, _ in chosen.values())
        with progress(runs * (args.rounds + 1)) as tick:
            for case in found:
                panel = output.Panel(
                    f"{case.size_name}, {args.attention} attention", "ratio", "times less than unmerged"
                )
                for ratio in args.ratios:
                    said: dict[str, str] = {}
                    peaks = {
                        one.name: functools.partial(_step_peak, case, one, ratio, args.device, said)
                        for one in case.contenders
                    }
                    results = interleaved(peaks, args.rounds, lambda name, at=ratio: tick(f"{name}, {at:g}"))
                    for row in compared(results, "bytes", UNMERGED, OVER_OTHERS):
                        rows.append(_row("unet step", case.size_name, ratio, args, row))
                        panel.add(row["contender"], ratio, row["gain"])
                    notes += [f"{case.size_name}, {ratio:g}, {name}: {what}" for name, what in said.items() if what]
                    output.write_csv(csv_path, rows, machine)
                panel.lines[output.PAPER] = output.paper_line(output.PAPER_GIGABYTES)
                panel.reference = output.PAPER
                panels.append(panel)
                notes += case.notes
            for side, (some, left_out) in chosen.items():
                notes += left_out
                x = image_tokens(side, MATCHING_CHANNELS, args.device, args.torch_dtype)
                peaks = {one.name: functools.partial(_matching_peak, one, x, side) for one in some}
                results = interleaved(peaks, args.rounds, lambda name, at=side: tick(f"{name}, {at}x{at}"))
                for row in compared(results, "bytes", None, OVER_OTHERS):
                    rows.append(_row("matching", f"{side}x{side} tokens", MATCHING_RATIO, args, row))
                output.write_csv(csv_path, rows, machine)
    output.plot(plot_path, panels, machine)
    output.show(output.table(COLUMNS, rows), machine, notes, [csv_path, plot_path])


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch held at once while `work` ran, above what it held before; its result counts.

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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    # In the order in which they happened: where two share a time, as they were recorded.
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for change in changes:
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _row(
    what: str, size: str, ratio: float, args: argparse.Namespace, measured: dict[str, object]
) -> dict[str, object]:
    gain = dict.fromkeys(("gain", "gain_low", "gain_high"))
    row = {"what": what, "size": size, "ratio": ratio, **gain, **measured}
    return {**row, "rounds": args.rounds, "attention": args.attention}


def _step_peak(case: Case, contender: Contender, ratio: float, device: torch.device, said: dict[str, str]) -> int:
    with contender.put_on(case.unet, ratio) as running:
        running.begin_step(0, 1)
        peak = peak_bytes(case.step, device)
        said[contender.name] = running.describe()
    return peak


def _matching_peak(matcher: Matcher, x: Tensor, side: int) -> int:
    with torch.no_grad():
        return peak_bytes(lambda: matcher.match(x, (side, side), MATCHING_RATIO, 1), x.device)
