"""Tables of `bench quality`: the paper's, and those of the extension's methods."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from tomesd_core.settings import MergeSettings
from tomesd_core.webui.presets import BUILT_IN

from .contenders import KEYS, PAPER, TOKENS, UNMERGED, UNWEIGHTED
from .peers import CA_TOME, CORNER, QUERIES, RANDOM, TODO, TODO_FACTORS, TOMA
from .samplers import SAMPLERS
from .variants import UNMERGED_ROW, Row, Table, Variant, against_first, at_ratio, base_variant


def shipped_settings(**settings: Any) -> MergeSettings:
    """Settings as shipped, but without the rule that skips layers as small as the tiny models'."""
    return MergeSettings(**settings, skip_unprofitable=False)


def _halved(title: str, reference: str, **rows: dict[str, Any]) -> Table:
    """Table of the paper's method at a mean ratio of 50 %, by row the settings that differ."""
    first = Row(reference, base_variant(**rows[reference]))
    compared = [
        first if name == reference else Row(name, base_variant(**settings), first)
        for name, settings in rows.items()
    ]
    return Table(title, [UNMERGED_ROW, *compared])


def _what() -> list[Row]:
    """At each ratio the method keys, and the methods that leave as many pairs."""
    rows = [UNMERGED_ROW]
    for keys, tokens in EQUAL_PAIRS.items():
        others = [] if tokens is None else [(name, tokens) for name in _QUERY_MERGING]
        others += [(UNWEIGHTED, keys)] if others else []
        others += [(TODO, keys)] if keys in TODO_FACTORS else []
        rows += against_first(at_ratio(KEYS, keys), *(at_ratio(*other) for other in others))
    return rows


def _draw() -> list[Row]:
    rows = [UNMERGED_ROW]
    draws: dict[str, dict[str, Any]] = {
        "kept": {"redraw": False},
        "new in each step": {"redraw": True},
        "corner": {"partition": "corner"},
    }
    for method, ratio in ((KEYS, 0.75), (KEYS, 0.84), (TOKENS, 0.5)):
        variants = {name: base_variant(method, ratio=ratio, **own) for name, own in draws.items()}
        rows += against_first(
            *(Row(f"{method} {ratio:g}, {name}", one) for name, one in variants.items())
        )
    return rows


def _schedules() -> list[Row]:
    """Schedules of about one mean ratio, by method; the first is constant."""
    ways: dict[str, list[tuple[str, float, float]]] = {
        KEYS: [
            ("constant", 0.84, 0),
            ("linear", 0.9375, 0.75),
            ("linear", 0.75, 0.9375),
            ("step", 0.9375, 0.75),
        ],
        TOKENS: [("constant", 0.6, 0), ("linear", 0.7, 0.5), ("linear", 0.5, 0.7)],
    }
    rows = [UNMERGED_ROW]
    for method, schedules in ways.items():
        named = []
        for schedule, early, late in schedules:
            name = f"{method}, {schedule} {early:g}" + (f" to {late:g}" if late else "")
            ratios = {"schedule": schedule, "ratio": early, "late_ratio": late}
            settings = shipped_settings(method=method, **ratios)
            named.append(Row(name, Variant.of(settings)))
        rows += against_first(*named)
    return rows


def _cells() -> list[Row]:
    """Smaller and larger cells, at ratios that both allow."""
    rows = [UNMERGED_ROW]
    for method, ratios in ((KEYS, (0.5, 0.6, 0.75, 0.84, 0.9375)), (TOKENS, (0.5, 0.6, 0.75))):
        for ratio in ratios:
            sides = (2, 4) if ratio <= 0.75 else (4, 8)
            variants = [base_variant(method, ratio=ratio, stride=(side, side)) for side in sides]
            names = [f"{method} {ratio:g}, {side}×{side}" for side in sides]
            rows += against_first(*map(Row, names, variants))
    return rows


def _few_steps() -> list[Row]:
    rows = []
    for steps in (4, 8, 20, 50):
        rows.append(Row(UNMERGED, Variant(UNMERGED, steps=steps)))
        kept = []
        for every in (1, 2, 4):
            variant = base_variant(KEYS, ratio=0.84, reuse_steps=every)
            kept.append(Row(f"kept for {every}", dataclasses.replace(variant, steps=steps)))
        rows += against_first(*kept)
    return rows


def _samplers() -> list[Row]:
    """Few steps of three samplers, compared to twenty by their distance to their own twins."""
    rows = []
    for sampler, ratio in itertools.product(SAMPLERS, (0.6, 0.84)):
        own = []
        for steps, full_steps in ((20, 1), (8, 1), (4, 1), (8, 20), (4, 20)):
            name = f"{sampler}, {KEYS} {ratio:g}" + (", more kept" if full_steps > 1 else "")
            variant = base_variant(KEYS, ratio=ratio, full_steps=full_steps)
            own.append(Row(name, dataclasses.replace(variant, steps=steps, sampler=sampler)))
        rows += against_first(*own)
    return rows


def _peers() -> list[Row]:
    every = [(name, ratio) for name, ratios in PEER_RATIOS.items() for ratio in ratios]
    return [UNMERGED_ROW, *(at_ratio(*one) for one in every)]


def _pictures() -> list[Row]:
    """Presets, and `tomesd` where its layer is about as fast as *Quality*'s and *Balanced*'s."""
    presets = [
        Row(name, Variant.of(shipped_settings(**BUILT_IN[name][0])))
        for name in ("Quality", "Balanced", "Fast")
    ]
    return [UNMERGED_ROW, *presets, at_ratio(CORNER, 0.35), at_ratio(CORNER, 0.65)]


_QUERY_MERGING = (TOKENS, PAPER, CORNER, RANDOM)
EQUAL_PAIRS = {0.4375: 0.25, 0.75: 0.5, 0.84: 0.6, 0.9375: None}
"""By ratio of keys: the ratio of `_QUERY_MERGING` that leaves as many pairs; None: not measured."""

PEER_RATIOS: dict[str, tuple[float, ...]] = {
    KEYS: (0.4375, 0.6, 0.75, 0.84, 0.9375),
    CORNER: (0.25, 0.5, 0.6, 0.75),
    QUERIES: (0.25, 0.5, 0.75),
    TODO: tuple(TODO_FACTORS),
    CA_TOME: (0.95, 0.9, 0.7),
    TOMA: (0.25, 0.5, 0.75),
}
"""Ratios by contender, and CA-ToMe's thresholds, of which 0.7 is the published one."""

_PARTITIONS: dict[str, dict[str, Any]] = {
    "alternating": {"partition": "alternating"},
    "corner 2x2": {"partition": "corner"},
    "uniform": {"partition": "uniform"},
    "uniform, own draws": {"partition": "uniform", "shared_draw": False},
    "random 2x2": {},
    "random 2x2, own draws": {"shared_draw": False},
}

TABLES = {
    "what": Table(
        "What: which tokens are merged, at equally many pairs (paper, table 3a)", _what(), "pairs"
    ),
    "draw": Table("Draw: how often destinations are drawn, with a matching in every step", _draw()),
    "schedules": Table("Schedules: early and late ratios by method at one mean", _schedules()),
    "cells": Table("Cells: the size of a cell with one destination", _cells()),
    "steps": Table("Steps: number of steps per matching, keys at 0.84", _few_steps(), "steps"),
    "samplers": Table("Samplers: few steps and many", _samplers(), "steps"),
    "partition": _halved(
        "Partition: choice of destinations (paper, table 2)", "random 2x2", **_PARTITIONS
    ),
    "window": _halved(
        "Window: side of the window, in tokens, that a destination is searched in",
        "whole image",
        **{"whole image": {}, **{str(side): {"window": side} for side in (16, 8, 4)}},
    ),
    "where": _halved(
        "Where: levels that merge (paper, table 3b)",
        "level 1",
        **{
            "level 1": {},
            "levels 1, 2": {"max_downsample": 2},
            "levels 1, 2, 4": {"max_downsample": 4},
        },
    ),
    "peers": Table("Peers: keys and the methods of others", _peers(), "pairs"),
    "pictures": Table("Pictures: presets, and tomesd about as fast as the first two", _pictures()),
}
"""By name, in the order in which they run."""
