"""From what a page, the API or a plot sends to settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..settings import PANEL_FIELDS, MergeSettings, Setting, SettingsError

ENABLED = Setting(False, "flag", "ToMe", "Merge tokens in this generation.")

MAP_FIELDS = {
    "map_step": Setting(
        0,
        "integer",
        "Merge map: step",
        "Adds a picture that shows which tokens fell together in this step, counted from 1. 0: none.",
        minimum=0,
        maximum=150,
        step=1,
    ),
    "map_layer": Setting(
        1,
        "integer",
        "Merge map: layer",
        "Which of the layers that merged in that step the merge map shows, counted from 1.",
        minimum=1,
        maximum=70,
        step=1,
    ),
}
"""What is shown of a generation, not what is made: in no preset, no picture's parameters and no plot."""

CONTROLS = ("enabled", *PANEL_FIELDS, *MAP_FIELDS)
"""The script's arguments by name, in order."""


class Asked(NamedTuple):
    """What a generation is asked to do."""

    settings: MergeSettings
    map_place: tuple[int, int] | None
    """Step and layer of the merge map, both from 1; None for none."""


def read_arguments(
    args: Sequence[Any], overrides: Mapping[str, Any] | None, preset: Callable[[str], MergeSettings]
) -> Asked | None:
    """What arguments ask a generation to do, or None where merging is off.

    `args` are positional, in the order of `CONTROLS`, or one mapping of any of them and `preset`, a name that the
    function of this name knows. Missing ones get their defaults, with a preset the preset's. While `enabled` is false
    the others don't matter. `overrides` is a mapping too, and wins over the arguments. A mapping switches merging on
    unless it says `enabled` itself.

    Raises `SettingsError` for a value that its field can't have, an unknown name and an unknown preset.
    """
    named = args[0] if args and isinstance(args[0], Mapping) else None
    values: dict[str, Any] = dict(zip(CONTROLS, args, strict=False)) if named is None else {}
    for mapping in (named, overrides):
        if mapping is not None:
            values = _merged(values, mapping, preset)
    if not ENABLED.check("enabled", values.get("enabled", ENABLED.default)):
        return None
    settings = MergeSettings(**{name: values[name] for name in PANEL_FIELDS if name in values})
    step, layer = (field.check(name, values.get(name, field.default)) for name, field in MAP_FIELDS.items())
    return Asked(settings, (step, layer) if step else None)


def _merged(
    values: Mapping[str, Any], named: Mapping[str, Any], preset: Callable[[str], MergeSettings]
) -> dict[str, Any]:
    """`values` with those of `named` in their place."""
    known = ("preset", *CONTROLS)
    unknown = [repr(name) for name in named if name not in known]
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}: the settings are {', '.join(known)}")
    chosen = panel_values(preset(named["preset"])) if "preset" in named else {}
    merged = {**values, **chosen, "enabled": True, **named}
    # Who gives a late ratio wants it reached.
    if "late_ratio" in named and "schedule" not in named and merged.get("schedule", "constant") == "constant":
        merged["schedule"] = "linear"
    return merged


def panel_values(settings: MergeSettings) -> dict[str, Any]:
    """The panel's fields of settings, by name."""
    return {name: getattr(settings, name) for name in PANEL_FIELDS}


def unused_fields(settings: MergeSettings, has_hires_pass: bool) -> set[str]:
    """The panel's fields that have no effect on a generation with these settings, by name."""
    unused = {
        "late_ratio": settings.schedule == "constant",
        "switch_at": settings.schedule != "step",
        "min_tokens": not settings.min_tokens,
        "apply_to": not has_hires_pass,
    }
    return {name for name, has_none in unused.items() if has_none}


def useful_fields(schedule: str) -> set[str]:
    """The panel's fields that a person needs to see with this schedule."""
    settings = MergeSettings(schedule=schedule, min_tokens=1)
    return set(PANEL_FIELDS) - unused_fields(settings, has_hires_pass=True)
