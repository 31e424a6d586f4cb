"""The result of a measurement: the speed-up from the seconds of unmerged and merged steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median

MOST_SPREAD = 0.1
"""The spread above which a result is too noisy."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result for one size."""

    line: str
    """For people."""
    times_faster: float | None = None
    """None if the settings merge nothing there."""
    spread: float | None = None
    """Relative standard error of `times_faster`."""
    attention_share: float | None = None
    """Fraction of an unmerged step spent in self-attention."""
    memory_saved: float | None = None
    """Fraction of the device's peak memory; None if unknown."""


def line_of(size: str, times: float, spread: float, share: float, saving: float | None) -> str:
    """The line of a result; the numbers are those of `Result`."""
    if spread >= MOST_SPREAD:
        least, most = times / (1 + spread), times * (1 + spread)
        return f"too noisy to tell at {size}: between {least:.2f} and {most:.2f} times faster"
    line = f"no faster at {size}: attention is {share:.0%} of a step here"
    if times > 1 + max(spread, 0.005):
        error = f"± {max(spread, 0.01):.0%}"
        memory = f", {saving:.0%} less memory" if saving and saving >= 0.005 else ""
        line = f"{times:.2f} times faster at {size} ({error}){memory}, on this machine"
    return line.replace("%", " %")


def times_faster(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float]:
    """The speed-up of merged steps, and its relative standard error.

    `pairs` holds the seconds of the unmerged and of the merged steps of each pair of rounds, in
    order. Each pair counts as the median of itself and its neighbours, so that outliers don't
    matter, and each part of the schedule has its share. The error is estimated from unmerged steps
    at the same place of neighbouring pairs: the schedule doesn't affect these, and they are as
    noisy as the merged ones.
    """
    unmerged, merged = (
        _smoothed([fmean(steps) for steps in kind]) for kind in zip(*pairs, strict=True)
    )
    changes = [
        abs(math.log(one / other))
        for (before, _), (after, _) in pairwise(pairs)
        for one, other in zip(before, after, strict=True)
    ]
    # Half of the differences of normal noise are below 0.954 standard deviations; the root allows
    # for a small sample.
    deviation = median(changes) / 0.954 * math.sqrt(1 + 2 / len(changes))
    steps = len(pairs) * len(pairs[0][0])
    return sum(unmerged) / sum(merged), math.sqrt(2 / steps) * deviation


def _smoothed(times: Sequence[float]) -> list[float]:
    if len(times) < 3:
        return list(times)
    return [median(times[first : first + 3]) for first in range(len(times) - 2)]
