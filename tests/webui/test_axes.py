"""The axes in WebUI's X/Y/Z plot: there in every version of WebUI, and a plot without them is said to be one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from in_host import running

from tomesd_core.settings import PANEL_FIELDS

LABELS = ["Enabled", "Preset", *(setting.label for setting in PANEL_FIELDS.values())]


def labels():
    from modules import scripts

    plot = next(found.module for found in scripts.scripts_data if Path(found.path).name == "xyz_grid.py")
    return [option.label.removeprefix("[ToMe] ") for option in plot.axis_options if option.label.startswith("[ToMe] ")]


@pytest.fixture
def reloaded(host):
    yield
    host.reload_ui()
    assert host.app


@pytest.mark.parametrize("name", ["{file}", "scripts.{stem}"], ids=["as usual", "1.9.0 and 1.9.1"])
def test_axes_are_there_once_whatever_webui_calls_the_plots_module(host, reloaded, log_lines, monkeypatch, name):
    from modules import scripts

    def load_module(path):
        called = name.format(file=Path(path).name, stem=Path(path).stem)
        spec = importlib.util.spec_from_file_location(called, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setattr(scripts, "load_module", load_module)
    host.reload_ui()
    monkeypatch.undo()
    assert labels() == LABELS
    assert log_lines == []


def test_where_there_is_no_plot_this_is_logged_once_a_start(host, reloaded, log_lines, monkeypatch):
    from modules import scripts

    load_module = scripts.load_module

    def without_plot(path):
        if Path(path).name == "xyz_grid.py":
            raise ImportError("on purpose")
        return load_module(path)

    monkeypatch.setattr(scripts, "load_module", without_plot)
    host.reload_ui()
    assert host.app
    monkeypatch.undo()
    assert len(log_lines) == 1
    assert "xyz_grid.py" in log_lines[0] and "no ToMe axes" in log_lines[0]


def test_a_plot_of_another_shape_is_no_plot(host, log_lines, monkeypatch):
    """Another program's WebUI, or a fork, may have a file of this name without a list of axes."""
    from modules import scripts

    plot = next(found.module for found in scripts.scripts_data if Path(found.path).name == "xyz_grid.py")
    monkeypatch.delattr(plot, "axis_options")
    running("webui.axes").add_axes()
    assert len(log_lines) == 1 and "no ToMe axes" in log_lines[0]
