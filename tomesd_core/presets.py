"""Named settings: the built-in ones, and a user's own in a JSON file.

The file is `{"version": 1, "presets": {name: {field: value}}}`. People edit it by hand, copy it between machines and go
back to older versions of the extension, so what isn't understood in it is kept as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .settings import PANEL_FIELDS, MergeSettings, SettingsError

VERSION = 1
MAX_NAME, MAX_DEPTH = 100, 50
MAX_IMPORT_BYTES, MAX_IMPORT_PRESETS = 1_000_000, 200
LOCK_SECONDS, BUSY_SECONDS = 10.0, 1.0

BUILT_IN: dict[str, tuple[dict[str, Any], str]] = {
    "Quality": ({"ratio": 0.75, "late_ratio": 0.6}, "Stays closest to the picture without merging; a little faster."),
    "Balanced": ({}, "Clearly faster, with small changes in detail; a good start."),
    "Fast": (
        {"ratio": 0.9375, "late_ratio": 0.85, "max_downsample": 2},
        "For drafts: merges nearly as much as can be, and in coarser layers too.",
    ),
    "Hires only": (
        {"apply_to": "hires pass"},
        "Speeds up the second pass of hires fix, where most of the time goes; the first stays as it is.",
    ),
    "Paper (60 %)": (
        {"ratio": 0.6, "schedule": "constant", "method": "paper"},
        "The paper's highest ratio, constant, at full resolution only: queries merged too, and nothing weighed.",
    ),
}
"""The read-only presets by name: what differs from the defaults, and what each is for."""

_THREADS = threading.Lock()


class PresetError(ValueError):
    """A preset, its name or the file can't be used. The message is for the user."""


class _DamagedError(PresetError):
    """What was read isn't a presets file, not even a newer one."""


class Imported(NamedTuple):
    """`added`: the new presets' names here. `skipped`: for each other one a line with its name and the reason."""

    added: list[str]
    skipped: list[str]


class PresetFile:
    """The built-in presets, and the user's own in the file at `path`.

    Each call reads the file anew, so every tab and process sees what the others saved. Whatever is wrong with the file,
    the built-in presets work, and `messages` says what is wrong. All that is raised is `PresetError`: a name that can't
    be used or isn't there, a value out of its range, a file that can't be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # A symlink stays one: replacing it would cut it off from the file that it stands for.
        self.path = Path(os.path.realpath(path))
        self._kept_aside: list[str] = []

    @property
    def messages(self) -> list[str]:
        """What the user must be told: what is wrong with the file or with presets in it, what was kept aside."""
        _, unusable, problem = self._read()
        entries = [f"preset {_clip(name)} can't be used: {reason}" for name, reason in unusable.items()]
        return [*self._kept_aside, *([problem] if problem else []), *entries]

    def names(self) -> list[str]:
        """Every preset that can be used: the built-in ones, then the user's own in the file's order."""
        return [*BUILT_IN, *self._read()[0]["presets"]]

    def get(self, name: str) -> MergeSettings:
        """The preset's settings. A built-in one is found in any case."""
        return _settings(self._entry(name))

    def describe(self, name: str) -> str:
        """One line on what the preset is for or, for one of the user's own, what it sets."""
        fields = _fields(self.get(name))
        if built_in := _built_in(name):
            return BUILT_IN[built_in][1]
        own = [
            f"{PANEL_FIELDS[key].label.lower()} {value}"
            for key, value in fields.items()
            if value != PANEL_FIELDS[key].default
        ]
        return f"Your own: {', '.join(own) or 'the default settings'}."

    def save(self, name: str, settings: MergeSettings) -> str:
        """Saves the panel's fields of `settings`, also over a preset of the user's. Returns the name as stored."""
        name, fields = _own_name(name), _fields(settings)
        _settings(fields)  # A ratio may be right only together with an expert field, such as a larger stride.
        with self._changing() as document:
            before = document["presets"].get(name)
            document["presets"][name] = {**(before if isinstance(before, dict) else {}), **fields}
        return name

    def rename(self, name: str, new_name: str) -> str:
        """Gives one of the user's presets a name that is free. Returns the name as stored."""
        new_name = _own_name(new_name)
        with self._changing() as document:
            old, presets = _find(document, name), document["presets"]
            if new_name in presets and new_name != old:
                raise PresetError(f"there is already a preset {new_name!r}")
            document["presets"] = {new_name if key == old else key: entry for key, entry in presets.items()}
        return new_name

    def delete(self, name: str) -> None:
        """Deletes one of the user's presets, also one that can't be used."""
        with self._changing() as document:
            del document["presets"][_find(document, name)]

    def export(self, names: Iterable[str] | None = None) -> str:
        """JSON text with these presets, built-in ones too; without names, with all of the user's that can be used."""
        document, _, problem = self._read()
        if names is None and problem:
            raise PresetError(problem)
        if names is not None:
            document["presets"] = {_built_in(name) or name: self._entry(name) for name in map(clean_name, names)}
        return _to_json(document)

    def import_(self, text: str | bytes) -> Imported:
        """Adds an exported text's presets. None is overwritten: one that differs from its namesake gets a new name."""
        raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        if len(raw) > MAX_IMPORT_BYTES:
            raise PresetError(f"an import can have up to {MAX_IMPORT_BYTES} bytes, got {len(raw)}")
        incoming = _parse(raw, "the import")
        if len(incoming["presets"]) > MAX_IMPORT_PRESETS:
            raise PresetError(f"an import can have up to {MAX_IMPORT_PRESETS} presets, got {len(incoming['presets'])}")
        result = Imported([], [])
        with self._changing() as document:
            for name, entry in incoming["presets"].items():
                try:
                    new_name = _free_name(document["presets"], clean_name(name), entry)
                    document["presets"][new_name] = entry
                    result.added.append(new_name)
                except PresetError as error:
                    result.skipped.append(f"{_clip(name)}: {error}")
            document.update({key: value for key, value in incoming.items() if key not in document})
        return result

    def _entry(self, name: str) -> dict[str, Any]:
        name = clean_name(name)
        if built_in := _built_in(name):
            return _fields(_settings(BUILT_IN[built_in][0]))
        document, unusable, problem = self._read()
        if name not in document["presets"]:
            reason = unusable.get(name) or problem or "the file has none of that name"
            raise PresetError(f"preset {name!r} can't be used: {reason}")
        return document["presets"][name]

    def _read(self) -> tuple[dict[str, Any], dict[str, str], str]:
        """The file's content without the presets that can't be used, their reasons by name, and the file's problem."""
        try:
            document, damage = self._load()
            problem = f"{damage}. The next save keeps it under another name" if damage else ""
        except PresetError as error:
            document, problem = _empty(), str(error)
        unusable = {}
        for name, entry in document["presets"].items():
            try:
                if (written := _own_name(name)) != name:
                    raise PresetError(f"write the name as {written!r}, in Unicode NFC and without spaces around it")
                _settings(entry)
            except PresetError as error:
                unusable[name] = str(error)
        for name in unusable:
            del document["presets"][name]
        return document, unusable, problem

    def _load(self) -> tuple[dict[str, Any], str]:
        """The file's content and, where an empty one stands for a damaged file's, what is damaged."""
        try:
            if self.path.is_dir():  # Windows would only say that permission is denied.
                raise PresetError(f"{self.path} can't be read: it is a folder")
            return _parse(_patiently(self.path.read_bytes, BUSY_SECONDS / 4), str(self.path)), ""
        except _DamagedError as error:
            return _empty(), str(error)
        except FileNotFoundError:
            return _empty(), ""
        except OSError as error:
            raise PresetError(f"{self.path} can't be read: {error.strerror}") from error

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The file's content, to be changed in place; written, still under the lock, unless the block fails."""
        with _THREADS, _locked(f"{self.path}.lock"):
            document, damage = self._load()
            before = _to_json(document)
            yield document
            if (after := _to_json(document)) != before:
                try:
                    self._write(after.encode(), damage)
                except OSError as error:
                    raise PresetError(f"{self.path} can't be written: {error.strerror}") from error

    def _write(self, content: bytes, damage: str) -> None:
        if self.path.exists() and not os.access(self.path, os.W_OK):  # Linux would replace it all the same.
            raise PresetError(f"{self.path} can't be written: it is read-only")
        temporary = Path(f"{self.path}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if damage:
                stem = f"{self.path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
                endings = itertools.chain([""], map("-{}".format, itertools.count(2)))
                names = (f"{stem}{ending}{self.path.suffix}" for ending in endings)
                aside = next(path for path in map(self.path.with_name, names) if not os.path.lexists(path))
                _patiently(lambda: os.rename(self.path, aside), BUSY_SECONDS)
                self._kept_aside.append(f"{damage}. It is kept as {aside.name}")
            _patiently(lambda: os.replace(temporary, self.path), BUSY_SECONDS)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def clean_name(name: Any) -> str:
    """`name` as presets are stored: no spaces around it, Unicode NFC. It is text and nothing else: no path, no HTML.

    Raises `PresetError` for what isn't text, is empty or too long, or has line breaks or control characters.
    """
    if not isinstance(name, str):
        raise PresetError(f"a preset's name must be text, got {_clip(name)}")
    name = unicodedata.normalize("NFC", name).strip()
    kinds = {unicodedata.category(character) for character in name}
    if kinds <= {"Cf", "Zs"}:  # Nothing to be seen, as with a zero-width space.
        raise PresetError("a preset's name must not be empty")
    if len(name) > MAX_NAME:
        raise PresetError(f"a preset's name can have up to {MAX_NAME} characters, got {len(name)}")
    if kinds & {"Cc", "Cs", "Zl", "Zp"}:
        raise PresetError(f"a preset's name must not have line breaks or control characters, got {name!r}")
    return name


def _built_in(name: str) -> str | None:
    """The built-in preset that a person would take `name` for."""
    keys = {" ".join(key.split()).casefold(): key for key in BUILT_IN}
    return keys.get(" ".join(name.split()).casefold())


def _own_name(name: Any) -> str:
    name = clean_name(name)
    if built_in := _built_in(name):
        raise PresetError(f"{built_in!r} is a built-in preset, which can't be changed: choose another name")
    return name


def _find(document: dict[str, Any], name: str) -> str:
    """The user's preset `name` as the file has it, where it may be a name that can't be used."""
    if name in document["presets"] or (name := _own_name(name)) in document["presets"]:
        return name
    raise PresetError(f"there is no preset {name!r}")


def _free_name(presets: dict[str, Any], name: str, entry: Any) -> str:
    """`name`, or `name (2)` and so on, for a preset to add. `PresetError`: a bad one, or one that is there already."""
    complete = _complete(entry)
    for number in itertools.count(1):
        ending = f" ({number})" if number > 1 else ""
        candidate = f"{name[: MAX_NAME - len(ending)]}{ending}"
        built_in = _built_in(candidate)
        if not built_in and candidate not in presets:
            return candidate
        there = BUILT_IN[built_in][0] if built_in else presets[candidate]
        with contextlib.suppress(PresetError):
            if _complete(there) == complete:
                break
    raise PresetError(f"it is already here as {built_in or candidate!r}")


def _fields(settings: MergeSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in PANEL_FIELDS}


def _settings(entry: Any) -> MergeSettings:
    """The preset's settings, with defaults for missing fields."""
    if not isinstance(entry, dict):
        raise PresetError(f"a preset must be an object of settings, got {_clip(entry)}")
    try:
        return MergeSettings(**{name: entry[name] for name in PANEL_FIELDS if name in entry})
    except SettingsError as error:
        raise PresetError(_clip(error)) from error


def _complete(entry: Any) -> dict[str, Any]:
    """The preset with its defaults written out, and with what isn't known in it."""
    return _fields(_settings(entry)) | {key: value for key, value in entry.items() if key not in PANEL_FIELDS}


def _empty() -> dict[str, Any]:
    return {"version": VERSION, "presets": {}}


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    """The content in `raw`. Raises `PresetError` for a newer version and `_DamagedError` for anything else."""
    try:
        document = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_twins)
        if _is_deeper(document, MAX_DEPTH):  # Deeper ones can be read but not always written again.
            raise RecursionError(f"nested more than {MAX_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"{source} is damaged: not JSON in UTF-8 ({_clip(error)})") from error
    version = document.get("version") if isinstance(document, dict) else None
    if isinstance(version, (int, float)) and version > VERSION:
        raise PresetError(
            f"{source} is from a newer version of this extension: its format is {_clip(version)}, this one knows "
            f"{VERSION}. It is left as it is and nothing can be saved to it; update the extension"
        )
    if version != VERSION or isinstance(version, bool) or not isinstance(document.get("presets"), dict):
        raise _DamagedError(f'{source} is damaged: it must be {{"version": {VERSION}, "presets": {{…}}}}')
    return document


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) < len(pairs):  # One of the two would be lost at the next save.
        raise ValueError("a name is there twice")
    return entries


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_is_deeper(item, depth - 1) for item in inner)


def _to_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"  # ASCII: JSON can hold half a surrogate pair, which UTF-8 can't.


def _clip(value: Any) -> str:
    """An error's text or another value's `repr`, short enough for a message."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 300 else f"{text[:299]}…"


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Keeps other processes waiting. SQLite's lock works alike on all systems and ends with the process that has it."""
    with contextlib.ExitStack() as stack:
        try:
            connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
            stack.enter_context(contextlib.closing(connection)).execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise PresetError(f"{path} is held by another program: nothing was saved, try again") from error
            # Some cloud folders have no locks: better to save without. If nothing can be saved, the write will say so.
        yield


def _patiently(action: Callable[[], Any], seconds: float) -> Any:
    """Waits for a file that another process has open for a moment, which Windows then refuses."""
    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
