"""Update the extension's entries in `ui-config.json` before WebUI reads it.

WebUI writes every control's default and every slider's range to that file at its first start, and
from then on these override the code. Each start therefore removes the ranges, and the defaults that
the user didn't change, and WebUI writes this version's. A copy of the defaults in the file tells
which were changed; a file without one is from version 0.1.0 or 1.0.0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules import shared

from ..settings import Setting, SettingsError
from .arguments import CONTROLS, shown
from .log import log

SCRIPT = "customscript/tome.py"
COPY = f"{SCRIPT}/defaults"
"""The key of the copy of the defaults."""
RANGE = ("minimum", "maximum", "step")

VERSION_1_0_0 = {
    "enabled": False,
    "ratio": 0.9375,
    "late_ratio": 0.75,
    "schedule": "linear",
    "switch_at": 0.5,
    "max_downsample": 1,
    "min_tokens": 0,
    "apply_to": "both passes",
    "reuse_steps": 1,
    "method": "keys",
    "map_step": 0,
    "map_layer": 1,
}
VERSION_0_1_0 = {**VERSION_1_0_0, "ratio": 0.6, "late_ratio": 0.4, "reuse_steps": 4}
HIGHEST_RATIO_0_1_0 = 0.75

APPLIED = {"2": 1, "4": 2}
"""Version 1.0.0's Max downsample was numbers, which Settings, Defaults, Apply took for indices."""


def update_file() -> None:
    """Update WebUI's file; WebUI itself reports a damaged one."""
    name = getattr(shared.cmd_opts, "ui_config_file", None)
    if not name:
        return
    path = Path(name).resolve()
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = {}
    except ValueError:
        return
    after = updated(before) if isinstance(before, dict) else before
    if after != before:
        temporary = path.with_name(f"{path.name}.tome")
        temporary.write_text(json.dumps(after, indent=4, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)


def updated(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without ranges and unchanged defaults. Logs invalid values."""
    after, copy = dict(content), content.get(COPY)
    for tab in ("txt2img", "img2img"):
        is_first = content.get(_key(tab, "ratio", "maximum")) == HIGHEST_RATIO_0_1_0
        former = copy if isinstance(copy, Mapping) else VERSION_0_1_0 if is_first else VERSION_1_0_0
        for name, setting in CONTROLS.items():
            _rename(after, tab, setting)
            for field in RANGE:
                after.pop(_key(tab, name, field), None)
            key = _key(tab, name, "value")
            if key not in after:
                continue
            value = after.pop(key)
            if copy is None and name == "max_downsample":
                value = APPLIED.get(value, value)
            if value == former.get(name):
                continue
            try:
                after[key] = shown(name, setting.check(name, value))
            except SettingsError as error:
                log.warning(f"an invalid default in ui-config.json ({tab}) is replaced: {error}")
        _keep_late_ratio_low(after, tab)
    after[COPY] = {name: setting.default for name, setting in CONTROLS.items()}
    return after


def _keep_late_ratio_low(content: dict[str, Any], tab: str) -> None:
    """Limit the default late ratio to a ratio that the user chose."""
    ratio, late = content.get(_key(tab, "ratio", "value")), _key(tab, "late_ratio", "value")
    if ratio is not None and late not in content and ratio < CONTROLS["late_ratio"].default:
        content[late] = ratio


def _rename(content: dict[str, Any], tab: str, setting: Setting) -> None:
    """Move the entries of a control's former label to its present one."""
    former = f"{SCRIPT}/{tab}/{setting.former_label}/"
    for key in [key for key in content if setting.former_label and key.startswith(former)]:
        content.setdefault(
            f"{SCRIPT}/{tab}/{setting.label}/{key.removeprefix(former)}", content.pop(key)
        )


def _key(tab: str, name: str, field: str) -> str:
    return f"{SCRIPT}/{tab}/{CONTROLS[name].label}/{field}"
