"""Interleaved rounds, and the medians of what they gave."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from .packages import require

T = TypeVar("T")


class Spread(NamedTuple):
    """The median of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired(values: Sequence[float], others: Sequence[float]) -> Spread:
    """The quotients values/others, round by round: what slows a whole round does not count."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def compared(
    results: Mapping[str, Sequence[float]],
    what: str,
    baseline: str | None,
    others: Mapping[str, Mapping[str, str]],
) -> list[dict[str, object]]:
    """A row for each name: the spread of its results, as `what`, and how it stands to others of the
    same rounds.

    `gain` is the baseline over it, with quartiles. `others` says, by column and name, over which
    other it is taken; None where there is no such one, or it was not measured.
    """
    rows = []
    for name, values in results.items():
        row: dict[str, object] = {"contender": name}
        row[what], row[f"{what}_low"], row[f"{what}_high"] = spread(values)
        if baseline is not None:
            row["gain"], row["gain_low"], row["gain_high"] = paired(results[baseline], values)
        for column, other_of in others.items():
            other = other_of.get(name)
            row[column] = paired(values, results[other]).median if other in results else None
        rows.append(row)
    return rows


def growth(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The exponent p with which values grow as sizes^p: the slope of the least-squares line through
    their logarithms.

    None for fewer than two sizes.
    """
    if len(sizes) < 2:
        return None
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(value) for value in values]
    ).slope


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Runs `work`, until the device is done with it; returns its seconds and its result."""
    _wait_for(device)
    began = time.perf_counter()
    result = work()
    _wait_for(device)
    return time.perf_counter() - began, result


def interleaved(
    runs: Mapping[str, Callable[[], T]], rounds: int, tick: Callable[[str], None], warmup: int = 1
) -> dict[str, list[T]]:
    """Runs everything once a round, each round beginning with another: `rounds` results of each, by
    name.

    So a slow minute of the machine falls on all alike, and none always runs behind the same moment.
    The `warmup` rounds before them are not kept. `tick` is told the name of what is run next.
    """
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            tick(name)
            result = runs[name]()
            if number >= 0:
                results[name].append(result)
    return results


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of `total` runs; what it yields is called with a run's name before the run."""
    with require("tqdm").tqdm(total=total, unit="run") as bar:

        def tick(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield tick


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
