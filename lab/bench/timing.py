"""Interleaved rounds, and the medians of their results."""

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
    """Median and quartiles of measurements."""

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
    """Spread of values/others round by round, which cancels what slows a whole round."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def compared(
    results: Mapping[str, Sequence[float]],
    what: str,
    baseline: str | None,
    others: Mapping[str, Mapping[str, str]],
) -> list[dict[str, object]]:
    """Return a row per name: the spread of its results as `what`, and its quotients to others.

    `gain` is the baseline over it, with quartiles. `others` names, by column and name, the divisor;
    None if there is none or it wasn't measured. Quotients are taken within rounds.
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
    """Exponent p of values growing as sizes^p, by least squares; None for fewer than two sizes."""
    if len(sizes) < 2:
        return None
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, values)]).slope


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Run `work`, wait for the device, and return its seconds and its result."""
    _wait_for(device)
    began = time.perf_counter()
    result = work()
    _wait_for(device)
    return time.perf_counter() - began, result


def interleaved(
    runs: Mapping[str, Callable[[], T]], rounds: int, tick: Callable[[str], None], warmup: int = 1
) -> dict[str, list[T]]:
    """Run everything once per round, each round starting at another one; return results by name.

    A slow minute of the machine then affects all alike, and none always follows the same other one.
    The first `warmup` rounds are dropped. `tick` is called with the next name.
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
    """Show a progress bar of `total` runs; yield a function to call with each run's name."""
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
