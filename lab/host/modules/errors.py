"""Stands in for `modules.errors`: prints scripts' exceptions, and keeps them for the tests."""

from __future__ import annotations

import sys
import traceback

exceptions: list[BaseException] = []


def report(message: str) -> None:
    """Print a message with the current exception."""
    exceptions.append(sys.exc_info()[1])
    print(f"*** {message}\n{traceback.format_exc()}---", file=sys.stderr)
