"""What the recorder extension has seen. A package of the extension: it outlives Reload UI, as imported packages do."""

from __future__ import annotations

from collections.abc import Callable

events: list[str] = []
denoiser_calls: list[tuple] = []
actions: dict[str, Callable] = {}
"""What to do in a callback beside recording it: name → function of the callback's arguments."""


def record(name: str, *args: object) -> None:
    """Notes a callback and does what a test wants done in it."""
    events.append(name)
    if name in actions:
        actions[name](*args)


def clear() -> None:
    """Forgets everything."""
    events.clear()
    denoiser_calls.clear()
    actions.clear()
