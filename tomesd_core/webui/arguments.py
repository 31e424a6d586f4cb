"""From the arguments of a page, the API or a plot to settings, and from parameters to the panel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..fields import refuse_unknown
from ..settings import (
    BEFORE_NAMED,
    PANEL_FIELDS,
    MergeSettings,
    Setting,
    SettingsError,
    late_ratio_for,
)
from . import presets
from .log import log

ENABLED = Setting(False, "flag", "ToMe", "Merge tokens in this generation.")

MAP_FIELDS = {
    "map_step": Setting(
        0,
        "integer",
        "Merge map: step",
        "Add a picture of the tokens merged in this step, counted from 1. 0: none.",
        *(0, 150, 1),
    ),
    "map_layer": Setting(
        1,
        "integer",
        "Merge map: layer",
        "Layer of the merge map, counted from 1 among those that merged in that step.",
        *(1, 70, 1),
    ),
}
"""Arguments that affect no picture, so they are in no preset, parameters or plot."""

NEWER_FIELDS = ("full_steps",)
"""The `PANEL_FIELDS` that came after the map's: each version appends its arguments."""

CONTROLS: dict[str, Setting] = {
    "enabled": ENABLED,
    **{name: setting for name, setting in PANEL_FIELDS.items() if name not in NEWER_FIELDS},
    **MAP_FIELDS,
    **{name: PANEL_FIELDS[name] for name in NEWER_FIELDS},
}
"""The script's arguments by name, in order."""


class Asked(NamedTuple):
    """The request of a generation."""

    enabled: bool
    settings: MergeSettings
    """The defaults if merging is off."""
    map_place: tuple[int, int] | None = None
    """Step and layer of the merge map, both from 1; None for no map."""


def read_arguments(args: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> Asked:
    """Read the arguments of a generation.

    `args` are positional, in the order of `CONTROLS`, or one mapping of any of them and `preset`, a
    preset's name. Missing arguments and None get the preset's values, or the defaults. `overrides`
    is a mapping too and takes precedence. A mapping enables merging unless it has `enabled`; if
    merging is off, the other arguments don't matter.

    Raises `SettingsError` for an invalid value, an unknown name and an unknown preset.
    """
    is_mapping = bool(args) and isinstance(args[0], Mapping)
    values = _changed({}, args[0]) if is_mapping else _by_name(args)
    if overrides is not None:
        values = _changed(values, overrides)
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
    """Positional arguments by name, without None.

    A list of version 0.1.0 ends with `reuse_steps` or the map's two numbers and has no method,
    which was `paper`. One of version 1.0.0 has the method, but not `full_steps`.
    """
    place, args = list(CONTROLS).index("method"), list(args)
    method = args[place] if place < len(args) else None
    if isinstance(method, (int, float)) and not isinstance(method, bool):
        args.insert(place, BEFORE_NAMED["method"])
    elif method is None and len(args) >= place and args[place - 1] is not None:
        args[place : place + 1] = [BEFORE_NAMED["method"]]
    values = {name: value for name, value in zip(CONTROLS, args, strict=False) if value is not None}
    return {**BEFORE_NAMED, **values} if "method" in values else values


def _changed(values: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, replaced by those of `named`."""
    refuse_unknown(named, ("preset", *CONTROLS), "setting")
    named = {name: value for name, value in named.items() if value is not None}
    of_preset = presets.get(named["preset"]).panel_values if "preset" in named else {}
    panel = {**values, **of_preset, "enabled": True, **named}
    # A late ratio given alone is meant to be reached.
    schedule = panel.get("schedule", PANEL_FIELDS["schedule"].default)
    if "late_ratio" in named and "schedule" not in named and schedule == "constant":
        panel["schedule"] = "linear"
    if "ratio" in named and "late_ratio" not in named and "late_ratio" in panel:
        panel["late_ratio"] = late_ratio_for(named["ratio"], panel["late_ratio"])
    return panel


def from_text(setting: Setting, text: Any) -> Any:
    """A field's value from text, unchecked; `text` itself if it isn't a value of the field."""
    if setting.kind == "flag":
        return {"true": True, "false": False}.get(str(text).lower(), text)
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            return type_of_text(setting)(text)
    return text


def type_of_text(setting: Setting) -> type:
    """The type that parses the field's text. A flag stays text."""
    types = {"number": float, "integer": int, "flag": str}
    return types.get(setting.kind) or type(setting.choices[0])


def shown(name: str, value: Any) -> Any:
    """A control's value on the page. Choices are texts: WebUI takes numbers for indices."""
    return str(value) if CONTROLS[name].kind == "choice" else value


def useful_fields(
    schedule: str, min_tokens: int = 1, has_hires_pass: bool = True, full_steps: int = 2
) -> set[str]:
    """The controls that have an effect; by default those to show for this schedule."""
    useless = {
        "late_ratio": schedule == "constant",
        "switch_at": schedule != "step",
        "min_tokens": not min_tokens,
        "apply_to": not has_hires_pass,
        "full_steps": full_steps == 1,
    }
    return {name for name in CONTROLS if not useless.get(name)}


def paste_fields(
    controls: Mapping[str, Any],
) -> list[tuple[Any, Callable[[Mapping[str, Any]], Any]]]:
    """Pairs of a control and a function of the parsed parameters, for `Script.infotext_fields`.

    Functions, because a missing key must reset its field, and because WebUI's own conversion
    follows the component's type and its errors aren't caught.
    """
    readers: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "enabled": lambda parameters: "ToMe ratio" in parameters
    }
    readers |= {name: partial(_read, name, setting) for name, setting in PANEL_FIELDS.items()}
    return [(controls[name], reader) for name, reader in readers.items() if name in controls]


def _read(name: str, setting: Setting, parameters: Mapping[str, Any]) -> Any:
    key = str(setting.infotext)
    missing = (
        BEFORE_NAMED.get(name, setting.default) if "ToMe ratio" in parameters else setting.default
    )
    try:
        return shown(name, setting.check(name, from_text(setting, parameters.get(key, missing))))
    except SettingsError as error:
        log.warning(f"{key} in the picture's parameters is ignored: {error}")
        return shown(name, setting.default)
