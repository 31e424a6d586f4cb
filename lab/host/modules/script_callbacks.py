"""Stands in for `modules.script_callbacks`: the callbacks' registry. Ordering by the user is left out."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

from modules import errors, extensions


class CFGDenoiserParams:
    """What the denoiser is about to be given; callbacks may change it."""

    def __init__(
        self, x, image_cond, sigma, sampling_step, total_sampling_steps, text_cond, text_uncond, denoiser=None
    ):
        self.x, self.image_cond, self.sigma = x, image_cond, sigma
        self.sampling_step, self.total_sampling_steps = sampling_step, total_sampling_steps
        self.text_cond, self.text_uncond, self.denoiser = text_cond, text_uncond, denoiser


class CFGDenoisedParams:
    """What came out of the model, before guidance."""

    def __init__(self, x, sampling_step, total_sampling_steps, inner_model):
        self.x, self.inner_model = x, inner_model
        self.sampling_step, self.total_sampling_steps = sampling_step, total_sampling_steps


class AfterCFGCallbackParams:
    """What guidance made of it; callbacks may replace `x`."""

    def __init__(self, x, sampling_step, total_sampling_steps):
        self.x, self.sampling_step, self.total_sampling_steps = x, sampling_step, total_sampling_steps


@dataclasses.dataclass
class ScriptCallback:
    """A registered callback, the file that registered it, and its unique name."""

    script: str
    callback: Any
    name: str = "unnamed"


callback_map: dict[str, list[ScriptCallback]] = {}


def _calling_file() -> str:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename if frame else "unknown file"


def add_callback(callbacks: list, fun: Callable, *, name=None, category="unknown", filename=None) -> None:
    """Adds a callback under a name made of extension, file and category."""
    filename = filename or _calling_file()
    extension = extensions.find_extension(filename)
    parts = [extension.canonical_name if extension else "base", os.path.basename(filename), category, name]
    full_name = "/".join(part for part in parts if part)
    taken = sum(c.name == full_name or c.name.startswith(f"{full_name}-") for c in callbacks)
    callbacks.append(ScriptCallback(filename, fun, f"{full_name}-{taken}" if taken else full_name))


def _run(category: str, *args, backwards: bool = False, **kwargs) -> list:
    """Calls all callbacks of a category; one that raises is reported, and the others still run."""
    results = []
    callbacks = list(callback_map[f"callbacks_{category}"])
    for c in reversed(callbacks) if backwards else callbacks:
        try:
            results.append(c.callback(*args, **kwargs))
        except Exception:
            errors.report(f"Error executing callback {category} for {c.script}", exc_info=True)
    return results


def clear_callbacks() -> None:
    """Forgets all callbacks."""
    for callbacks in callback_map.values():
        callbacks.clear()


def remove_current_script_callbacks() -> None:
    """Forgets what the calling file registered; what it had another file register stays."""
    filename = _calling_file()
    for callbacks in callback_map.values():
        callbacks[:] = [c for c in callbacks if c.script != filename]


def remove_callbacks_for_function(callback_func: Callable) -> None:
    """Forgets one function in every category."""
    for callbacks in callback_map.values():
        callbacks[:] = [c for c in callbacks if c.callback != callback_func]


def _callers(category: str, doc: str, backwards: bool = False):
    """`on_<category>`, which registers a callback, and `<category>_callback`, which calls all of them."""
    callbacks = callback_map[f"callbacks_{category}"] = []

    def on(callback, *, name=None):
        add_callback(callbacks, callback, name=name, category=category)

    def call(*args, **kwargs):
        return _run(category, *args, backwards=backwards, **kwargs)

    on.__doc__ = f"Calls `callback` {doc}"
    call.__doc__ = f"Calls what `on_{category}` registered."
    return on, call


on_app_started, app_started_callback = _callers("app_started", "with (demo, app) when page and API are up.")
on_before_reload, app_reload_callback = _callers("on_reload", "before Reload UI.")
on_model_loaded, model_loaded_callback = _callers("model_loaded", "with a model just loaded, not one kept in memory.")
on_ui_tabs, _ui_tabs = _callers("ui_tabs", "for a list of (component, title, id), each a tab of the page.")
on_ui_settings, ui_settings_callback = _callers("ui_settings", "before the settings page is built.")
on_cfg_denoiser, cfg_denoiser_callback = _callers("cfg_denoiser", "with CFGDenoiserParams before the model runs.")
on_cfg_denoised, cfg_denoised_callback = _callers("cfg_denoised", "with CFGDenoisedParams after the model ran.")
on_cfg_after_cfg, cfg_after_cfg_callback = _callers("cfg_after_cfg", "with AfterCFGCallbackParams after guidance.")
on_before_component, before_component_callback = _callers("before_component", "before any component is made.")
on_after_component, after_component_callback = _callers("after_component", "after any component is made.")
on_infotext_pasted, infotext_pasted_callback = _callers("infotext_pasted", "with an infotext and what was read in it.")
on_script_unloaded, script_unloaded_callback = _callers(
    "script_unloaded", "before scripts are unloaded.", backwards=True
)
on_before_ui, before_ui_callback = _callers("before_ui", "before the page is built.", backwards=True)
on_list_unets, _list_unets = _callers("list_unets", "with a list, to which it adds `SdUnetOption`s.")


def ui_tabs_callback() -> list[tuple]:
    """Collects the extensions' tabs."""
    return [tab for tabs in _ui_tabs() for tab in tabs or []]


def list_unets_callback() -> list:
    """Collects what may stand in for the UNet."""
    found: list = []
    _list_unets(found)
    return found
