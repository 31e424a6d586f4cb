"""The Settings page: options that don't belong to a generation."""

from __future__ import annotations

import logging
from typing import Any

from modules import shared

from .log import log

SECTION = ("sd_webui_tome", "ToMe")
"""Not , the section of another extension of this title: WebUI makes element ids from it."""
OVERRULE_BUILT_IN = "tome_overrule_built_in"
LOG_LEVEL = "tome_log_level"
LOG_LAYERS = "tome_log_layers"

LEVELS = ["WARNING", "INFO", "DEBUG"]
OPTIONS: dict[str, tuple[Any, str]] = {
    OVERRULE_BUILT_IN: (
        True,
        "Disable WebUI's own token merging in generations with ToMe",
    ),
    LOG_LEVEL: ("INFO", "Log level: warnings, one line per generation, or more"),
    LOG_LAYERS: (False, "Log merging layer by layer"),
}
"""Default and label of each option."""

_wrong: set[str] = set()


def add_options() -> None:
    """Add the extension's section."""
    import gradio as gr

    for key, (default, label) in OPTIONS.items():
        choice = (gr.Radio, {"choices": LEVELS}) if key == LOG_LEVEL else ()
        shared.opts.add_option(key, shared.OptionInfo(default, label, *choice, section=SECTION))
    shared.opts.onchange(LOG_LEVEL, apply_log_level, call=False)


def option(key: str) -> Any:
    """An option's value, or its default if it isn't set or has an invalid value."""
    default = OPTIONS[key][0]
    value = getattr(shared.opts, key, default)
    if value in LEVELS if key == LOG_LEVEL else isinstance(value, bool):
        return value
    allowed = f"one of {', '.join(LEVELS)}" if key == LOG_LEVEL else "true or false"
    line = f"{key} must be {allowed}, got {value!r}; {default!r} is used"
    if line not in _wrong:
        _wrong.add(line)
        log.warning(line)
    return default


def apply_log_level() -> None:
    """Set the log to the chosen level."""
    log.setLevel(getattr(logging, option(LOG_LEVEL)))
