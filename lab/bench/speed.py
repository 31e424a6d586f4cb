"""One guided step of the whole UNet: seconds, and times faster than unmerged.

Unmerged, ours by method, tomesd's two kinds of destinations, ToDo at the ratios that it has, and
the limits: attention of all queries to as many keys as keys leaves, or over as many tokens as the
others leave, and no merging at all. At one ratio keys leaves more pairs of queries and keys than
the others: 0.4375 and 0.75 of it leave as many as 0.25 and 0.5. With --presets what is shipped runs
over a whole schedule, beside what it was in version 0.1.0 (`Balanced` is the default). All is
interleaved round by round, all quotients are taken within a round, and what is shown is their
median.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

from tomesd_core.settings import MergeSettings
from tomesd_core.webui.presets import BUILT_IN

from . import output, unet_runs
from .contenders import FORMER, UNMERGED, Contender, Running, merging, put_on
from .options import add_shared, add_unet, fill_in, whole_number
from .timing import progress, timed
from .unet_runs import Case, Runs, cases, count_runs, everyone, measure, panels

USUAL = {**unet_runs.USUAL, "rounds": 5, "reuse_steps": 1}
USUAL["ratios"] = [0.0, 0.1, 0.25, 0.4375, 0.5, 0.6, 0.75, 0.84, 0.9375]
QUICK = {"sizes": [(256, 256)], "ratios": [0.3, 0.6], "rounds": 3}
TINY = {"sizes": [(128, 128)], "ratios": [0.3, 0.6], "rounds": 1}

SCHEDULE_STEPS = 8
"""Enough for a schedule to go its way, and for a matching of version 0.1.0, kept for 4, to be made
twice."""

COLUMNS = {
    "size": ("size", str),
    "ratio": ("ratio", output.number(2)),
    "contender": ("contender", str),
    **output.spread("seconds", "s/step"),
    **output.spread("gain", "x faster"),
    **output.OVER_OTHERS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench speed`."""
    add_shared(parser)
    add_unet(parser)
    parser.add_argument(
        "--reuse-steps",
        type=whole_number,
        metavar="N",
        help="for how many steps our matching is kept",
    )
    parser.add_argument(
        "--presets", choices=FORMER, nargs="+", help="time these and what they were, nothing else"
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes `speed-ATTENTION.csv` and `.png`, of presets `presets-…`."""
    fill_in(args, USUAL, QUICK, TINY)
    schedules = _schedules(args)
    steps = SCHEDULE_STEPS if schedules else args.reuse_steps
    results = output.Results(args, f"{'presets' if schedules else 'speed'}-{args.attention}")

    def choose(tokens: int) -> tuple[Runs, list[str]]:
        return ({None: schedules}, []) if schedules else everyone(args, tokens, args.reuse_steps)

    def seconds(case: Case, running: Running) -> float:
        def work() -> None:
            for step in range(steps):
                running.begin_step(step, steps)
                case.step()

        return timed(work, args.device)[0] / steps

    with cases(args, choose) as all_cases, progress(count_runs(all_cases, args.rounds)) as tick:
        notes = measure(all_cases, args, "seconds", seconds, tick, results.save)
    plots = panels(results.rows, args, "times faster than unmerged", output.PAPER_SECONDS)
    results.show(COLUMNS, plots, notes)


def _schedules(args: argparse.Namespace) -> list[Contender]:
    """What `--presets` times, each by a schedule of its own; else nothing."""
    ours = [
        Contender(
            name,
            functools.partial(
                merging, settings=dataclasses.replace(one, skip_unprofitable=not args.force)
            ),
        )
        for preset in args.presets or ()
        for name, one in (
            (preset, MergeSettings(**{**BUILT_IN[preset][0], "full_steps": 1})),
            (f"{preset} before", FORMER[preset]),
        )
    ]
    return (
        [Contender(UNMERGED, functools.partial(put_on, name=UNMERGED, ratio=0.0)), *ours]
        if ours
        else []
    )
