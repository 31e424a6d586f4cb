"""The extension's log on the console, and how a failure of ours is said there once and harms
nobody."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ..settings import SettingsError

log = logging.getLogger("ToMe")

_failures: set[str] = set()


class NoResultError(Exception):
    """There is no result. The message says why, in one line for people."""


EXPECTED = SettingsError, NoResultError
"""The errors whose message is all that a person needs."""


def set_up() -> None:
    """Sends the log to stderr, once, whatever WebUI's own logging does."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)


def failed(what: str, error: Exception) -> str:
    """What to tell people of an unexpected error. It is in the log too, once, with the traceback."""
    line = f"{what} failed ({type(error).__name__}: {error}); everything else goes on"
    if line not in _failures:
        _failures.add(line)
        log.error(
            f"{line}. Update WebUI and this extension; report this if it stays:", exc_info=error
        )
    return line


def guarded(
    what: str,
    function: Callable[..., Any],
    otherwise: Callable[[str], Any] = lambda line: None,
    expected: tuple[type[Exception], ...] = (),
) -> Callable[..., Any]:
    """`function`; where it fails, the log says once that `what` failed, and it gives what
    `otherwise` makes of that.

    Of an `expected` error `otherwise` is given the message, and the log says nothing.
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
