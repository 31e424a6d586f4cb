"""A picture's parameters back into the panel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from ..settings import PANEL_FIELDS, Setting, SettingsError
from .log import log


def paste_fields(controls: Mapping[str, Any]) -> list[tuple[Any, Callable[[Mapping[str, Any]], Any]]]:
    """Pairs of control and function of the parsed parameters, for `Script.infotext_fields`.

    Functions, since an absent key must set a field to its default, and since WebUI casts what it pastes by itself by
    the component's type, and doesn't catch what that raises.
    """
    readers: dict[str, Callable[[Mapping[str, Any]], Any]] = {"enabled": lambda parameters: "ToMe ratio" in parameters}
    readers |= {name: _reader(name, setting) for name, setting in PANEL_FIELDS.items()}
    return [(controls[name], reader) for name, reader in readers.items() if name in controls]


def read_field(name: str, setting: Setting, text: Any) -> Any:
    """A field's value from its text in the parameters. Raises `SettingsError` where it has none."""
    value = {"True": True, "False": False}.get(text, text) if setting.kind == "flag" else text
    if isinstance(text, str) and setting.kind in ("number", "integer", "choice"):
        with contextlib.suppress(ValueError):
            value = float(text) if setting.kind == "number" else int(text)
    return setting.check(name, value)


def _reader(name: str, setting: Setting) -> Callable[[Mapping[str, Any]], Any]:
    def read(parameters: Mapping[str, Any]) -> Any:
        key = str(setting.infotext)
        try:
            return read_field(name, setting, parameters[key]) if key in parameters else setting.default
        except SettingsError as error:
            log.warning(f"{key} in the picture's parameters is ignored: {error}")
            return setting.default

    return read
