"""One guided step of the whole UNet: seconds, and times faster than unmerged.

Unmerged, ours, tomesd's two kinds of destinations, and the limit (attention over fewer tokens, and no merging at all),
interleaved round by round. All quotients are taken within a round; what is shown is their median.
"""

from __future__ import annotations

import argparse
import functools

import torch

from tomesd_core.settings import MergeSettings

from . import output
from .contenders import OVER_OTHERS, UNMERGED, Contender
from .options import add_shared, add_unet, fill_in, whole_number
from .timing import compared, interleaved, progress, timed
from .unet_runs import Case, cases

USUAL = {
    "sizes": [(512, 512)],
    "ratios": [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75],
    "rounds": 5,
    "attention": "plain",
    # Not the default of the setting: more would time every contender over as many steps.
    "reuse_steps": 1,
}
QUICK = {"sizes": [(256, 256)], "ratios": [0.3, 0.6], "rounds": 3}
TINY = {"sizes": [(128, 128)], "ratios": [0.3, 0.6], "rounds": 1}

COLUMNS = {
    "size": ("size", str),
    "ratio": ("ratio", output.number(2)),
    "contender": ("contender", str),
    "seconds": ("s/step", output.number(3)),
    "seconds_low": ("25 %", output.number(3)),
    "seconds_high": ("75 %", output.number(3)),
    "gain": ("x faster", output.number(3)),
    "gain_low": ("25 %", output.number(3)),
    "gain_high": ("75 %", output.number(3)),
    "over_tomesd_corner": ("/corner", output.number(3)),
    "over_tomesd_random": ("/random", output.number(3)),
    "over_limit": ("/limit", output.number(3)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench speed`."""
    add_shared(parser)
    add_unet(parser)
    parser.add_argument(
        "--reuse-steps",
        type=whole_number,
        metavar="N",
        help="for how many steps our matching is kept; everything is timed over so many steps",
    )
    parser.add_argument("--share-layers", action="store_true", help="one matching of ours for all layers of a grid")


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes `speed-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    machine = output.this_machine(args.device, args.dtype, args.command)
    csv_path, plot_path = (args.out / f"speed-{args.attention}{ending}" for ending in (".csv", ".png"))
    rows: list[output.Row] = []
    panels, notes = [], []
    settings = MergeSettings(reuse_steps=args.reuse_steps, share_layers=args.share_layers)
    with cases(args, settings) as found, progress(_runs(args, found)) as tick:
        for case in found:
            panel = output.Panel(f"{case.size_name}, {args.attention} attention", "ratio", "times faster than unmerged")
            for number, ratio in enumerate(args.ratios):
                said: dict[str, str] = {}
                runs = {
                    one.name: functools.partial(_seconds, case, one, ratio, args.reuse_steps, args.device, said)
                    for one in case.contenders
                }
                # What the first runs of a size set up serves all its ratios.
                warmup = int(number == 0)
                results = interleaved(runs, args.rounds, lambda name, at=ratio: tick(f"{name}, {at:g}"), warmup)
                for row in compared(results, "seconds", UNMERGED, OVER_OTHERS):
                    name = row["contender"]
                    about = {"size": case.size_name, "ratio": ratio}
                    how = {"rounds": args.rounds, "attention": args.attention, "merged": said[name]}
                    rows.append({**about, **row, **how})
                    panel.add(name, ratio, row["gain"])
                notes += [f"{case.size_name}, {ratio:g}, {name}: {what}" for name, what in said.items() if what]
                # After every ratio: what was measured in an hour is kept when the next is broken off.
                output.write_csv(csv_path, rows, machine)
            panel.lines[output.PAPER] = output.paper_line(output.PAPER_SECONDS)
            panel.reference = output.PAPER
            panels.append(panel)
            notes += case.notes
    output.plot(plot_path, panels, machine)
    output.show(output.table(COLUMNS, rows), machine, notes, [csv_path, plot_path])


def _runs(args: argparse.Namespace, found: list[Case]) -> int:
    return sum(len(case.contenders) for case in found) * (len(args.ratios) * args.rounds + 1)


def _seconds(
    case: Case, contender: Contender, ratio: float, steps: int, device: torch.device, said: dict[str, str]
) -> float:
    """Seconds a step, of `steps` in a row."""

    def work() -> None:
        for step in range(steps):
            running.begin_step(step, steps)
            case.step()

    with contender.put_on(case.unet, ratio) as running:
        seconds, _ = timed(work, device)
        said[contender.name] = running.describe()
    return seconds / steps
