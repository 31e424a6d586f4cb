"""The extension's log: lines on the console that any console can show."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

log = logging.getLogger("ToMe")


class _Console(logging.StreamHandler):
    """Whatever stderr is at the time; characters that it can't encode are escaped, where others would raise."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """`StreamHandler` sets it; it is always the current one."""

    def format(self, record: logging.LogRecord) -> str:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)


def set_up() -> None:
    """Sends the log to stderr, once, whatever WebUI's own logging does."""
    if not log.handlers:
        handler = _Console()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)
