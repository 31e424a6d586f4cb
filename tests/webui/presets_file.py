"""Helpers of the tests of presets; the fixture `presets_path` gives them a file of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tomesd_core.settings import MergeSettings, SettingsError
from tomesd_core.webui import presets

NAMES = ["Quality", "Balanced", "Fast", "Hires only", "Paper (60 %)"]
MINE = MergeSettings(ratio=0.4, schedule="step", late_ratio=0.1, max_downsample=4, min_tokens=512)


def names() -> list[str]:
    return list(presets.read()[0])


def messages() -> list[str]:
    return presets.read()[1]


def write(path: Path, own: dict[str, Any], **more: Any) -> None:
    path.write_text(json.dumps({"version": 1, "presets": own, **more}), encoding="utf-8")


def on_disk(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def error_of(action: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        action(*args)
    return str(caught.value)
