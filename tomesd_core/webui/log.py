"""The extension's log on the console; an unexpected error is logged once and caught."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ..settings import SettingsError

log = logging.getLogger("ToMe")

_failures: set[str] = set()


class NoResultError(Exception):
    """There is no result. The message tells users why, in one line."""


EXPECTED = SettingsError, NoResultError
"""Errors whose message is all that a user needs."""


def set_up() -> None:
    """Send the log to stderr once, whatever WebUI's own logging does."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)


def failed(what: str, error: Exception) -> str:
    """A line for users on an unexpected error, which is logged once with its traceback."""
    line = f"{what} failed ({type(error).__name__}: {error}); the rest works as usual"
    if line not in _failures:
        _failures.add(line)
        log.error(
            f"{line}. Update WebUI and this extension; if it persists, please report it:",
            exc_info=error,
        )
    return line


def guarded(
    what: str,
    function: Callable[..., Any],
    otherwise: Callable[[str], Any] = lambda line: None,
    expected: tuple[type[Exception], ...] = (),
) -> Callable[..., Any]:
    """Wrap `function` so that an error is logged once and `otherwise(line)` is returned.

    `what` names the function in that line. For an `expected` error `otherwise` gets the error's
    message, and nothing is logged.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except expected as error:
            return otherwise(str(error))
        except Exception as error:
            return otherwise(failed(what, error))

    return call
