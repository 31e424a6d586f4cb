"""From what a page, the API or a plot sends to settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..settings import PANEL_FIELDS, MergeSettings, Setting, SettingsError, late_ratio_beside

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
"""What is shown of a generation, not what is made: in no preset, no picture's parameters and no
plot."""

NEWER_FIELDS = ("full_steps",)
"""Of `PANEL_FIELDS`, those that came after the map's: each version appends its arguments."""

CONTROLS: dict[str, Setting] = {
    "enabled": ENABLED,
    **{name: setting for name, setting in PANEL_FIELDS.items() if name not in NEWER_FIELDS},
    **MAP_FIELDS,
    **{name: PANEL_FIELDS[name] for name in NEWER_FIELDS},
}
"""The script's arguments by name, in order."""

BEFORE_NAMED = {"method": "paper", "full_steps": 1}
"""The values of parameters, presets and lists from versions that had no such field."""


class Asked(NamedTuple):
    """What a generation is asked to do."""

    enabled: bool
    settings: MergeSettings
    """The defaults where merging is off."""
    map_place: tuple[int, int] | None = None
    """Step and layer of the merge map, both from 1; None for none."""


def read_arguments(
    args: Sequence[Any], overrides: Mapping[str, Any] | None, preset: Callable[[str], MergeSettings]
) -> Asked:
    """What arguments ask a generation to do.

    `args` are positional, in the order of `CONTROLS`, or one mapping of any of them and `preset`, a
    name that the function of this name knows. Missing ones, and None, get their defaults, with a
    preset the preset's. While `enabled` is false the others don't matter. `overrides` is a mapping
    too, and wins over the arguments. A mapping switches merging on unless it says `enabled` itself.

    Raises `SettingsError` for a value that its field can't have, an unknown name and an unknown
    preset.
    """
    values = (
        _changed({}, args[0], preset) if args and isinstance(args[0], Mapping) else _by_name(args)
    )
    if overrides is not None:
        values = _changed(values, overrides, preset)
    if not ENABLED.check("enabled", values.get("enabled", ENABLED.default)):
        return Asked(False, MergeSettings())
    settings = MergeSettings(
        **{name: value for name, value in values.items() if name in PANEL_FIELDS}
    )
    step, layer = (
        field.check(name, values.get(name, field.default)) for name, field in MAP_FIELDS.items()
    )
    return Asked(True, settings, (step, layer) if step else None)


def _by_name(args: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by name, without those that weren't given.

    A list of version 0.1.0 has no method, which was `paper`: it ends with `reuse_steps`, or with
    the map's two numbers. One of version 1.0.0 names the method, and has no `full_steps`.
    """
    place, args = list(CONTROLS).index("method"), list(args)
    method = args[place] if place < len(args) else None
    if isinstance(method, (int, float)) and not isinstance(method, bool):
        args.insert(place, BEFORE_NAMED["method"])
    elif method is None and len(args) >= place and args[place - 1] is not None:
        args[place : place + 1] = [BEFORE_NAMED["method"]]
    values = {name: value for name, value in zip(CONTROLS, args, strict=False) if value is not None}
    return {**BEFORE_NAMED, **values} if "method" in values else values


def _changed(
    values: Mapping[str, Any], named: Mapping[str, Any], preset: Callable[[str], MergeSettings]
) -> dict[str, Any]:
    """`values` with those of `named` in their place."""
    names = ("preset", *CONTROLS)
    unknown = [repr(name) for name in named if name not in names]
    if unknown:
        raise SettingsError(
            f"unknown setting {', '.join(unknown)}: the settings are {', '.join(names)}"
        )
    named = {name: value for name, value in named.items() if value is not None}
    of_preset = panel_values(preset(named["preset"])) if "preset" in named else {}
    panel = {**values, **of_preset, "enabled": True, **named}
    # Who gives a late ratio wants it reached.
    schedule = panel.get("schedule", PANEL_FIELDS["schedule"].default)
    if "late_ratio" in named and "schedule" not in named and schedule == "constant":
        panel["schedule"] = "linear"
    if "ratio" in named and "late_ratio" not in named and "late_ratio" in panel:
        panel["late_ratio"] = late_ratio_beside(named["ratio"], panel["late_ratio"])
    return panel


def from_text(setting: Setting, text: Any) -> Any:
    """A field's value from its text, or `text` itself where that is none of the field's; nothing is
    checked."""
    if setting.kind == "flag":
        return {"true": True, "false": False}.get(str(text).lower(), text)
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            return type_of_text(setting)(text)
    return text


def type_of_text(setting: Setting) -> type:
    """What reads a text as the field's value. A flag stays text."""
    types = {"number": float, "integer": int, "flag": str}
    return types.get(setting.kind) or type(setting.choices[0])


def shown(name: str, value: Any) -> Any:
    """A control's value as the page has it: choices are texts, since WebUI takes numbers for places
    in a list."""
    return str(value) if CONTROLS[name].kind == "choice" else value


def panel_values(settings: MergeSettings) -> dict[str, Any]:
    """The panel's fields of settings, by name."""
    return {name: getattr(settings, name) for name in PANEL_FIELDS}


def useful_fields(
    schedule: str, min_tokens: int = 1, has_hires_pass: bool = True, full_steps: int = 2
) -> set[str]:
    """The controls that have an effect; by default those that a person needs to see with this
    schedule."""
    useless = {
        "late_ratio": schedule == "constant",
        "switch_at": schedule != "step",
        "min_tokens": not min_tokens,
        "apply_to": not has_hires_pass,
        "full_steps": full_steps == 1,
    }
    return {name for name in CONTROLS if not useless.get(name)}
