"""How fast a variant is by what `bench layer` or `bench speed` measured, and `tomesd` beside keys
at equal time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .ablations import PEER_RATIOS
from .contenders import KEYS, LIMIT, UNMERGED
from .peers import CA_TOME, CA_TOME_MATCHES, CA_TOME_STEPS, CORNER, TOMA, TOMESD_MOST
from .variants import WHOLE, Gains, Table, Variant, at_ratio, beside


def times_faster(variant: Variant, gains: Gains, pairs: float) -> float | None:
    """How many times faster than unmerged a contender is at its ratio; None where that wasn't
    measured.

    Nor is it known of a variant with settings of its own, a schedule or other levels. By their
    share of `pairs`, CA-ToMe is taken to be as fast as `tomesd` in the steps in which it matches,
    and as the limit in the others; ToMA is always taken to be as fast as the limit.
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
    """`tomesd`'s corner at each of its ratios beside the method keys at the ratio that takes no
    longer.

    Of keys it is the lowest such ratio, in whole percents. A ratio of `tomesd`'s is left out where
    there is none, and outside of what was measured. Corner, since `tomesd`'s random destinations
    lie no nearer (`what`).
    """
    rows = [WHOLE]
    keys, corner = gains.get(KEYS, {}), gains.get(CORNER, {})
    percents = [percent for percent in range(1, 100) if _is_measured(keys, percent / 100)]
    for ratio in PEER_RATIOS[CORNER]:
        if not _is_measured(corner, ratio):
            continue
        needed = _between(corner, ratio)
        if fast := [percent for percent in percents if _between(keys, percent / 100) >= needed]:
            rows += beside(at_ratio(KEYS, fast[0] / 100), at_ratio(CORNER, ratio))
    return Table(f"Time: keys and tomesd at equal time, {what}", rows, over="ratio", gains=gains)


def _is_measured(points: Mapping[float, float], x: float) -> bool:
    return bool(points) and min(points) <= x <= max(points)


def _between(points: Mapping[float, float], x: float) -> float:
    """What the line through `points`, y by x, is at `x`, which lies between them."""
    return float(np.interp(x, sorted(points), [points[at] for at in sorted(points)]))
