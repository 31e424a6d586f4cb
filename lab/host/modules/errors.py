"""Stands in for `modules.errors`: prints what went wrong in a script and remembers the last few exceptions."""

from __future__ import annotations

import sys
import textwrap
import traceback

exception_records: list[dict] = []


def record_exception() -> None:
    """Keeps the exception now being handled, for `get_exceptions`; the last five are kept."""
    _, error, trace = sys.exc_info()
    if error is not None:
        frames = [[f"{f.filename}, line {f.lineno}, {f.name}", f.line] for f in traceback.extract_tb(trace)]
        exception_records.append({"exception": str(error), "traceback": frames})
        del exception_records[:-5]


def get_exceptions() -> list[dict]:
    """The remembered exceptions, newest first."""
    return exception_records[::-1]


def report(message: str, *, exc_info: bool = False) -> None:
    """Prints a message to stderr, with the current traceback when `exc_info` is set."""
    record_exception()
    print(textwrap.indent(message, "*** ", lambda line: True), file=sys.stderr)
    if exc_info:
        print(textwrap.indent(traceback.format_exc(), "    ") + "---", file=sys.stderr)


def display(e: Exception, task: str, *, full_traceback: bool = False) -> None:
    """Prints an exception and the task that it broke."""
    record_exception()
    print(f"{task or 'error'}: {type(e).__name__}", file=sys.stderr)
    traceback.print_exception(type(e), e, e.__traceback__, file=sys.stderr)
