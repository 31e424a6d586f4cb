"""Stands in for `modules.extensions`: the list of installed extensions. Load order and disabling are left out."""

from __future__ import annotations

import configparser
import os
from dataclasses import dataclass

extensions: list[Extension] = []


@dataclass
class Extension:
    """An extension's folder; `canonical_name` is its name in `metadata.ini`, or the folder's."""

    name: str
    path: str
    enabled: bool = True
    is_builtin: bool = False

    def __post_init__(self) -> None:
        metadata = configparser.ConfigParser()
        metadata.read(os.path.join(self.path, "metadata.ini"))
        self.canonical_name = metadata.get("Extension", "Name", fallback=self.name).lower().strip()

    def list_files(self, subdir: str, extension: str) -> list[str]:
        """Paths of the files in `subdir` that end in `extension`, sorted by name."""
        folder = os.path.join(self.path, subdir)
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        return [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() == extension]


def active() -> list[Extension]:
    """The extensions that are switched on."""
    return [extension for extension in extensions if extension.enabled]


def find_extension(filename: str) -> Extension | None:
    """The extension that a file belongs to."""
    path = os.path.realpath(filename)
    return next((e for e in extensions if path.startswith(os.path.realpath(e.path) + os.sep)), None)
