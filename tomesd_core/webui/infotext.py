"""From a picture's parameters to the panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..settings import BEFORE_NAMED, PANEL_FIELDS, Setting, SettingsError
from .arguments import from_text, shown
from .log import log


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
