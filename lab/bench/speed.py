"""Time of one guided step of a whole UNet: seconds, and times faster than unmerged.

Contenders are the unmerged UNet, the extension's methods, tomesd with either kind of destinations,
ToDo at its ratios, and the limits: attention over the remaining keys or tokens, without merging. At
one ratio keys leaves more query-key pairs than the others: 0.4375 and 0.75 leave as many as 0.25
and 0.5 do. All runs are interleaved, quotients are taken within a round, and medians are shown.
"""

from __future__ import annotations

import argparse
import functools

from . import output, unet_runs
from .contenders import Attached
from .options import add_unet, fill_in, whole_number
from .timing import progress, timed
from .unet_runs import Case, all_contenders, cases, count_runs, measure, panels

USUAL = {**unet_runs.USUAL, "rounds": 5, "reuse_steps": 1}
USUAL["ratios"] = [0.0, 0.1, 0.25, 0.4375, 0.5, 0.6, 0.75, 0.84, 0.9375]
QUICK = {"sizes": [(256, 256)], "ratios": [0.3, 0.6], "rounds": 3}
TINY = {"sizes": [(128, 128)], "ratios": [0.3, 0.6], "rounds": 1}

COLUMNS = {
    "size": ("size", str),
    "ratio": ("ratio", output.number(2)),
    "contender": ("contender", str),
    **output.spread("seconds", "s/step"),
    **output.spread("gain", "x faster"),
    **output.OVER_OTHERS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench speed`."""
    add_unet(parser)
    parser.add_argument("--reuse-steps", type=whole_number, metavar="N", help="steps per matching")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and write `speed-ATTENTION.csv` and `.png`."""
    fill_in(args, USUAL, QUICK, TINY)
    results = output.Results(args, f"speed-{args.attention}")
    steps = args.reuse_steps
    choose = functools.partial(all_contenders, args, reuse_steps=steps)

    def seconds(case: Case, attached: Attached) -> float:
        def work() -> None:
            for step in range(steps):
                attached.begin_step(step, steps)
                case.step()

        return timed(work, args.device)[0] / steps

    with cases(args, choose) as all_cases, progress(count_runs(all_cases, args.rounds)) as tick:
        notes = measure(all_cases, args, "seconds", seconds, tick, results.save)
    plots = panels(results.rows, args, "times faster than unmerged", output.PAPER_SECONDS)
    results.show(COLUMNS, plots, notes)
