"""Stands in for `modules.errors`: prints what went wrong in a script, and keeps it for the tests."""

from __future__ import annotations

import sys
import traceback

exceptions: list[BaseException] = []


def report(message: str) -> None:
    """Prints a message with the exception that is being handled."""
    exceptions.append(sys.exc_info()[1])
    print(f"*** {message}\n{traceback.format_exc()}---", file=sys.stderr)
