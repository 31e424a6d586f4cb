"""The paper's tables, as ways to merge that are held against each other."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tomesd_core.presets import BUILT_IN
from tomesd_core.settings import MergeSettings

from .contenders import CORNER, OURS, RANDOM, UNMERGED, WAYS, Running

BASE: dict[str, Any] = {
    "ratio": 0.5,
    "schedule": "constant",
    "late_ratio": 0.2,
    "switch_at": 0.5,
    "max_downsample": 1,
    "min_tokens": 0,
    "reuse_steps": 1,
    "stride": (2, 2),
    "partition": "random",
    "window": None,
    "share_layers": False,
    "skip_unprofitable": False,
    "shared_draw": True,
}
"""What a row does not say otherwise: the paper's method, over the whole image.

Spelled out, never taken from the defaults: these are set from the tables, and must not move them. In layers as small as
the tiny model's merging hardly pays, and is seen all the same (`skip_unprofitable`).
"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make pictures: a contender, and for ours its settings."""

    contender: str
    ratio: float = 0.0
    settings: MergeSettings | None = None

    def put_on(self, unet: nn.Module) -> contextlib.AbstractContextManager[Running]:
        """While open, the UNet runs so; nothing is left behind."""
        how = {} if self.settings is None else {"settings": self.settings}
        return WAYS[self.contender](unet, self.ratio, **how)


def ours(**settings: Any) -> Variant:
    """Our merging with `BASE`, where `settings` do not say otherwise."""
    whole = MergeSettings(**{**BASE, **settings})
    return Variant(OURS, whole.ratio, whole)


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to merge under the name that its table gives it."""

    name: str
    ratio: float
    """The mean over the steps."""
    variant: Variant
    pair: object = None
    """What rows that are held against each other have in common, in a table with several rows of the reference."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that are held against those named `reference`."""

    title: str
    reference: str
    rows: Sequence[Row]
    over_ratio: bool = False
    """Whether the rows of one name are a curve over the ratio."""

    def reference_of(self, row: Row) -> Row | None:
        """What a row is held against: of the reference's rows the only one, or that of the same pair; else None."""
        found = [one for one in self.rows if one.name == self.reference]
        if len(found) > 1:
            found = [one for one in found if one.pair == row.pair]
        return found[0] if found and found[0] is not row else None


WHOLE = Row(UNMERGED, 0.0, Variant(UNMERGED))


def _halved(title: str, reference: str, **rows: dict[str, Any]) -> Table:
    """A table at a mean ratio of 50 %."""
    return Table(title, reference, [WHOLE, *(Row(name, 0.5, ours(**settings)) for name, settings in rows.items())])


def _over_ratio(contender: str, ratios: Sequence[float]) -> list[Row]:
    return [_at(contender, ratio, pair=ratio) for ratio in ratios]


def _at(contender: str, ratio: float, pair: object) -> Row:
    return Row(contender, ratio, ours(ratio=ratio) if contender == OURS else Variant(contender, ratio), pair)


def _change(schedule: str, early: float, late: float) -> dict[str, Any]:
    return {"ratio": early, "late_ratio": late, "schedule": schedule}


def _presets() -> list[Row]:
    """The shipped presets: here what is measured is what people get."""
    named = {name: MergeSettings(**values, skip_unprofitable=False) for name, (values, _) in BUILT_IN.items()}
    return [
        Row(name, _mean_ratio(settings), Variant(OURS, settings.ratio, settings))
        for name, settings in named.items()
        if settings.apply_to == "both passes"
    ]


def _mean_ratio(settings: MergeSettings) -> float:
    """Over many steps."""
    return sum(settings.ratio_at(step / 999) for step in range(1000)) / 1000


RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75)
PEER_RATIOS = (0.25, 0.5, 0.7)

TABLES = {
    "partition": _halved(
        "Partition: how destinations are chosen (paper, table 2)",
        "random 2x2",
        **{
            "alternating": {"partition": "alternating"},
            "corner 2x2": {"partition": "corner"},
            "uniform": {"partition": "uniform"},
            "uniform, own draws": {"partition": "uniform", "shared_draw": False},
            "random 2x2": {},
            "random 2x2, own draws": {"shared_draw": False},
        },
    ),
    "when": _halved(
        "When: early and late steps at one mean ratio (paper, table 3c)",
        "constant 50 %",
        **{
            "constant 50 %": {},
            "linear 60 to 40 %": _change("linear", 0.6, 0.4),
            "linear 40 to 60 %": _change("linear", 0.4, 0.6),
            "linear 75 to 25 %": _change("linear", 0.75, 0.25),
            "linear 25 to 75 %": _change("linear", 0.25, 0.75),
            "step 60 to 40 %": _change("step", 0.6, 0.4),
            "step 40 to 60 %": _change("step", 0.4, 0.6),
            "step 75 to 25 %": _change("step", 0.75, 0.25),
            "step 25 to 75 %": _change("step", 0.25, 0.75),
        },
    ),
    "window": _halved(
        "Window: the side, in tokens, of what a destination is looked for in",
        "whole image",
        **{"whole image": {}, "16": {"window": 16}, "8": {"window": 8}, "4": {"window": 4}},
    ),
    "reuse": _halved(
        "Reuse: for how many steps a matching is kept",
        "1",
        **{"1": {}, "2": {"reuse_steps": 2}, "4": {"reuse_steps": 4}, "8": {"reuse_steps": 8}},
    ),
    "share": _halved(
        "Share: a matching of each layer's own, or one for all layers on a grid",
        "own",
        **{"own": {}, "shared": {"share_layers": True}},
    ),
    "together": _halved(
        "Together: linear 60 to 40 % and a matching kept for 4 steps, and what may change beside them",
        "random 2x2",
        **{
            name: {**_change("linear", 0.6, 0.4), "reuse_steps": 4, **changed}
            for name, changed in {
                "random 2x2": {},
                "corner 2x2": {"partition": "corner"},
                "uniform": {"partition": "uniform"},
                "window 8": {"window": 8},
                "levels 1, 2": {"max_downsample": 2},
            }.items()
        },
    ),
    "where": _halved(
        "Where: the levels that merge, by their least tokens (paper, table 3b)",
        "level 1",
        **{"level 1": {}, "levels 1, 2": {"max_downsample": 2}, "levels 1, 2, 4": {"max_downsample": 4}},
    ),
    "ratio": Table(
        "Ratio: quality and time (paper, table 4)", UNMERGED, [WHOLE, *_over_ratio(OURS, RATIOS)], over_ratio=True
    ),
    "peers": Table(
        "Peers: ours and tomesd at equal ratio",
        OURS,
        [WHOLE, *(row for contender in (OURS, CORNER, RANDOM) for row in _over_ratio(contender, PEER_RATIOS))],
        over_ratio=True,
    ),
    "presets": Table(
        "Presets: the built-in ones that a picture of one pass tells apart", "Balanced", [WHOLE, *_presets()]
    ),
}
"""By name; those that set a default come first, `presets` after the tables that set its rows."""


def at_equal_time(seconds: Mapping[str, Mapping[float, float]]) -> Table:
    """Each of the peers' rows beside ours at the ratio that takes as long.

    `seconds`: by contender the seconds of each measured ratio; between them a straight line is drawn. Ours is at the
    lowest ratio, in whole percents, that takes no longer. A peer's row is left out where none does, and outside of what
    was measured.
    """
    rows = [WHOLE]
    for peer in (CORNER, RANDOM):
        for ratio in PEER_RATIOS:
            if not _is_measured(seconds.get(peer, {}), ratio):
                continue
            allowed = _between(seconds[peer], ratio)
            percents = [percent for percent in range(76) if _is_measured(seconds[OURS], percent / 100)]
            fast = [percent for percent in percents if _between(seconds[OURS], percent / 100) <= allowed]
            if fast:
                rows += [_at(OURS, fast[0] / 100, pair=(peer, ratio)), _at(peer, ratio, pair=(peer, ratio))]
    return Table("Time: ours and tomesd at equal time", OURS, rows, over_ratio=True)


def _is_measured(points: Mapping[float, float], x: float) -> bool:
    return bool(points) and min(points) <= x <= max(points)


def _between(points: Mapping[float, float], x: float) -> float:
    """What the line through `points`, y by x, is at `x`, which lies between them."""
    known = sorted(points)
    after = max(bisect.bisect_left(known, x), 1)
    low, high = known[after - 1], known[after]
    part = (x - low) / (high - low)
    return points[low] * (1 - part) + points[high] * part
