"""The user's presets: in the extension's folder, in a file that git ignores, so that an update keeps it."""

from __future__ import annotations

from pathlib import Path

from ..presets import PresetError, PresetFile
from ..settings import MergeSettings, SettingsError

EXTENSION = Path(__file__).resolve().parents[2]

presets = PresetFile(EXTENSION / "presets.json")


def preset_settings(name: str) -> MergeSettings:
    """A preset's settings. Raises `SettingsError` where there is no such preset, or it can't be used."""
    try:
        return presets.get(name)
    except PresetError as error:
        raise SettingsError(f"preset must be one of {', '.join(presets.names())}, got {name!r}: {error}") from error
