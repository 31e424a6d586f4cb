"""The settings of a generation: one dataclass, one field list, one validation.

The panel, the picture's parameters, the API, presets, plot axes and the table in docs/api.md are
made from this list, so a new setting is one more field here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .fields import Setting, SettingsError

__all__ = ["FIELDS", "PANEL_FIELDS", "MergeSettings", "Setting", "SettingsError", "max_ratio"]

SCHEDULES = ("constant", "linear", "step")
METHODS = ("keys", "tokens", "paper")
PARTITIONS = ("random", "corner", "uniform", "alternating")
CELLS = ((2, 2), (4, 4))
"""Cell sizes (rows, columns) by ratio; each cell has one destination. See `MergeSettings.cell`."""

HIGHEST_RATIO = 1 - 1 / (CELLS[-1][0] * CELLS[-1][1])
"""The largest ratio that the largest cell allows."""

RATIO_STEP = 0.0125
"""Step of the ratio sliders; the highest ratio is a multiple."""

FEWER_STEPS_EXPONENT = 2 / 3
"""Exponent of the step quotient by which short samplings keep more tokens. See `in_steps`."""

PASSES = ("both passes", "first pass", "hires pass")


def _field(default: Any, kind: str, *values: Any, **options: Any) -> Any:
    """A field of `MergeSettings` with its `Setting`; `values` follow `Setting`'s order.

    `initial` is the value of the field before `__post_init__` has chosen a default.
    """
    initial = options.pop("initial", default)
    setting = Setting(default, kind, *values, **options)
    return dataclasses.field(default=initial, metadata={"setting": setting})


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """Which tokens to merge, in which layers and at which steps.

    Raises `SettingsError` (a `ValueError`) for a value out of its field's range, and for a ratio
    above the share of sources in the partition (paper, section 3.1: every destination stays).
    """

    ratio: float = _field(
        0.8,
        "number",
        "Ratio",
        "Share of the tokens removed before self-attention. Higher is faster and less exact.",
        *(0, HIGHEST_RATIO, RATIO_STEP),
    )
    late_ratio: float = _field(
        0.75,
        "number",
        "Late ratio",
        "Ratio of the late steps, unless the schedule is constant. If only the ratio is set, at "
        "most that ratio.",
        *(0, HIGHEST_RATIO, RATIO_STEP),
        initial=None,
    )
    schedule: str = _field(
        "constant",
        "choice",
        "Schedule",
        "constant: the same ratio in every step. linear: from ratio to late ratio. step: switches "
        "at one point. Linear if only a late ratio is set.",
        choices=SCHEDULES,
        initial=None,
    )
    switch_at: float = _field(
        0.5,
        "number",
        "Switch at",
        "Point at which the late ratio takes over: 0 is the first step, 1 the last.",
        *(0, 1, 0.01),
    )
    max_downsample: int = _field(
        1,
        "choice",
        "Max downsample",
        "Coarsest layers to merge. 1: full latent resolution only, where most of the time goes; "
        "2, 4, 8: coarser layers too.",
        choices=(1, 2, 4, 8),
    )
    min_tokens: int = _field(
        0,
        "integer",
        "Min tokens",
        "Skip layers with fewer tokens. 512x512 has 4096 tokens at level 1.",
        *(0, 65536, 256),
    )
    apply_to: str = _field(
        "both passes",
        "choice",
        "Apply to",
        "Passes of hires fix that merge. Without hires fix there is only the first pass.",
        choices=PASSES,
    )
    reuse_steps: int = _field(
        1,
        "integer",
        "Reuse matching (steps)",
        "Number of sampler steps that share one matching; 1 recomputes it every step.",
        *(1, 50, 1),
        former_label="Rematch every",
    )
    method: str = _field(
        "keys",
        "choice",
        "Method",
        "keys: merge keys and values, weighting each merged key by its number of tokens. tokens: "
        "also merge queries and unmerge the output. paper: as published, unweighted.",
        choices=METHODS,
    )
    full_steps: int = _field(
        20,
        "integer",
        "Steps for full ratio",
        "Samplings with fewer steps keep more tokens, since each of their steps matters more. "
        "1: always merge at the full ratio.",
        *(1, 150, 1),
    )
    stride: tuple[int, int] | None = _field(None, "pair", minimum=1, maximum=16, optional=True)
    """Rows and columns of the cell that has one destination; None: chosen by `cell`."""
    partition: str = _field("random", "choice", choices=PARTITIONS)
    """Choice of destinations (paper, table 2); `random` draws one token per cell."""
    window: int | None = _field(32, "integer", minimum=1, maximum=4096, optional=True)
    """Side, in tokens, of the windows in which destinations are searched; None: the whole image."""
    skip_unprofitable: bool = _field(True, "flag")
    """Skip layers where, by a fixed rule, merging costs more time than it saves."""
    shared_draw: bool = _field(True, "flag")
    """One random draw per batch, so that both halves of guidance share it (paper, section 4.1)."""
    redraw: bool | None = _field(None, "flag", optional=True)
    """Whether each new matching has a new random draw; None: only with the method `paper`."""

    def __post_init__(self) -> None:
        for name in ("stride", "partition"):
            object.__setattr__(self, name, FIELDS[name].check(name, getattr(self, name)))
        if self.schedule is None:
            schedule = FIELDS["schedule"].default if self.late_ratio is None else "linear"
            object.__setattr__(self, "schedule", schedule)
        if self.late_ratio is None:
            late = FIELDS["late_ratio"].default
            object.__setattr__(self, "late_ratio", late_ratio_for(self.ratio, late))
        for name, setting in FIELDS.items():
            if name in ("ratio", "late_ratio"):
                setting = self._bounded(name, setting)
            object.__setattr__(self, name, setting.check(name, getattr(self, name)))

    def _bounded(self, name: str, setting: Setting) -> Setting:
        """A ratio's setting with the maximum that the partition allows."""
        # The schedule never reaches the late ratio if it is constant, so it can't be too high.
        if name == "late_ratio" and self.schedule == "constant":
            return dataclasses.replace(setting, maximum=1.0)
        where = ""
        if self.partition == "alternating":
            where = " for the alternating partition"
        elif self.stride:
            where = f" for a {self.stride[0]}×{self.stride[1]} stride"
        highest = max_ratio(self.stride or CELLS[-1], self.partition)
        return dataclasses.replace(setting, maximum=highest, where=where)

    @property
    def cell(self) -> tuple[int, int]:
        """Rows and columns of the cell that has one destination.

        `stride` if set, else the smallest cell that allows the largest ratio of the schedule, so
        that a picture has cells of one size.
        """
        if self.stride is not None:
            return self.stride
        largest = max(self.ratio_at(0.0), self.ratio_at(1.0))
        return next(cell for cell in CELLS if largest <= max_ratio(cell, self.partition))

    @property
    def panel_values(self) -> dict[str, Any]:
        """The values of `PANEL_FIELDS`, by name."""
        return {name: getattr(self, name) for name in PANEL_FIELDS}

    @property
    def merges_queries(self) -> bool:
        """Whether queries are merged too, so that the output must be unmerged."""
        return self.method != "keys"

    @property
    def weights_keys(self) -> bool:
        """Whether merged keys are weighted by their tokens (proportional attention)."""
        return self.method != "paper"

    @property
    def exact(self) -> bool:
        """Whether matching is as published: whole image, full precision, no rounded count."""
        return self.window is None

    @property
    def redraws(self) -> bool:
        """Whether each new matching has a new random draw of destinations."""
        return self.method == "paper" if self.redraw is None else self.redraw

    def in_steps(self, steps: int | None) -> MergeSettings:
        """The settings for a sampling of `steps` steps; None if that number is unknown.

        Below `full_steps`, (full_steps / steps) ** (2 / 3) times as many tokens are kept: samplers
        of higher order extrapolate, and over long steps that amplifies every error
        (docs/quality.md, "Few steps").
        """
        if not steps or steps >= self.full_steps:
            return self
        more = (self.full_steps / steps) ** FEWER_STEPS_EXPONENT
        ratio, late_ratio = (
            max(0.0, 1 - (1 - ratio) * more) for ratio in (self.ratio, self.late_ratio)
        )
        return dataclasses.replace(self, ratio=ratio, late_ratio=late_ratio, full_steps=1)

    def ratio_at(self, progress: float) -> float:
        """The ratio at `progress`, from 0 (first step) to 1 (last) (paper, section 4.3)."""
        progress = min(max(progress, 0.0), 1.0)
        if self.schedule == "linear":
            # Exact at both ends, where a rounding error could change the token count.
            return self.ratio * (1 - progress) + self.late_ratio * progress
        if self.schedule == "step" and progress >= self.switch_at:
            return self.late_ratio
        return self.ratio


FIELDS: dict[str, Setting] = {
    field.name: field.metadata["setting"]
    for field in dataclasses.fields(MergeSettings)
    if "setting" in field.metadata
}
"""Every setting by name, in order."""

PANEL_FIELDS: dict[str, Setting] = {
    name: setting for name, setting in FIELDS.items() if setting.infotext
}
"""The settings that the panel shows and a preset holds. The others are for experts."""

BEFORE_NAMED = {"method": "paper", "full_steps": 1}
"""Values for parameters, presets and lists from versions without these fields."""


def late_ratio_for(ratio: Any, late_ratio: Any) -> Any:
    """The late ratio if only `ratio` was changed: at most `ratio`, so late steps merge no more."""
    numbers = all(isinstance(value, (int, float)) for value in (ratio, late_ratio))
    return min(ratio, late_ratio) if numbers else late_ratio


def progress_of(step: int, total: int | None) -> float:
    """The position of `step` (from 0) among `total` steps: 0 for the first, 1 for the last.

    0 if the total is unknown or 1. 1 for steps past the total, since some samplers take more steps
    than they announce.
    """
    if total is None or total <= 1:
        return 0.0
    return min(max(step / (total - 1), 0.0), 1.0)


def max_ratio(stride: tuple[int, int], partition: str) -> float:
    """The highest ratio that a partition allows: its share of sources.

    `stride` is (rows, columns). One destination per cell gives 1 - 1/(rows·columns) (paper, section
    3.1); the alternating partition makes every other token a destination, whatever the stride.
    """
    rows, columns = stride
    return 0.5 if partition == "alternating" else 1 - 1 / (rows * columns)
