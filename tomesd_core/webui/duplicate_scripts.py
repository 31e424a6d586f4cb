"""Other scripts of the same title: WebUI's API reaches only the first of them, without a word."""

from __future__ import annotations

from typing import Any

from modules import scripts

from .log import log

TITLE = "ToMe"


def log_duplicates(demo: Any, app: Any) -> None:
    """Names scripts of the same title in the log, at a start."""
    tabs = [_of_title(runner) for runner in (scripts.scripts_txt2img, scripts.scripts_img2img)]
    for line in dict.fromkeys(_line(duplicates) for duplicates in tabs if len(duplicates) > 1):
        log.warning(line)


def _of_title(runner: Any) -> list[Any]:
    """All scripts of the title on one tab, in the order in which the API looks for one."""
    # WebUI keeps a script's title in lower case as its name.
    return [script for script in getattr(runner, "scripts", ()) if script.name == TITLE.lower()]


def _line(duplicates: list[Any]) -> str:
    files = ", ".join(script.filename for script in duplicates)
    return f"more than one script is titled {TITLE!r}, and the API reaches only the first: {files}"
