"""Axes for WebUI's X/Y/Z plot: one for each setting, the switch and the preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modules import scripts

from ..settings import PANEL_FIELDS, Setting
from . import presets
from .arguments import ENABLED
from .log import log

OVERRIDES = f"{__name__}.overrides"
"""The attribute of `p` in which an axis leaves its value: a mapping as the API takes it. It is named after this module,
so that a second copy of the extension, whose modules have other names, doesn't take it for its own."""


def add_axes() -> None:
    """Appends the axes to the plot's list, unless they are there: Reload UI makes the list anew, but not every time."""
    # By its file: what the module is called differs between WebUI's versions.
    grids = [script.module for script in scripts.scripts_data if Path(script.path).name == "xyz_grid.py"]
    grids = [grid for grid in grids if hasattr(grid, "AxisOption") and hasattr(grid, "axis_options")]
    if not grids:
        log.warning("WebUI's X/Y/Z plot is not among its scripts (xyz_grid.py): it has no ToMe axes")
    for grid in grids:
        present = {option.label for option in grid.axis_options}
        grid.axis_options.extend(axis for axis in _axes(grid.AxisOption) if axis.label not in present)


def _axes(axis_option: Callable[..., Any]) -> list[Any]:
    preset = axis_option(
        "[ToMe] Preset",
        str,
        lambda p, x, xs: _override(p, "preset", x),
        confirm=_refuse(presets.get),
        choices=lambda: list(presets.read()[0]),
    )
    axes = [_axis(axis_option, name, setting) for name, setting in PANEL_FIELDS.items()]
    return [_axis(axis_option, "enabled", ENABLED, "Enabled"), preset, *axes]


def _axis(axis_option: Callable[..., Any], name: str, setting: Setting, label: str | None = None) -> Any:
    choices = ("True", "False") if setting.kind == "flag" else setting.choices
    is_text = bool(choices) and isinstance(choices[0], str)

    def value_of(x: Any) -> Any:
        return {"true": True, "false": False}.get(x.lower(), x) if setting.kind == "flag" else x

    return axis_option(
        f"[ToMe] {label or setting.label}",
        str if is_text else float if setting.kind == "number" else int,
        lambda p, x, xs: _override(p, name, value_of(x)),
        confirm=_refuse(lambda x: setting.check(name, value_of(x))),
        choices=(lambda: [str(choice) for choice in choices]) if choices else None,
    )


def _refuse(check: Callable[[Any], Any]) -> Callable[[Any, Sequence[Any]], None]:
    """A plot's `confirm`: wrong values are refused before the first picture is made."""

    def confirm(p: Any, xs: Sequence[Any]) -> None:
        for x in xs:
            check(x)

    return confirm


def _override(p: Any, name: str, value: Any) -> None:
    # A new mapping each time: a cell's p is a shallow copy.
    setattr(p, OVERRIDES, {**getattr(p, OVERRIDES, {}), name: value})
