"""Named settings: the built-in presets, and the user's in a JSON file.

The file is `{"version": 1, "presets": {name: {field: value}}}`. Users edit it by hand, copy it
between machines and return to older versions of the extension, so unknown content is kept. Each
call reads the file again, so that tabs and processes see each other's presets. The built-in presets
work whatever is wrong with the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from ..settings import BEFORE_NAMED, PANEL_FIELDS, MergeSettings, SettingsError
from .log import log

PATH = Path(__file__).resolve().parents[2] / "presets.json"
"""In the extension's folder, ignored by git, so that an update keeps it."""
VERSION, MAX_NAME = 1, 100

_lock = threading.Lock()
"""Held while the file is changed."""

BUILT_IN: dict[str, tuple[dict[str, Any], str]] = {
    "Quality": ({"ratio": 0.55}, "Closest to the unmerged picture; a little faster."),
    "Balanced": ({}, "Faster, with small changes in detail; a good start."),
    "Fast": (
        {"ratio": 0.9375, "max_downsample": 2, "full_steps": 1},
        "For drafts: larger changes in detail. Merges coarser layers too.",
    ),
    "Hires only": (
        {"apply_to": "hires pass"},
        "Speeds up the second pass of hires fix, where most of the time goes.",
    ),
    "Paper (60 %)": (
        {"ratio": 0.6, "method": "paper", "full_steps": 1},
        "The paper's method and ratio; changes pictures the most.",
    ),
}
"""The read-only presets by name: their differences from the defaults, and a description."""


class _DamagedError(SettingsError):
    """The file holds no presets, not even a newer version's."""


def read() -> tuple[dict[str, MergeSettings], list[str]]:
    """Every usable preset, built-in ones first, and messages about the file for the user."""
    presets = {name: MergeSettings(**fields) for name, (fields, _) in BUILT_IN.items()}
    try:
        own = _load()["presets"]
    except SettingsError as error:
        return presets, [str(error)]
    messages = []
    for name, entry in own.items():
        try:
            clean_name(name)
            presets[name] = _settings(entry)
        except SettingsError as error:
            messages.append(f"preset {brief(name)} can't be used: {error}")
    return presets, messages


def get(name: Any) -> MergeSettings:
    """The preset's settings, built-in names in any case. Raises `SettingsError` if unknown."""
    presets, messages = read()
    key = _built_in(name) or str(name)
    if key not in presets:
        raise SettingsError(
            "; ".join([f"preset must be one of {', '.join(presets)}, got {name!r}", *messages])
        )
    return presets[key]


def named(settings: MergeSettings) -> str | None:
    """The first preset with these settings, or None."""
    values = settings.panel_values
    return next((name for name, own in read()[0].items() if own.panel_values == values), None)


def save(name: Any, settings: MergeSettings) -> Any:
    """Save the panel's fields of `settings`; return the stored name. Overwrites a user's preset."""
    name, fields = clean_name(name), settings.panel_values
    with _changing() as own:
        own[name] = {**(own[name] if isinstance(own.get(name), dict) else {}), **fields}
    return name


def delete(name: str) -> None:
    """Delete one of the user's presets, usable or not."""
    with _changing() as own:
        if name not in own and (built_in := _built_in(name)):
            raise SettingsError(f"{built_in!r} is a built-in preset, which can't be deleted")
        if name not in own:
            raise SettingsError(f"there is no preset {name!r} of yours")
        del own[name]


def clean_name(name: Any) -> Any:
    """The name as stored: stripped, Unicode NFC. Raises `SettingsError` if unusable or built in."""
    if built_in := _built_in(name):
        raise SettingsError(
            f"{built_in!r} is a built-in preset, which can't be changed: choose another name"
        )
    name = unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""
    kinds = set(map(unicodedata.category, name))
    # A name of the first two kinds alone can't be seen; the others are control characters and line
    # breaks.
    if kinds <= {"Cf", "Zs"} or kinds & {"Cc", "Cs", "Zl", "Zp"} or len(name) > MAX_NAME:
        raise SettingsError(
            f"a preset's name must have 1 to {MAX_NAME} characters in one line, got {brief(name)}"
        )
    return name


def _built_in(name: Any) -> str | None:
    """The built-in preset with this name in any case and spacing, or None."""
    words = str(name).casefold().split()
    return next((key for key in BUILT_IN if key.casefold().split() == words), None)


def _settings(entry: Any) -> MergeSettings:
    """A preset's settings, with defaults for missing fields."""
    if not isinstance(entry, dict):
        raise SettingsError(f"a preset must be an object of settings, got {brief(entry)}")
    fields = {name: entry[name] for name in PANEL_FIELDS if name in entry}
    return MergeSettings(**{**BEFORE_NAMED, **fields} if "ratio" in fields else fields)


def _load() -> dict[str, Any]:
    """The file's content; no presets if there is no file."""
    try:
        document = json.loads(PATH.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        return {"version": VERSION, "presets": {}}
    except OSError as error:
        raise SettingsError(f"{PATH} can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"{PATH} is damaged: it is not JSON in UTF-8 ({error})") from error
    version = document.get("version") if isinstance(document, dict) else None
    if isinstance(version, (int, float)) and version > VERSION:
        raise SettingsError(
            f"{PATH} is from a newer version of the extension and stays as is: update it"
        )
    if version != VERSION or version is True or not isinstance(document.get("presets"), dict):
        raise _DamagedError(
            f'{PATH} is damaged: it must be {{"version": {VERSION}, "presets": {{…}}}}'
        )
    return dict(document)


def _load_or_set_aside(path: Path) -> dict[str, Any]:
    """The file's content; a damaged file is renamed and kept."""
    try:
        return _load()
    except _DamagedError as error:
        names = (f"{path.stem}.damaged-{number}{path.suffix}" for number in count(1))
        aside = next(aside for aside in map(path.with_name, names) if not aside.exists())
        os.replace(path, aside)
        log.warning(f"{error}. It is kept as {aside}")
        return _load()


@contextlib.contextmanager
def _changing() -> Iterator[dict[str, Any]]:
    """The user's presets, to be changed in place; the file is replaced if no error occurs."""
    # A symlink stays one: replacing it would cut it off from its file.
    path = PATH.resolve()
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with _lock:
            document = _load_or_set_aside(path)
            yield document["presets"]
            # Linux would replace a read-only file.
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError("it is read-only")
            # In ASCII: JSON can hold half a surrogate pair, which UTF-8 can't.
            with open(new, "w") as file:
                json.dump(document, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    except (OSError, RecursionError) as error:
        raise SettingsError(f"{PATH} can't be written: {error}") from error
