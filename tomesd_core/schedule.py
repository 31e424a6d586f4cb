"""The ratio at a given step: early to late (paper, section 4.3 and table 3c)."""

from __future__ import annotations

SCHEDULES = ("constant", "linear", "step")


def progress_of(step: int, total: int | None) -> float:
    """How far step `step` (from 0) of `total` is: 0 at the first step, 1 at the last.

    An unknown total, or a single step, is 0. A step past the total is 1: some samplers take more
    than they say.
    """
    if total is None or total <= 1:
        return 0.0
    return min(max(step / (total - 1), 0.0), 1.0)


def ratio_at(
    progress: float, schedule: str, ratio: float, late_ratio: float, switch_at: float
) -> float:
    """The ratio at `progress` in [0, 1] (values outside are clamped).

    `constant` keeps `ratio`; `linear` goes from `ratio` to `late_ratio`; `step` is `late_ratio`
    from `switch_at` on.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        # Exact at both ends, where a rounding error could cost a token.
        return ratio * (1 - progress) + late_ratio * progress
    if schedule == "step" and progress >= switch_at:
        return late_ratio
    return ratio
