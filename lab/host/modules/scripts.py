"""Stands in for `modules.scripts`: loads extensions' scripts, all always on, and calls them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gradio as gr
from modules import errors, script_callbacks

AlwaysVisible = object()


class Script:
    """Base class of scripts, which define the methods to be called, such as `process_batch`.

    WebUI makes one instance per tab and keeps it until Reload UI.
    """

    name = filename = args_from = args_to = controls = None
    infotext_fields: Any = ()
    paste_field_names: Any = ()
    is_img2img = False

    def title(self) -> str:
        """Name in the page and in the API."""
        raise NotImplementedError

    def ui(self, is_img2img: bool) -> list[Any]:
        """Build the script's controls and return those whose values are its arguments."""
        return []

    def show(self, is_img2img: bool) -> Any:
        """Return `AlwaysVisible`: always on."""
        return AlwaysVisible

    def elem_id(self, item_id: str) -> str:
        """HTML id of tab, title and `item_id`."""
        title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{title}_{item_id}"


AxisOption = namedtuple(
    "AxisOption", ["label", "type", "apply", "confirm", "choices"], defaults=(None, None)
)
"""An option of an axis of the X/Y/Z plot; the plot itself is missing."""

ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data: list[ScriptClassData] = []
folders: list[str] = []
current_basedir = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def basedir() -> str:
    """Folder of the extension whose script is being executed."""
    return current_basedir


def _execute(path: str) -> ModuleType:
    """Execute a file as a module named by its file name, not kept in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _classes(module: ModuleType) -> Iterator[type[Script]]:
    kinds = (value for value in vars(module).values() if isinstance(value, type))
    return (kind for kind in kinds if issubclass(kind, Script))


def load_scripts() -> None:
    """Execute all scripts, the plot's list first; report those that fail."""
    global current_basedir, scripts_txt2img, scripts_img2img, scripts_current
    script_callbacks.clear_callbacks()
    plot = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    scripts_data[:] = [ScriptClassData(None, "scripts/xyz_grid.py", "", plot)]
    host, syspath = current_basedir, sys.path
    for folder in folders:
        for path in sorted(map(str, Path(folder, "scripts").glob("*.py"))):
            try:
                sys.path, current_basedir = [folder, *syspath], folder
                module = _execute(path)
                for kind in _classes(module):
                    scripts_data.append(ScriptClassData(kind, path, folder, module))
            except Exception:
                errors.report(f"Error loading script: {path}")
            finally:
                sys.path, current_basedir = syspath, host
    scripts_txt2img, scripts_img2img = ScriptRunner(), ScriptRunner()
    scripts_txt2img.initialize_scripts(is_img2img=False)
    scripts_img2img.initialize_scripts(is_img2img=True)
    scripts_current = scripts_txt2img


def reload_script_body_only() -> None:
    """Do what "Reload custom script bodies" does: callbacks and running scripts stay."""
    for path in dict.fromkeys(data.path for data in scripts_data if data.script_class):
        _execute(path)


class ScriptRunner:
    """One tab's scripts; a generation calls them by methods of the same names."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.alwayson_scripts: list[Script] = []
        self.inputs: list[Any] = []
        self.infotext_fields: list[tuple[Any, Any]] = []

    def initialize_scripts(self, is_img2img: bool) -> None:
        """Make one instance of each script."""
        for data in scripts_data:
            if data.script_class is not None:
                script = data.script_class()
                script.filename, script.is_img2img = data.path, is_img2img
                script.name = script.title().lower()
                self.scripts.append(script)
        self.alwayson_scripts = list(self.scripts)

    def setup_ui(self) -> None:
        """Build the scripts' controls at the current place of the page; assign the arguments."""
        self.infotext_fields = []
        self.inputs = [None]  # WebUI's first argument is the script that was chosen from a list
        for script in self.scripts:
            with gr.Group():
                script.controls = list(script.ui(script.is_img2img))
            script.args_from = len(self.inputs)
            self.inputs += script.controls
            script.args_to = len(self.inputs)
            self.infotext_fields += script.infotext_fields

    def after_component(self, component: Any) -> None:
        """Tell the scripts that a component of the page was created."""
        for script in self.scripts:
            if hasattr(script, "after_component"):
                script.after_component(component, elem_id=component.elem_id)

    def script(self, title: str) -> Script:
        """First script with this title, the one that WebUI's API uses."""
        return next(script for script in self.scripts if script.name == title.lower())

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith(("setup", "before_", "process", "post")):
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(self, name: str, p: Any, *args: Any, **kwargs: Any) -> None:
        """Call a method of each script that has it; one that raises doesn't stop the others."""
        for script in self.alwayson_scripts:
            if hasattr(script, name):
                try:
                    own = p.script_args[script.args_from : script.args_to]
                    getattr(script, name)(p, *args, *own, **kwargs)
                except Exception:
                    errors.report(f"Error running {name}: {script.filename}")


def init_default_script_args(runner: ScriptRunner) -> list[Any]:
    """Default arguments of a request to the API; a method of WebUI's `Api`.

    Like WebUI it builds all controls once more, so a script's own attributes are no longer the
    page's.
    """
    script_args = [0, *[None] * (len(runner.inputs) - 1)]
    with gr.Blocks(analytics_enabled=False):
        for script in runner.scripts:
            values = [control.value for control in script.ui(script.is_img2img)]
            script_args[script.args_from : script.args_to] = values
    return script_args


scripts_txt2img: ScriptRunner | None = None
scripts_img2img: ScriptRunner | None = None
scripts_current: ScriptRunner | None = None
"""The runner of the tab that is being built."""
