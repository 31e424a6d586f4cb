"""What `bench quality` holds against each other: ways to merge, rows of a table, and tables."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tomesd_core.plan import pairs_left
from tomesd_core.settings import METHODS, MergeSettings

from .contenders import BASE, KEYS, PAPER, UNMERGED, UNWEIGHTED, put_on
from .peers import QUERIES, TODO, Running


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make pictures: a contender, for ours its settings, and in how many steps."""

    contender: str
    ratio: float = 0.0
    settings: MergeSettings | None = None
    steps: int | None = None
    """None: the studio's."""
    sampler: str = "PLMS"
    """One of `samplers.SAMPLERS`."""

    def put_on(self, unet: nn.Module) -> contextlib.AbstractContextManager[Running]:
        """While open, the UNet runs so; nothing is left behind."""
        return put_on(unet, self.contender, self.ratio, self.settings)

    @property
    def unmerged(self) -> Variant:
        """The way to make this one's twins."""
        return Variant(UNMERGED, steps=self.steps, sampler=self.sampler)

    @property
    def mean_ratio(self) -> float:
        """Over many steps."""
        return _mean(self._ratios)

    @property
    def pairs(self) -> float:
        """The share of query-key pairs left in a layer that merges, over many steps."""
        method = KEYS if self.contender in (KEYS, UNWEIGHTED, TODO, QUERIES) else PAPER
        return _mean([pairs_left(ratio, method) for ratio in self._ratios])

    @property
    def _ratios(self) -> list[float]:
        if self.settings is None or self.settings.schedule == "constant":
            return [self.ratio]
        return [self.settings.ratio_at(step / 999) for step in range(1000)]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


def by_settings(settings: MergeSettings) -> Variant:
    """Our merging as these settings say."""
    return Variant(settings.method, settings.ratio, settings)


def ours(contender: str = PAPER, **settings: Any) -> Variant:
    """A contender of ours with `BASE`, where `settings` do not say otherwise."""
    whole = MergeSettings(
        **{**BASE, **settings, "method": KEYS if contender == UNWEIGHTED else contender}
    )
    return Variant(contender, whole.ratio, whole)


def shipped(**settings: Any) -> MergeSettings:
    """As people get it, but that a layer is never left out for the tiny model's size."""
    return MergeSettings(**settings, skip_unprofitable=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to merge under the name that its table gives it."""

    name: str
    variant: Variant
    reference: Row | None = None
    """The row of the same table that it is held against."""


Gains = Mapping[str, Mapping[float, float]]
"""By contender how many times faster than unmerged it was timed at each ratio; straight lines are
drawn between."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, of which some are held against others."""

    title: str
    rows: Sequence[Row]
    over: str | None = None
    """`ratio`, `pairs` or `steps`: the rows of one name are a curve over it."""
    gains: Gains | None = None
    """How fast its contenders are, where it is a table at equal time."""

    def without(self, contenders: set[str]) -> Table:
        """The table without these contenders' rows."""
        return dataclasses.replace(
            self, rows=[row for row in self.rows if row.variant.contender not in contenders]
        )


WHOLE = Row(UNMERGED, Variant(UNMERGED))


def at_ratio(contender: str, ratio: float) -> Row:
    """A contender at one ratio in all steps, under its own name."""
    is_ours = contender in (*METHODS, UNWEIGHTED)
    return Row(contender, ours(contender, ratio=ratio) if is_ours else Variant(contender, ratio))


def beside(first: Row, *others: Row) -> list[Row]:
    """`first`, and others that are held against it."""
    return [first, *(dataclasses.replace(row, reference=first) for row in others)]
