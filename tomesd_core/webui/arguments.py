"""From what a page, the API or a plot sends to settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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

PresetReader = Callable[[str], MergeSettings]


def read_arguments(
    args: Sequence[Any], overrides: Mapping[str, Any] | None = None, preset: PresetReader | None = None
) -> MergeSettings | None:
    """The settings of a generation, or None where merging is off.

    `args` are positional, `enabled`, `PANEL_FIELDS` and `MAP_FIELDS`, or one mapping of any of them and `preset`.
    Missing ones get their defaults, with a preset the preset's. While `enabled` is false the others don't matter.
    `overrides` is a mapping too, and wins over the arguments. A mapping switches merging on unless it says `enabled`
    itself.

    Raises `SettingsError` for a value that its field can't have, an unknown name and an unknown preset.
    """
    first = args[0] if args else ENABLED.default
    if isinstance(first, Mapping):
        enabled, values = _merged({}, first, preset)
    else:
        enabled, values = ENABLED.check("enabled", first), dict(zip(PANEL_FIELDS, args[1:], strict=False))
    if overrides:
        enabled, values = _merged(values, overrides, preset)
    return MergeSettings(**values) if enabled else None


def read_map(args: Sequence[Any]) -> tuple[int, int] | None:
    """The step and the layer of the merge map that arguments of `read_arguments` ask for, both from 1; None for none.

    Raises `SettingsError` for a value that its field can't have.
    """
    given = args[0] if args else {}
    if not isinstance(given, Mapping):
        given = dict(zip(MAP_FIELDS, args[1 + len(PANEL_FIELDS) :], strict=False))
    step, layer = (field.check(name, given.get(name, field.default)) for name, field in MAP_FIELDS.items())
    return (step, layer) if step else None


def _merged(
    values: dict[str, Any], named: Mapping[str, Any], preset: PresetReader | None
) -> tuple[bool, dict[str, Any]]:
    """Whether merging is on, and `values` with those of `named` in their place."""
    known = ("enabled", "preset", *PANEL_FIELDS, *MAP_FIELDS)
    unknown = [repr(name) for name in named if name not in known]
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}: the settings are {', '.join(known)}")
    enabled = ENABLED.check("enabled", named.get("enabled", True))
    if "preset" in named and preset is not None:
        values = panel_values(preset(named["preset"]))
    values = values | {name: value for name, value in named.items() if name in PANEL_FIELDS}
    # Who gives a late ratio wants it reached.
    if "late_ratio" in named and "schedule" not in named and values.get("schedule", "constant") == "constant":
        values["schedule"] = "linear"
    return enabled, values


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


def shown_fields(schedule: str) -> set[str]:
    """The panel's fields that a person needs to see with this schedule."""
    settings = MergeSettings(schedule=schedule, min_tokens=1)
    return set(PANEL_FIELDS) - unused_fields(settings, has_hires_pass=True)
