"""The extension's log: lines on the console that any console can show."""

from __future__ import annotations

import logging

log = logging.getLogger("ToMe")


def set_up() -> None:
    """Sends the log to stderr, once, whatever WebUI's own logging does; characters that a console lacks are escaped."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)
