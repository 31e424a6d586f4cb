"""Variants of merging that `bench quality` compares, and rows of its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from tomesd_core.plan import pairs_left
from tomesd_core.settings import METHODS, MergeSettings

from . import contenders
from .contenders import BASE, KEYS, PAPER, UNMERGED, UNWEIGHTED
from .peers import QUERIES, TODO, Attachment


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make pictures: a contender, its settings, and the sampler's steps."""

    contender: str
    ratio: float = 0.0
    settings: MergeSettings | None = None
    steps: int | None = None
    """None for the pipeline's."""
    sampler: str = "PLMS"
    """One of `samplers.SAMPLERS`."""

    @classmethod
    def of(cls, settings: MergeSettings) -> Variant:
        """Merging by these settings."""
        return cls(settings.method, settings.ratio, settings)

    def attach(self, unet: nn.Module) -> Attachment:
        """Attach the contender to a UNet."""
        return contenders.attach(unet, self.contender, self.ratio, self.settings)

    @property
    def unmerged(self) -> Variant:
        """The unmerged variant with the same steps and sampler."""
        return Variant(UNMERGED, steps=self.steps, sampler=self.sampler)

    @property
    def mean_ratio(self) -> float:
        """Mean of the ratio over many steps."""
        return self._mean(lambda ratio: ratio)

    @property
    def pairs(self) -> float:
        """Fraction of query-key pairs left in a merged layer, over many steps."""
        method = KEYS if self.contender in (KEYS, UNWEIGHTED, TODO, QUERIES) else PAPER
        return self._mean(lambda ratio: pairs_left(ratio, method))

    def _mean(self, value: Callable[[float], float]) -> float:
        if self.settings is None or self.settings.schedule == "constant":
            return round(value(self.ratio), 6)
        values = [value(self.settings.ratio_at(step / 999)) for step in range(1000)]
        return round(sum(values) / len(values), 6)


def base_variant(contender: str = PAPER, **settings: Any) -> Variant:
    """A variant of the extension's methods: `BASE` with `settings`."""
    method = KEYS if contender == UNWEIGHTED else contender
    whole = MergeSettings(**{**BASE, **settings, "method": method})
    return Variant(contender, whole.ratio, whole)


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant under its name in a table."""

    name: str
    variant: Variant
    reference: Row | None = None
    """Row that the differences are taken to."""


Gains = Mapping[str, Mapping[float, float]]
"""Speed-up by contender and ratio; linear in between."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table's rows."""

    title: str
    rows: Sequence[Row]
    over: str | None = None
    """`ratio`, `pairs` or `steps`: rows of one name are a curve over it."""
    gains: Gains | None = None
    """Speed-ups, for a table at equal time."""

    def without(self, contenders: set[str]) -> Table:
        """The table without these contenders."""
        return dataclasses.replace(
            self, rows=[row for row in self.rows if row.variant.contender not in contenders]
        )


UNMERGED_ROW = Row(UNMERGED, Variant(UNMERGED))


def at_ratio(contender: str, ratio: float) -> Row:
    """A contender at one ratio in all steps, under its own name."""
    if contender in (*METHODS, UNWEIGHTED):
        return Row(contender, base_variant(contender, ratio=ratio))
    return Row(contender, Variant(contender, ratio))


def against_first(first: Row, *others: Row) -> list[Row]:
    """`first`, and the others with `first` as reference."""
    return [first, *(dataclasses.replace(row, reference=first) for row in others)]
