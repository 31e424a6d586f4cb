"""The ratio at a given step: early to late (paper, section 4.3 and table 3c)."""

from __future__ import annotations

SCHEDULES = ("constant", "linear", "step")


def progress_of(step: int, total: int | None) -> float:
    """The position of `step` (from 0) among `total` steps: 0 for the first, 1 for the last.

    0 if the total is unknown or 1. 1 for steps past the total, since some samplers take more steps
    than they announce.
    """
    if total is None or total <= 1:
        return 0.0
    return min(max(step / (total - 1), 0.0), 1.0)


def ratio_at(
    progress: float, schedule: str, ratio: float, late_ratio: float, switch_at: float
) -> float:
    """The ratio at `progress`, clamped to [0, 1].

    `constant` keeps `ratio`; `linear` goes from `ratio` to `late_ratio`; `step` switches to
    `late_ratio` at `switch_at`.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        # Exact at both ends, where a rounding error could change the token count.
        return ratio * (1 - progress) + late_ratio * progress
    if schedule == "step" and progress >= switch_at:
        return late_ratio
    return ratio
