"""What `speed` and `memory` share: the UNet of the arguments, and everything that runs on it, size
by size."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from tomesd_core.settings import MergeSettings

from . import output
from .contenders import (
    CORNER,
    LIMIT_OF,
    OVER_OTHERS,
    RANDOM,
    TODO,
    UNMERGED,
    Contender,
    Running,
    contenders,
)
from .models import (
    LATENT_FACTOR,
    SD1,
    TINY,
    attention,
    build_unet,
    diffusers_unet,
    one_step,
    read_checkpoint,
)
from .timing import compared, interleaved

USUAL = {"sizes": [(512, 512)], "methods": ["keys", "paper"], "attention": "plain"}

Runs = Mapping["float | None", Sequence[Contender]]
"""By ratio, what runs; None: what has ratios of its own."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A UNet at one size."""

    size: str
    """Width and height in pixels."""
    unet: nn.Module
    step: Callable[[], Tensor]
    runs: Runs
    notes: Sequence[str]


@contextlib.contextmanager
def cases(
    args: argparse.Namespace, choose: Callable[[int], tuple[Runs, list[str]]]
) -> Iterator[list[Case]]:
    """One case for each of the arguments' sizes, all of one UNet, which has the arguments'
    attention while open.

    `choose` says what runs on so many tokens, and gives notes on what does not.
    """
    config, weights = (TINY if args.tiny else SD1), None
    if args.checkpoint is not None:
        config, weights = read_checkpoint(args.checkpoint)
    if args.diffusers:
        unet = diffusers_unet(args.device, args.torch_dtype, args.tiny)
    else:
        unet = build_unet(config, args.device, args.torch_dtype, weights)
    with attention(unet, args.attention):
        all_cases = []
        for width, height in args.sizes:
            runs, notes = choose((width // LATENT_FACTOR) * (height // LATENT_FACTOR))
            all_cases.append(
                Case(
                    f"{width}x{height}", unet, one_step(unet, config, (width, height)), runs, notes
                )
            )
        yield all_cases


def everyone(args: argparse.Namespace, tokens: int, reuse_steps: int = 1) -> tuple[Runs, list[str]]:
    """At each of the arguments' ratios the unmerged UNet, ours by the arguments' methods, the
    peers, and the limits.

    Ours merges at one ratio in all steps; with `--force` also where the rule says that it can't
    pay.
    """
    settings = MergeSettings(
        schedule="constant", full_steps=1, reuse_steps=reuse_steps, skip_unprofitable=not args.force
    )
    # Of the methods alone: with keys alone the limit of the peers tells nothing.
    limits = dict.fromkeys(LIMIT_OF[method] for method in args.methods)
    names = [UNMERGED, *args.methods, CORNER, RANDOM, TODO, *limits]
    runs: dict[float | None, Sequence[Contender]] = {}
    notes: list[str] = []
    for ratio in args.ratios:
        runs[ratio], left_out = contenders(names, ratio, tokens, args.torch_dtype, settings)
        notes += left_out
    return runs, notes


def count_runs(all_cases: Sequence[Case], rounds: int) -> int:
    """How often `measure` will tick: what the first runs of a size set up serves all its ratios."""
    return sum(
        len(some) * (rounds + (not i))
        for case in all_cases
        for i, some in enumerate(case.runs.values())
    )


def measure(
    all_cases: Sequence[Case],
    args: argparse.Namespace,
    what: str,
    one: Callable[[Case, Running], float],
    tick: Callable[[str], None],
    save: Callable[[list[output.Row]], None],
) -> list[str]:
    """Runs everything on every case: `one` gives the measure, called `what`, of a contender that is
    on the UNet.

    `save` gets the rows of a size and ratio as soon as they are known. Gives notes on what was
    merged and left out.
    """
    notes: list[str] = []
    for case in all_cases:
        for number, (ratio, some) in enumerate(case.runs.items()):
            descriptions: dict[str, str] = {}
            at = case.size if ratio is None else f"{case.size}, {ratio:g}"

            def run(
                contender: Contender, case: Case = case, descriptions: dict[str, str] = descriptions
            ) -> float:
                with contender.put_on(case.unet) as running:
                    value = one(case, running)
                    descriptions[contender.name] = running.describe()
                return value

            runs = {contender.name: functools.partial(run, contender) for contender in some}
            results = interleaved(
                runs, args.rounds, lambda name, at=at: tick(f"{name}, {at}"), int(not number)
            )
            about = {"size": case.size, "ratio": ratio}
            how = {"rounds": args.rounds, "attention": args.attention}
            rows = compared(results, what, UNMERGED, OVER_OTHERS)
            save(
                [
                    {**about, **row, **how, "merged": descriptions[str(row["contender"])]}
                    for row in rows
                ]
            )
            notes += [f"{at}, {name}: {merged}" for name, merged in descriptions.items() if merged]
        notes += case.notes
    return notes


def panels(
    rows: Sequence[output.Row], args: argparse.Namespace, up: str, paper: Mapping[float, float]
) -> list[output.Panel]:
    """A plot for each size: how many times better than unmerged, over the ratio or, where it has
    none, by contender."""
    by_size: dict[str, output.Panel] = {}
    for row in rows:
        title = f"{row['size']}, {args.attention} attention"
        panel = by_size.setdefault(row["size"], output.Panel(title, "ratio", up))
        if row["ratio"] is None:
            panel.across = ""
        panel.add(
            row["contender"],
            row["contender"] if row["ratio"] is None else row["ratio"],
            row["gain"],
        )
    for panel in by_size.values():
        if panel.across:
            panel.lines[output.PAPER] = output.paper_line(paper)
            panel.reference = output.PAPER
    return [*by_size.values()]
