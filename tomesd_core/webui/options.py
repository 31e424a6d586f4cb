"""The Settings page: what doesn't belong to a generation."""

from __future__ import annotations

import logging
from typing import Any

from modules import shared

from .log import log

SECTION = ("sd_webui_tome", "ToMe")
"""Not `tome`: that is the section of another extension of the title, and WebUI makes element ids of it."""
OVERRULE_BUILT_IN = "tome_overrule_built_in"
LOG_LEVEL = "tome_log_level"
LOG_LAYERS = "tome_log_layers"


def add_options() -> None:
    """Adds the extension's section."""
    import gradio as gr

    levels = {"choices": ["WARNING", "INFO", "DEBUG"]}
    for key, default, label, component, arguments in (
        (OVERRULE_BUILT_IN, True, "Leave WebUI's own token merging out of generations that ToMe merges", None, None),
        (LOG_LEVEL, "INFO", "What to log: warnings, a line for each generation, or more", gr.Radio, levels),
        (LOG_LAYERS, False, "Log what was merged layer by layer", None, None),
    ):
        shared.opts.add_option(key, shared.OptionInfo(default, label, component, arguments, section=SECTION))
    shared.opts.onchange(LOG_LEVEL, apply_log_level, call=False)


def option(key: str, default: Any) -> Any:
    """An option's value; its default where the Settings page has not been built (yet)."""
    return getattr(shared.opts, key, default)


def apply_log_level() -> None:
    """Sets the log to the level that was chosen."""
    log.setLevel(getattr(logging, str(option(LOG_LEVEL, "INFO")), logging.INFO))
