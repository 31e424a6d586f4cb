"""Shared by `speed` and `memory`: a UNet, and all contenders on it, size by size."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from tomesd_core.settings import MergeSettings

from . import contenders, models, output
from .contenders import UNMERGED, Contender
from .peers import CORNER, RANDOM, TODO, Attached
from .timing import compared, interleaved

USUAL = {"sizes": [(512, 512)], "methods": ["keys", "paper"], "attention": "plain"}

Runs = Mapping[float, Sequence[Contender]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A UNet at one size."""

    size: str
    unet: nn.Module
    step: Callable[[], Tensor]
    runs: Runs
    notes: Sequence[str]


Measure = Callable[[Case, Attached], float]


@contextlib.contextmanager
def cases(
    args: argparse.Namespace, choose: Callable[[int], tuple[Runs, list[str]]]
) -> Iterator[list[Case]]:
    """Yield one case per size, all of one UNet, which has the chosen attention while open.

    `choose` returns the contenders for a number of tokens, and notes on skipped ones.
    """
    config, weights = (models.TINY if args.tiny else models.SD1), None
    if args.checkpoint is not None:
        config, weights = models.read_checkpoint(args.checkpoint)
    if args.diffusers:
        unet = models.diffusers_unet(args.device, args.torch_dtype, args.tiny)
    else:
        unet = models.build_unet(config, args.device, args.torch_dtype, weights)
    with models.attention(unet, args.attention):
        all_cases = []
        for width, height in args.sizes:
            tokens = (width // models.LATENT_FACTOR) * (height // models.LATENT_FACTOR)
            step = models.one_step(unet, config, (width, height))
            all_cases.append(Case(f"{width}x{height}", unet, step, *choose(tokens)))
        yield all_cases


def all_contenders(
    args: argparse.Namespace, tokens: int, reuse_steps: int = 1
) -> tuple[Runs, list[str]]:
    """At each ratio the unmerged UNet, the chosen methods, the peers, and the limits.

    The extension merges at one ratio in all steps; `--force` turns `skip_unprofitable` off.
    """
    settings = MergeSettings(
        schedule="constant", full_steps=1, reuse_steps=reuse_steps, skip_unprofitable=not args.force
    )
    # Only limits of the chosen methods: with keys alone, the peers' limit adds nothing.
    limits = dict.fromkeys(contenders.LIMIT_OF[method] for method in args.methods)
    names = [UNMERGED, *args.methods, CORNER, RANDOM, TODO, *limits]
    runs: dict[float, Sequence[Contender]] = {}
    notes: list[str] = []
    for ratio in args.ratios:
        runs[ratio], skipped = contenders.available(
            names, ratio, tokens, args.torch_dtype, settings
        )
        notes += skipped
    return runs, notes


def count_runs(all_cases: Sequence[Case], rounds: int) -> int:
    """Number of runs in `measure`: one warm-up round per size, and `rounds` per ratio."""
    return sum(
        len(some) * (rounds + (not i))
        for case in all_cases
        for i, some in enumerate(case.runs.values())
    )


def measure(
    all_cases: Sequence[Case],
    args: argparse.Namespace,
    what: str,
    one: Measure,
    tick: Callable[[str], None],
    save: Callable[[list[output.Row]], None],
) -> list[str]:
    """Run all contenders on every case; `one` measures an attached contender, named `what`.

    `save` gets the rows of a size and ratio once they are known. Returns notes on merged and
    skipped contenders.
    """
    notes: list[str] = []
    for case in all_cases:
        for number, (ratio, some) in enumerate(case.runs.items()):
            merged: dict[str, str] = {}
            at = f"{case.size}, {ratio:g}"

            run = functools.partial(_measure_one, case, one, merged)
            runs = {contender.name: functools.partial(run, contender) for contender in some}
            warmup = int(not number)  # A size's first runs warm up for all its ratios.
            results = interleaved(
                runs, args.rounds, lambda name, at=at: tick(f"{name}, {at}"), warmup
            )
            about = {"size": case.size, "ratio": ratio}
            how = {"rounds": args.rounds, "attention": args.attention}
            rows = compared(results, what, UNMERGED, contenders.OVER_OTHERS)
            save([{**about, **row, **how, "merged": merged[row["contender"]]} for row in rows])
            notes += [f"{at}, {name}: {summary}" for name, summary in merged.items() if summary]
        notes += case.notes
    return notes


def _measure_one(case: Case, one: Measure, merged: dict[str, str], contender: Contender) -> float:
    with contender.attach(case.unet) as attached:
        value = one(case, attached)
        merged[contender.name] = attached.describe()
    return value


def panels(
    rows: Sequence[output.Row], args: argparse.Namespace, up: str, paper: Mapping[float, float]
) -> list[output.Panel]:
    """Plot per size: improvements over unmerged by ratio, and the paper's."""
    by_size: dict[str, output.Panel] = {}
    paper_line = [(ratio, paper[0.0] / value) for ratio, value in paper.items()]
    for row in rows:
        title = f"{row['size']}, {args.attention} attention"
        panel = by_size.setdefault(row["size"], output.Panel(title, "ratio", up))
        panel.add(row["contender"], row["ratio"], row["gain"])
    for panel in by_size.values():
        panel.lines[output.PAPER], panel.reference = paper_line, output.PAPER
    return [*by_size.values()]
