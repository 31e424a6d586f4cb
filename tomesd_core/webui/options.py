"""The Settings page: options that don't belong to a generation."""

from __future__ import annotations

import functools
import logging
from typing import Any

from modules import shared

from ..settings import Setting, SettingsError
from .log import log

SECTION = ("sd_webui_tome", "ToMe")
"""Not `tome`, the section of another extension of this title: WebUI makes element ids from it."""
OVERRULE_BUILT_IN = "tome_overrule_built_in"
LOG_LEVEL = "tome_log_level"
LOG_LAYERS = "tome_log_layers"

LEVELS = ("WARNING", "INFO", "DEBUG")
OPTIONS = {
    OVERRULE_BUILT_IN: Setting(
        True, "flag", "Disable WebUI's own token merging in generations with ToMe"
    ),
    LOG_LEVEL: Setting(
        "INFO", "choice", "Log level: warnings, one line per generation, or more", choices=LEVELS
    ),
    LOG_LAYERS: Setting(False, "flag", "Log merging layer by layer"),
}

_warn_once = functools.lru_cache(maxsize=None)(log.warning)


def add_options() -> None:
    """Add the extension's section."""
    import gradio as gr

    for key, option in OPTIONS.items():
        choice = (gr.Radio, {"choices": [*option.choices]}) if option.choices else ()
        info = shared.OptionInfo(option.default, option.label, *choice, section=SECTION)
        shared.opts.add_option(key, info)
    shared.opts.onchange(LOG_LEVEL, apply_log_level, call=False)


def value_of(key: str) -> Any:
    """An option's value, or its default if it isn't set or has an invalid value."""
    option = OPTIONS[key]
    try:
        return option.check(key, getattr(shared.opts, key, option.default))
    except SettingsError as error:
        _warn_once(f"{error}; {option.default!r} is used")
        return option.default


def apply_log_level() -> None:
    """Set the log to the chosen level."""
    log.setLevel(getattr(logging, value_of(LOG_LEVEL)))
