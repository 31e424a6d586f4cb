"""The paper's tables, and those of our methods, as ways to merge that are held against each other."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from tomesd_core.webui.presets import BUILT_IN

from .contenders import FORMER, KEYS, PAPER, TOKENS, UNMERGED, UNWEIGHTED
from .peers import (
    CA_TOME,
    CORNER,
    QUERIES,
    RANDOM,
    TODO,
    TODO_FACTORS,
    TOMA,
)
from .samplers import SAMPLERS
from .variants import WHOLE, Row, Table, Variant, at_ratio, beside, by_settings, ours, shipped


def _halved(title: str, reference: str, **rows: dict[str, Any]) -> Table:
    """The paper's method at a mean ratio of 50 %; `rows` by name: what each has of its own."""
    first = Row(reference, ours(**rows[reference]))
    held = [
        first if name == reference else Row(name, ours(**own), first) for name, own in rows.items()
    ]
    return Table(title, [WHOLE, *held])


def _change(schedule: str, early: float, late: float) -> dict[str, Any]:
    return {"ratio": early, "late_ratio": late, "schedule": schedule}


def _what() -> list[Row]:
    """Ratio by ratio the method keys, and what leaves as many pairs."""
    rows = [WHOLE]
    for keys, tokens in EQUAL_PAIRS.items():
        others = [
            at_ratio(name, tokens) for name in (TOKENS, PAPER, CORNER, RANDOM) if tokens is not None
        ]
        others += [at_ratio(UNWEIGHTED, keys)] if others else []
        others += [at_ratio(TODO, keys)] if keys in TODO_FACTORS else []
        rows += beside(at_ratio(KEYS, keys), *others)
    return rows


def _draw() -> list[Row]:
    rows = [WHOLE]
    for method, ratio in ((KEYS, 0.75), (KEYS, 0.84), (TOKENS, 0.5)):
        draws = {
            "kept": {"redraw": False},
            "new in each step": {"redraw": True},
            "corner": {"partition": "corner"},
        }
        rows += beside(
            *(
                Row(f"{method} {ratio:g}, {name}", ours(method, ratio=ratio, **own))
                for name, own in draws.items()
            )
        )
    return rows


def _schedules() -> list[Row]:
    """Ways to reach about one mean ratio, by method; the first of a method is constant."""
    ways: dict[str, list[tuple[str, float, float]]] = {
        KEYS: [
            ("constant", 0.84, 0),
            ("linear", 0.9375, 0.75),
            ("linear", 0.75, 0.9375),
            ("step", 0.9375, 0.75),
        ],
        TOKENS: [("constant", 0.6, 0), ("linear", 0.7, 0.5), ("linear", 0.5, 0.7)],
    }
    rows = [WHOLE]
    for method, schedules in ways.items():
        named = []
        for schedule, early, late in schedules:
            name = f"{method}, {schedule} {early:g}" + (f" to {late:g}" if late else "")
            named.append(
                Row(name, by_settings(shipped(method=method, **_change(schedule, early, late))))
            )
        rows += beside(*named)
    return rows


def _cells() -> list[Row]:
    """Smaller cells and larger ones, at ratios that both allow."""
    rows = [WHOLE]
    for method, ratios in ((KEYS, (0.5, 0.6, 0.75, 0.84, 0.9375)), (TOKENS, (0.5, 0.6, 0.75))):
        for ratio in ratios:
            cells = (2, 4) if ratio <= 0.75 else (4, 8)
            rows += beside(
                *(
                    Row(
                        f"{method} {ratio:g}, {side}×{side}",
                        ours(method, ratio=ratio, stride=(side, side)),
                    )
                    for side in cells
                )
            )
    return rows


def _few_steps() -> list[Row]:
    rows = []
    for steps in (4, 8, 20, 50):
        rows.append(Row(UNMERGED, Variant(UNMERGED, steps=steps)))
        ways = {every: ours(KEYS, ratio=0.84, reuse_steps=every) for every in (1, 2, 4)}
        rows += beside(
            *(
                Row(f"kept for {every}", dataclasses.replace(way, steps=steps))
                for every, way in ways.items()
            )
        )
    return rows


def _samplers() -> list[Row]:
    """Few steps of three samplers, each held against twenty: how near merged pictures are to their
    unmerged twins."""
    rows = []
    for sampler, ratio in itertools.product(SAMPLERS, (0.6, 0.84)):
        name = f"{sampler}, {KEYS} {ratio:g}"
        ways = [
            (name, 20, 1),
            (name, 8, 1),
            (name, 4, 1),
            (f"{name}, more kept", 8, 20),
            (f"{name}, more kept", 4, 20),
        ]
        rows += beside(
            *(
                Row(
                    name,
                    dataclasses.replace(
                        ours(KEYS, ratio=ratio, full_steps=full), steps=steps, sampler=sampler
                    ),
                )
                for name, steps, full in ways
            )
        )
    return rows


def _peers() -> list[Row]:
    rows = [WHOLE]
    for name, ratios in PEER_RATIOS.items():
        rows += [at_ratio(name, ratio) for ratio in ratios]
    return rows


def _pictures() -> list[Row]:
    """The presets that ship, and `tomesd` where its layer is about as fast as that of *Quality* and
    of *Balanced*."""
    presets = [
        Row(name, by_settings(shipped(**BUILT_IN[name][0])))
        for name in ("Quality", "Balanced", "Fast")
    ]
    return [WHOLE, *presets, at_ratio(CORNER, 0.35), at_ratio(CORNER, 0.65)]


def _presets() -> list[Row]:
    """The shipped presets beside what they were; here what is measured is what people get."""
    rows = [WHOLE]
    for name, (values, _) in BUILT_IN.items():
        now = shipped(**values)
        if now.apply_to != "both passes":
            continue
        before = Row(f"{name}, before", by_settings(FORMER[name]))
        # What did not change is there once.
        rows += (
            [Row(name, before.variant)]
            if now == FORMER[name]
            else beside(before, Row(name, by_settings(now)))
        )
    return rows


EQUAL_PAIRS = {0.4375: 0.25, 0.75: 0.5, 0.84: 0.6, 0.9375: None}
"""By ratio of the method keys, that at which what merges queries too leaves as many pairs; None:
not measured."""

PEER_RATIOS: dict[str, tuple[float, ...]] = {
    KEYS: (0.4375, 0.6, 0.75, 0.84, 0.9375),
    CORNER: (0.25, 0.5, 0.6, 0.75),
    QUERIES: (0.25, 0.5, 0.75),
    TODO: tuple(TODO_FACTORS),
    CA_TOME: (0.95, 0.9, 0.7),
    TOMA: (0.25, 0.5, 0.75),
}
"""By contender its ratios, and CA-ToMe's thresholds: 0.7 is the published one."""

TABLES = {
    "what": Table(
        "What: which tokens are merged, at equally many pairs (paper, table 3a)",
        _what(),
        over="pairs",
    ),
    "draw": Table("Draw: how often destinations are drawn, with a matching in every step", _draw()),
    "schedules": Table("Schedules: early and late ratios of our methods at one mean", _schedules()),
    "cells": Table("Cells: the size of a cell with one destination", _cells()),
    "steps": Table(
        "Steps: for how many steps a matching is kept, keys at 0.84", _few_steps(), over="steps"
    ),
    "samplers": Table("Samplers: few steps beside many", _samplers(), over="steps"),
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
            **{
                f"{schedule} {early} to {late} %": _change(schedule, early / 100, late / 100)
                for schedule in ("linear", "step")
                for early, late in ((60, 40), (40, 60), (75, 25), (25, 75))
            },
        },
    ),
    "window": _halved(
        "Window: the side, in tokens, of what a destination is looked for in",
        "whole image",
        **{"whole image": {}, "16": {"window": 16}, "8": {"window": 8}, "4": {"window": 4}},
    ),
    "reuse": _halved(
        "Reuse: for how many steps a matching is kept, and the draw with it",
        "1",
        **{"1": {}, "2": {"reuse_steps": 2}, "4": {"reuse_steps": 4}, "8": {"reuse_steps": 8}},
    ),
    "where": _halved(
        "Where: the levels that merge, by their least tokens (paper, table 3b)",
        "level 1",
        **{
            "level 1": {},
            "levels 1, 2": {"max_downsample": 2},
            "levels 1, 2, 4": {"max_downsample": 4},
        },
    ),
    "peers": Table("Peers: keys beside the methods of others", _peers(), over="pairs"),
    "defaults": Table(
        "Defaults: as shipped, and as they were",
        [
            WHOLE,
            *beside(
                Row("before", by_settings(FORMER["Balanced"])),
                Row("shipped", by_settings(shipped())),
            ),
        ],
    ),
    "pictures": Table("Pictures: presets, and tomesd about as fast as the first two", _pictures()),
    "presets": Table(
        "Presets: the built-in ones that a picture of one pass tells apart, and as they were",
        _presets(),
    ),
}
"""By name; those that set a default come first, `presets` after the tables that set its rows."""
