"""Speed-ups measured by `bench layer` or `bench speed`, and tables at equal time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .ablations import PEER_RATIOS
from .contenders import KEYS, LIMIT, UNMERGED
from .peers import CA_TOME, CA_TOME_MATCHES, CA_TOME_STEPS, CORNER, TOMA, TOMESD_MOST
from .variants import UNMERGED_ROW, Gains, Table, Variant, against_first, at_ratio


def times_faster(variant: Variant, gains: Gains, pairs: float) -> float | None:
    """Speed-up of a contender at its ratio; None if that wasn't measured.

    Variants with settings of their own, such as a schedule, have none. By their fraction of
    `pairs`, CA-ToMe is taken to be as fast as `tomesd` in the steps in which it matches and as the
    limit in the others, and ToMA as fast as the limit.
    """
    contender, ratio = variant.contender, variant.ratio
    if contender in (CA_TOME, TOMA):
        merged = min(1 - pairs**0.5, TOMESD_MOST)
        share = len(CA_TOME_MATCHES) / CA_TOME_STEPS if contender == CA_TOME else 0
        both = [gains.get(name, {}) for name in (CORNER, LIMIT)]
        if not all(_is_measured(points, merged) for points in both):
            return None
        matching, kept = (_between(points, merged) for points in both)
        return 1 / (share / matching + (1 - share) / kept)
    is_timed = contender != UNMERGED and variant == at_ratio(contender, ratio).variant
    points = gains.get(contender, {})
    return _between(points, ratio) if is_timed and _is_measured(points, ratio) else None


def at_equal_time(what: str, gains: Gains) -> Table:
    """`tomesd`'s corner against keys at the lowest whole percent that takes no longer.

    Skips ratios outside of the measured ones, and those at which keys never is as fast.
    """
    rows = [UNMERGED_ROW]
    keys, corner = gains.get(KEYS, {}), gains.get(CORNER, {})
    percents = [percent for percent in range(1, 100) if _is_measured(keys, percent / 100)]
    for ratio in PEER_RATIOS[CORNER]:
        needed = _between(corner, ratio) if _is_measured(corner, ratio) else math.inf
        if fast := [percent for percent in percents if _between(keys, percent / 100) >= needed]:
            rows += against_first(at_ratio(KEYS, fast[0] / 100), at_ratio(CORNER, ratio))
    return Table(f"Time: keys and tomesd at equal time, {what}", rows, over="ratio", gains=gains)


def _is_measured(points: Mapping[float, float], x: float) -> bool:
    return bool(points) and min(points) <= x <= max(points)


def _between(points: Mapping[float, float], x: float) -> float:
    """Interpolate y by x linearly at `x`, which lies between the points."""
    return float(np.interp(x, sorted(points), [points[at] for at in sorted(points)]))
