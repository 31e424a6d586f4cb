"""The script on a page of gradio 3.41 or 4.40, with the few of `modules.*` that it names."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch

ROOT = Path(__file__).parents[2]
EXTENSION = ROOT / "scripts" / "tome.py"


class Script:
    """`modules.scripts.Script`, as far as the extension uses it."""

    filename = str(EXTENSION)
    is_img2img = False

    def elem_id(self, name: str) -> str:
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_tome_{name}"


@contextlib.contextmanager
def input_accordion(value: bool, label: str, elem_id: str) -> Iterator[Any]:
    """A checkbox that is the title of a fold."""
    checkbox = gr.Checkbox(value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
    with gr.Accordion(label, open=True, elem_id=elem_id):
        yield checkbox


def host_modules() -> dict[str, ModuleType]:
    """`modules` and what the extension imports of it."""
    callbacks: dict[str, list[Callable]] = {}

    def module(name: str, **names: Any) -> ModuleType:
        new = ModuleType(name)
        vars(new).update(names)
        return new

    def on(name: str) -> Callable[[Callable], None]:
        return lambda callback: callbacks.setdefault(name, []).append(callback)

    names = (
        "on_before_ui",
        "on_ui_settings",
        "on_app_started",
        "on_cfg_denoiser",
        "on_script_unloaded",
    )
    runner = SimpleNamespace(scripts=[])
    options = SimpleNamespace(
        add_option=lambda key, info: None, onchange=lambda *args, **kwargs: None
    )
    parts = {
        "scripts": {
            "Script": Script,
            "AlwaysVisible": object(),
            "basedir": lambda: str(ROOT),
            "scripts_data": [],
            "scripts_txt2img": runner,
            "scripts_img2img": runner,
        },
        "script_callbacks": {
            **{name: on(name) for name in names},
            "remove_current_script_callbacks": lambda: None,
            "registered": callbacks,
        },
        "shared": {
            "opts": options,
            "OptionInfo": lambda *args, **kwargs: None,
            "cmd_opts": SimpleNamespace(),
            "data_path": "",
        },
        "ui_components": {
            "FormRow": gr.Row,
            "ToolButton": gr.Button,
            "InputAccordion": input_accordion,
        },
        "sd_models": {"model_data": SimpleNamespace(sd_model=None)},
        "sd_unet": {"current_unet": None},
        "processing": {"opt_f": 8},
        "call_queue": {"queue_lock": contextlib.nullcontext()},
        "progress": {},
        "sd_samplers_common": {
            "InterruptedException": type("InterruptedException", (BaseException,), {})
        },
        "devices": {"device": torch.device("cpu")},
    }
    modules = {f"modules.{name}": module(f"modules.{name}", **parts[name]) for name in parts}
    return {
        "modules": module("modules", **{name: modules[f"modules.{name}"] for name in parts}),
        **modules,
    }


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The host's modules, in place of another host's and of the extension's in it."""
    others = {
        name: module
        for name, module in sys.modules.items()
        if name.startswith(("modules", "tomesd_core_"))
    }
    for name in others:
        del sys.modules[name]
    new = host_modules()
    sys.modules.update(new)
    for kind in (gr.Slider, gr.Radio, gr.Button, gr.UploadButton, gr.Checkbox):
        monkeypatch.setattr(kind, "__init__", _taking_tooltips(kind.__init__))
    yield new["modules"]
    for name in [name for name in sys.modules if name.startswith(("modules", "tomesd_core_"))]:
        del sys.modules[name]
    sys.modules.update(others)


def _taking_tooltips(init: Callable) -> Callable:
    """A component's `__init__` with a tooltip, as WebUI patches it."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, tooltip: str | None = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    return __init__


@pytest.fixture
def load(modules: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Any]:
    """Execute the script as WebUI does, with a presets' file of the test; return its module."""

    def execute() -> Any:
        spec = importlib.util.spec_from_file_location("tome.py", EXTENSION)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.panel.presets.PATH = tmp_path / "presets.json"
        return module

    return execute


@pytest.fixture
def part_of() -> Callable[[Any, str], Any]:
    """A module of the package that a script uses, by its name in `tomesd_core`."""
    return lambda script, name: importlib.import_module(f"{script.PACKAGE}.{name}")
