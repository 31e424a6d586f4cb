"""The script on a page of gradio 3.41 or 4.40, in the stand-in for WebUI but for its components."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from tomesd_core.settings import PANEL_FIELDS

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "live"))  # For `on_page`.


@contextlib.contextmanager
def input_accordion(value: bool, label: str, elem_id: str) -> Iterator[Any]:
    """A checkbox that is the title of a fold."""
    checkbox = gr.Checkbox(value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
    with gr.Accordion(label, open=True, elem_id=elem_id):
        yield checkbox


def taking_tooltips(init: Callable) -> Callable:
    """A component's `__init__` with a tooltip, as WebUI patches it."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, tooltip: str | None = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    return __init__


def imported() -> list[str]:
    """Names of the imported modules of a host and of the extension in it."""
    return [name for name in sys.modules if name.startswith(("modules", "tomesd_core_"))]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The host's modules, in place of another host's and of the extension's in it."""
    others = {name: sys.modules.pop(name) for name in imported()}
    monkeypatch.syspath_prepend(ROOT / "lab" / "host")
    new = importlib.import_module("modules")
    # The stand-in's components are gradio 3's, and its UNet is ldm's.
    new.ui_components = SimpleNamespace(
        FormRow=gr.Row, ToolButton=gr.Button, InputAccordion=input_accordion
    )
    new.sd_unet = SimpleNamespace(current_unet=None)
    for name in ("ui_components", "sd_unet"):
        sys.modules[f"modules.{name}"] = getattr(new, name)
    importlib.import_module("modules.processing")
    new.scripts.folders.append(str(ROOT))
    for kind in (gr.Slider, gr.Radio, gr.Button, gr.UploadButton, gr.Checkbox):
        monkeypatch.setattr(kind, "__init__", taking_tooltips(kind.__init__))
    yield new
    for name in imported():
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture
def script(modules: ModuleType, tmp_path: Path) -> ModuleType:
    """The script's module once the host has executed it, with a presets' file of the test."""
    modules.scripts.load_scripts()
    module = modules.scripts.scripts_data[-1].module
    module.panel.presets.PATH = tmp_path / "presets.json"
    return module


@pytest.fixture
def make_page(modules: ModuleType, script: ModuleType) -> Callable[[], tuple[gr.Blocks, list]]:
    """Make a page with both tabs' panels between two buttons; return each panel's controls too."""
    runners = modules.scripts.scripts_txt2img, modules.scripts.scripts_img2img

    def make() -> tuple[gr.Blocks, list]:
        with gr.Blocks() as page:
            gr.Button("before")
            for runner in runners:
                runner.setup_ui()
                assert len(runner.infotext_fields) in (0, 1 + len(PANEL_FIELDS))
            gr.Button("after")
        assert page.get_config_file()["components"]
        buttons = [child.value for child in page.children if isinstance(child, gr.Button)]
        assert buttons == ["before", "after"]
        return page, [runner.script("ToMe").controls for runner in runners]

    return make
