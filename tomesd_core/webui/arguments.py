"""From the script's arguments, as a page or the API sends them, to settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..settings import FIELDS, MergeSettings, Setting, SettingsError

ENABLED = Setting(False, "flag", "ToMe", "Merge tokens in this generation.")

PANEL_FIELDS: dict[str, Setting] = {name: setting for name, setting in FIELDS.items() if setting.infotext}
"""The fields that a generation has, by name, in the order of the script's arguments after `enabled`."""


def read_arguments(args: Sequence[Any]) -> MergeSettings | None:
    """The settings of a generation, or None where merging is off.

    `args` are positional: `enabled`, then `PANEL_FIELDS`; missing ones get their defaults. While `enabled` is false the
    others don't matter. Raises `SettingsError` for a value that its field can't have.
    """
    if not ENABLED.check("enabled", args[0] if args else ENABLED.default):
        return None
    return MergeSettings(**dict(zip(PANEL_FIELDS, args[1:], strict=False)))


def effective_fields(settings: MergeSettings, has_hires_pass: bool) -> dict[str, Any]:
    """The panel's fields that have an effect on this generation, by name."""
    unused = set()
    if settings.schedule == "constant":
        unused |= {"late_ratio", "switch_at"}
    elif settings.schedule == "linear":
        unused.add("switch_at")
    if not settings.min_tokens:
        unused.add("min_tokens")
    if settings.reuse_steps == 1:
        unused.add("reuse_steps")
    if not has_hires_pass:
        unused.add("apply_to")
    return {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name in PANEL_FIELDS and name not in unused
    }


__all__ = ["ENABLED", "PANEL_FIELDS", "SettingsError", "effective_fields", "read_arguments"]
