"""Stands in for `modules.script_callbacks`: the callbacks' registry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from modules import errors

callback_map: dict[str, list[SimpleNamespace]] = {}
"""Callbacks by category: `script` (the file that registered it) and `callback`."""


class CFGDenoiserParams(SimpleNamespace):
    """The denoiser's inputs (`x`, `sigma`, `denoiser` and more), which callbacks may change."""


def _calling_file() -> str:
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename


def _callers(category: str) -> tuple[Callable[[Callable], None], Callable[..., None]]:
    """Make `on_<category>` to register callbacks, and `<category>_callback` to call them."""
    callbacks = callback_map[category] = []

    def on(callback: Callable) -> None:
        callbacks.append(SimpleNamespace(script=_calling_file(), callback=callback))

    def call(*args: Any) -> None:
        for registered in list(callbacks):
            try:
                registered.callback(*args)
            except Exception:
                errors.report(f"Error executing callback {category} for {registered.script}")

    return on, call


on_before_ui, before_ui_callback = _callers("before_ui")
on_ui_settings, ui_settings_callback = _callers("ui_settings")
on_app_started, app_started_callback = _callers("app_started")
on_script_unloaded, script_unloaded_callback = _callers("script_unloaded")
on_cfg_denoiser, cfg_denoiser_callback = _callers("cfg_denoiser")
on_cfg_denoised, cfg_denoised_callback = _callers("cfg_denoised")


def clear_callbacks() -> None:
    """Remove all callbacks."""
    for callbacks in callback_map.values():
        callbacks.clear()


def remove_current_script_callbacks() -> None:
    """Remove the calling file's callbacks."""
    filename = _calling_file()
    for callbacks in callback_map.values():
        callbacks[:] = [c for c in callbacks if c.script != filename]


def remove_callbacks_for_function(callback_func: Callable) -> None:
    """Remove a function from every category."""
    for callbacks in callback_map.values():
        callbacks[:] = [c for c in callbacks if c.callback != callback_func]
