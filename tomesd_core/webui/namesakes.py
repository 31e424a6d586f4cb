"""Other scripts of the same title: WebUI's API reaches the first of them only, and says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules import scripts

from .log import log

TITLE = "ToMe"


def log_namesakes(demo: Any, app: Any) -> None:
    """Names them in the log at a start, where there is more than one script of the title."""
    tabs = [_of_title(runner) for runner in (scripts.scripts_txt2img, scripts.scripts_img2img)]
    for line in dict.fromkeys(_line(namesakes) for namesakes in tabs if len(namesakes) > 1):
        log.warning(line)


def warning(p: Any, is_asked: bool) -> str | None:
    """What to say of them under the picture of `p`, or None. `is_asked` says whether ours was asked to merge.

    Where it wasn't, an API call that switches merging on as for ours may have meant ours, and reached another.
    """
    namesakes = _of_title(p.scripts)
    if len(namesakes) > 1 and (is_asked or (p.is_api and _is_on(p, namesakes[0]))):
        return _line(namesakes)
    return None


def _of_title(runner: Any) -> list[Any]:
    """All scripts of the title on one tab, in the order in which the API looks for one."""
    # WebUI notes a script's title in lower case as its name.
    return [script for script in getattr(runner, "scripts", ()) if script.name == TITLE.lower()]


def _is_on(p: Any, script: Any) -> bool:
    first = p.script_args[script.args_from : script.args_to][:1]
    return any(value is True or isinstance(value, Mapping) for value in first)


def _line(namesakes: list[Any]) -> str:
    files = ", ".join(script.filename for script in namesakes)
    return f"more than one script is titled {TITLE!r}, and the API reaches the first only: {files}"
