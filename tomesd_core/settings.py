"""What a person can set: one dataclass, one field list, one validation.

Everything that shows, stores, sends or checks a setting (the panel, the picture's parameters, the
API, presets, plot axes, docs/api.md's table) reads this list, so a new setting is one more field
here.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

from .schedule import SCHEDULES, ratio_at

METHODS = ("keys", "tokens", "paper")
PARTITIONS = ("random", "corner", "uniform", "alternating")
CELLS = ((2, 2), (4, 4))
"""Rows and columns of the cells that the ratio chooses from; each has one destination. See
`MergeSettings.cell`."""

HIGHEST_RATIO = 1 - 1 / (CELLS[-1][0] * CELLS[-1][1])
"""The largest ratio that the largest cell allows."""

RATIO_STEP = 0.0125
"""By how much the sliders of ratios move; the highest ratio is a multiple."""

FEWER_STEPS_EXPONENT = 2 / 3
"""Of the quotient of steps, by which a picture of few steps keeps more tokens. See
`MergeSettings.in_steps`."""

PASSES = ("both passes", "first pass", "hires pass")


class SettingsError(ValueError):
    """A setting has a value that it can't have. The message names the setting, the value and the
    range."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one field of `MergeSettings` is named, bounded and explained.

    `kind` is `number`, `integer`, `choice`, `flag`, or `pair` (two integers). The panel shows the
    fields that have a label; the others are for experts.
    """

    default: Any
    kind: str
    label: str = ""
    help: str = ""
    minimum: float = -math.inf
    maximum: float = math.inf
    step: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    former_label: str = ""
    """An older version's, which parameters and `ui-config.json` still have."""
    where: str = ""
    """Added to the range in an error, where the range depends on other settings."""

    @property
    def infotext(self) -> str | None:
        """The field's key in a picture's parameters; None for an expert field."""
        return f"ToMe {(self.former_label or self.label).lower()}" if self.label else None

    def check(self, name: str, value: Any) -> Any:
        """`value` in the field's own type; raises `SettingsError` when it isn't one that the field
        can have."""
        if value is None and self.optional:
            return None
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise SettingsError(f"{name} must be true or false, got {value!r}")
            return value
        if self.kind == "choice":
            # A number chosen on a page comes back as its text, or as a float; True is not the
            # choice 1.
            match = [
                one
                for one in self.choices
                if value in (one, str(one)) and not isinstance(value, bool)
            ]
            if not match:
                raise SettingsError(
                    f"{name} must be one of {', '.join(map(str, self.choices))}, got {value!r}"
                )
            return match[0]
        if self.kind == "pair":
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise SettingsError(f"{name} must be two integers {self._range}, got {value!r}")
            return tuple(self._number(name, side) for side in value)
        return self._number(name, value)

    @property
    def _range(self) -> str:
        return f"in [{self.minimum:g}, {self.maximum:g}]"

    def _number(self, name: str, value: Any) -> int | float:
        is_integer = self.kind != "number"
        is_number = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        )
        # An int may be larger than any float: it is out of every range, and can't be formatted.
        if is_number and abs(value) > sys.float_info.max:
            value = math.inf if value > 0 else -math.inf
        if not is_number or (is_integer and math.isfinite(value) and value != int(value)):
            kind = "an integer" if is_integer else "a number"
            raise SettingsError(f"{name} must be {kind} {self._range}, got {value!r}")
        if not self.minimum <= value <= self.maximum:
            raise SettingsError(f"{name} must lie {self._range}{self.where}, got {value:g}")
        return int(value) if is_integer else float(value)


def _field(default: Any, kind: str, *values: Any, **options: Any) -> Any:
    """A field of `MergeSettings` and its `Setting`: label, help, minimum, maximum and step come in
    this order.

    `initial` is the field's value before `MergeSettings` has worked out which default it has.
    """
    initial = options.pop("initial", default)
    return dataclasses.field(
        default=initial, metadata={"setting": Setting(default, kind, *values, **options)}
    )


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """What to merge, where and when.

    Raises `SettingsError` (a `ValueError`) when a value is out of its field's range, or when a
    ratio is above what the partition can remove (paper, section 3.1: every destination stays).
    """

    ratio: float = _field(
        0.8,
        "number",
        "Ratio",
        "Share of the tokens removed before self-attention. More is faster and less exact.",
        0,
        HIGHEST_RATIO,
        RATIO_STEP,
    )
    late_ratio: float = _field(
        0.75,
        "number",
        "Late ratio",
        "The ratio of late steps, unless the schedule is constant. Where only the ratio is set, it is at most that.",
        0,
        HIGHEST_RATIO,
        RATIO_STEP,
        initial=None,
    )
    schedule: str = _field(
        "constant",
        "choice",
        "Schedule",
        "constant: the same ratio in every step. linear: from ratio to late ratio. step: a change at one point. Where "
        "only a late ratio is set, it is linear.",
        choices=SCHEDULES,
        initial=None,
    )
    switch_at: float = _field(
        0.5,
        "number",
        "Switch at",
        "Where in the steps the late ratio takes over: 0 is the first step, 1 the last.",
        0,
        1,
        0.01,
    )
    max_downsample: int = _field(
        1,
        "choice",
        "Max downsample",
        "1: only layers at the full latent resolution, where the speed is; 2, 4, 8: coarser ones too.",
        choices=(1, 2, 4, 8),
    )
    min_tokens: int = _field(
        0,
        "integer",
        "Min tokens",
        "Layers with fewer tokens are left alone. 512x512 has 4096 tokens at level 1.",
        0,
        65536,
        256,
    )
    apply_to: str = _field(
        "both passes",
        "choice",
        "Apply to",
        "Which passes of hires fix merge. A picture without hires fix has only the first.",
        choices=PASSES,
    )
    reuse_steps: int = _field(
        1,
        "integer",
        "Reuse matching (steps)",
        "How many steps keep a matching. 1 matches in every step.",
        1,
        50,
        1,
        former_label="Rematch every",
    )
    method: str = _field(
        "keys",
        "choice",
        "Method",
        "keys: merges keys and values, each counted as often as the tokens it stands for. tokens: queries too, which "
        "are unmerged. paper: as published, not counted.",
        choices=METHODS,
    )
    full_steps: int = _field(
        20,
        "integer",
        "Steps for full ratio",
        "Pictures of fewer steps keep more tokens, since each of their steps weighs more. 1: all pictures merge at the "
        "full ratio.",
        1,
        150,
        1,
    )
    stride: tuple[int, int] | None = _field(None, "pair", minimum=1, maximum=16, optional=True)
    """Rows and columns of the cell that has one destination; None: as `cell` says."""
    partition: str = _field("random", "choice", choices=PARTITIONS)
    """How destinations are chosen (paper, table 2): random is one token drawn in each cell."""
    window: int | None = _field(32, "integer", minimum=1, maximum=4096, optional=True)
    """Side, in tokens, of the windows inside which a destination is looked for; None: the whole
    image."""
    skip_unprofitable: bool = _field(True, "flag")
    """Leaves out layers where, by a fixed rule, merging costs more time than it saves."""
    shared_draw: bool = _field(True, "flag")
    """One random choice for the whole batch, so that both halves of guidance share it (paper,
    section 4.1)."""
    redraw: bool | None = _field(None, "flag", optional=True)
    """Whether each new matching has a new random choice; None: with the method paper alone."""

    def __post_init__(self) -> None:
        for name in ("stride", "partition"):
            object.__setattr__(self, name, FIELDS[name].check(name, getattr(self, name)))
        if self.schedule is None:
            schedule = FIELDS["schedule"].default if self.late_ratio is None else "linear"
            object.__setattr__(self, "schedule", schedule)
        if self.late_ratio is None:
            late = FIELDS["late_ratio"].default
            object.__setattr__(self, "late_ratio", late_ratio_beside(self.ratio, late))
        highest = max_ratio(self.stride or CELLS[-1], self.partition)
        where = ""
        if self.partition == "alternating":
            where = " for the alternating partition"
        elif self.stride:
            where = f" for a {self.stride[0]}×{self.stride[1]} stride"
        for name, setting in FIELDS.items():
            if name in ("ratio", "late_ratio"):
                # A late ratio that the schedule never reaches can't be too high.
                unused = name == "late_ratio" and self.schedule == "constant"
                setting = dataclasses.replace(
                    setting, maximum=1.0 if unused else highest, where="" if unused else where
                )
            object.__setattr__(self, name, setting.check(name, getattr(self, name)))

    @property
    def cell(self) -> tuple[int, int]:
        """Rows and columns of the cell that has one destination: `stride`, or the smallest that
        allows the ratio.

        The largest ratio that the schedule reaches decides, so that a picture has cells of one
        size.
        """
        if self.stride is not None:
            return self.stride
        ends = {"constant": (self.ratio,), "linear": (self.ratio, self.late_ratio)}
        largest = max(ends.get(self.schedule, (self.ratio_at(0.0), self.ratio_at(1.0))))
        return next(cell for cell in CELLS if largest <= max_ratio(cell, self.partition))

    @property
    def merges_queries(self) -> bool:
        """Whether queries are merged too, so that the output must be unmerged."""
        return self.method != "keys"

    @property
    def weights_keys(self) -> bool:
        """Whether a merged key counts as often as the tokens that it stands for (proportional
        attention)."""
        return self.method != "paper"

    @property
    def exact(self) -> bool:
        """Whether matching is as published: over the whole image, in the tokens' own precision, no
        count rounded."""
        return self.window is None

    @property
    def draws_anew(self) -> bool:
        """Whether each new matching has a new random choice of destinations."""
        return self.method == "paper" if self.redraw is None else self.redraw

    def in_steps(self, steps: int | None) -> MergeSettings:
        """The settings of a picture of `steps` steps, None where that isn't known.

        Below `full_steps` it keeps (full_steps / steps) ** (2 / 3) times as many tokens: a sampler
        of higher order extrapolates, and over long steps that enlarges every error
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
        """The ratio at `progress`, from 0 (first step) to 1 (last). See `schedule.ratio_at`."""
        return ratio_at(progress, self.schedule, self.ratio, self.late_ratio, self.switch_at)


FIELDS: dict[str, Setting] = {
    field.name: field.metadata["setting"]
    for field in dataclasses.fields(MergeSettings)
    if "setting" in field.metadata
}
"""Every setting by name, in order."""

PANEL_FIELDS: dict[str, Setting] = {
    name: setting for name, setting in FIELDS.items() if setting.infotext
}
"""The settings of a generation: those that the panel shows and a preset holds. The others are for
experts."""


def late_ratio_beside(ratio: Any, late_ratio: Any) -> Any:
    """The late ratio where only the ratio was changed: never above it, so that late steps don't
    merge more."""
    numbers = all(isinstance(value, (int, float)) for value in (ratio, late_ratio))
    return min(ratio, late_ratio) if numbers else late_ratio


def max_ratio(stride: tuple[int, int], partition: str) -> float:
    """The highest ratio that a partition allows: the share of tokens that are sources.

    `stride` is (rows, columns). One destination a cell gives 1 - 1/(rows·columns) (paper, section
    3.1); the alternating partition makes every other token a destination, whatever the stride.
    """
    rows, columns = stride
    return 0.5 if partition == "alternating" else 1 - 1 / (rows * columns)
