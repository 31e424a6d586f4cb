"""Other scripts of the same title; WebUI's API silently reaches only the first."""

from __future__ import annotations

from typing import Any

from modules import scripts

from .log import log

TITLE = "ToMe"


def log_duplicates(demo: Any, app: Any) -> None:
    """Log the scripts of the same title at start-up."""
    tabs = [_of_title(runner) for runner in (scripts.scripts_txt2img, scripts.scripts_img2img)]
    for line in dict.fromkeys(_line(duplicates) for duplicates in tabs if len(duplicates) > 1):
        log.warning(line)


def _of_title(runner: Any) -> list[Any]:
    """All scripts of the title on one tab, in the API's order."""
    # WebUI's script names are titles in lower case.
    return [script for script in getattr(runner, "scripts", ()) if script.name == TITLE.lower()]


def _line(duplicates: list[Any]) -> str:
    files = ", ".join(script.filename for script in duplicates)
    return f"more than one script is titled {TITLE!r}, and the API reaches only the first: {files}"
