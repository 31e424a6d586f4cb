"""Axes for WebUI's X/Y/Z plot: one for each setting, the switch and the preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..settings import PANEL_FIELDS, Setting
from . import host, presets
from .arguments import ENABLED, from_text, type_of_text
from .log import log

OVERRIDES = f"{__name__}.overrides"
"""The attribute of `p` for the axes' values, named after this copy's module."""


def add_axes() -> None:
    """Append the axes to the plot's list if missing: Reload UI doesn't always reset the list."""
    grids = host.plot_modules()
    if not grids:
        log.warning(f"WebUI has no X/Y/Z plot ({host.PLOT}), so there are no ToMe axes")
    for grid in grids:
        present = {option.label for option in grid.axis_options}
        grid.axis_options.extend(
            axis for axis in _axes(grid.AxisOption) if axis.label not in present
        )


def _axes(axis_option: Callable[..., Any]) -> list[Any]:
    preset = axis_option(
        "[ToMe] Preset",
        str,
        partial(_override, "preset", str),
        confirm=partial(_refuse, presets.get),
        choices=lambda: list(presets.read()[0]),
    )
    axes = [
        _axis(axis_option, name, setting, setting.label) for name, setting in PANEL_FIELDS.items()
    ]
    return [_axis(axis_option, "enabled", ENABLED, "Enabled"), preset, *axes]


def _axis(axis_option: Callable[..., Any], name: str, setting: Setting, label: str) -> Any:
    value_of = partial(from_text, setting)
    choices = ("True", "False") if setting.kind == "flag" else setting.choices
    return axis_option(
        f"[ToMe] {label}",
        type_of_text(setting),
        partial(_override, name, value_of),
        confirm=partial(_refuse, lambda x: setting.check(name, value_of(x))),
        choices=(lambda: [str(choice) for choice in choices]) if choices else None,
    )


def _refuse(check: Callable[[Any], Any], p: Any, xs: Sequence[Any]) -> None:
    """Check the values before the first picture is made."""
    for x in xs:
        check(x)


def _override(name: str, value_of: Callable[[Any], Any], p: Any, x: Any, xs: Sequence[Any]) -> None:
    # A new mapping each time, since a cell's p is a shallow copy.
    setattr(p, OVERRIDES, {**getattr(p, OVERRIDES, {}), name: value_of(x)})
