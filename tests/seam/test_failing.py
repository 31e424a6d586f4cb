"""Failures of the extension: the host works as usual, and the log has each of them once."""

from __future__ import annotations

import sys
from operator import attrgetter

import gradio as gr
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tomesd_core.settings import PANEL_FIELDS


def fail(*_, **__):
    raise LookupError("on purpose")


class Unusable:
    """A part of the host that fails whatever is done with it."""

    __call__ = __getattr__ = __iter__ = fail


def replace(root, path, new=fail):
    """Replace an attribute, by its path from a module."""
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(root), name, new)


def assert_logged_once(lines, *failures):
    for line, failure in zip(lines, failures, strict=True):
        assert f"{failure} failed (LookupError: on purpose)" in line
        assert "Update WebUI" in line and "report" in line


def components_of(block):
    """The components of a page, outermost first."""
    for child in getattr(block, "children", ()):
        yield child
        yield from components_of(child)


def ids_on(page):
    """The ids of the panels' components."""
    ids = [str(child.elem_id) for child in components_of(page)]
    return [elem_id for elem_id in ids if "tome" in elem_id]


@pytest.mark.parametrize(
    "broken",
    [
        "panel.measure_row",
        "panel.presets.read",
        "panel.host.listen",
        "panel.preset_row.build",
        "panel.useful_fields",
        "panel.ui_components.InputAccordion",
    ],
)
def test_without_a_part_the_panel_is_its_controls_alone(script, make_page, log_lines, broken):
    replace(script, broken)
    page, controls = make_page()
    names = ["enabled", *PANEL_FIELDS, "map_step", "map_layer"]
    names.append(names.pop(names.index("full_steps")))
    ids = [f"script_{tab}_tome_{name}" for tab in ("txt2img", "img2img") for name in names]
    assert [control.elem_id for panel in controls for control in panel] == ids
    assert ids_on(page) == ids, "nothing is left of the whole panel"
    assert [[control.value for control in panel[1:3]] for panel in controls] == [[0.8, 0.75]] * 2
    assert_logged_once(log_lines, "making the panel")


def test_without_any_control_there_is_no_panel(make_page, log_lines, monkeypatch):
    monkeypatch.setattr(gr, "Slider", fail)
    page, controls = make_page()
    assert controls == [[], []] and ids_on(page) == []
    # Once for both tabs.
    assert_logged_once(log_lines, "making the panel", "making a panel without preview and presets")


def answers(page, name):
    """Outputs of the functions that an element's events call, and how many the page expects."""
    functions = page.fns.values() if isinstance(page.fns, dict) else page.fns
    elem_id = f"script_txt2img_tome_{name}"
    element = next(number for number, block in page.blocks.items() if block.elem_id == elem_id)
    for event, function in zip(page.get_config_file()["dependencies"], functions, strict=True):
        targets = [
            target[0] if isinstance(target, (list, tuple)) else target
            for target in event["targets"]
        ]
        if element in targets and function.fn is not None:
            answer = function.fn(*[page.blocks[number].value for number in event["inputs"]])
            outputs = len(event["outputs"])
            yield answer if outputs > 1 else [answer], outputs


@pytest.mark.parametrize(
    ("broken", "name", "what"),
    [
        ("panel.presets.get", "preset", "this button"),
        ("panel.presets.save", "preset_save", "this button"),
        ("panel.presets.delete", "preset_delete", "this button"),
        ("routes.measure.measure", "measure_start", "measuring"),
        ("panel.preview.title", "refresh", "part of the panel"),
        ("panel.useful_fields", "schedule", "part of the panel"),
    ],
)
def test_a_failing_event_changes_nothing_and_a_button_says_so(
    script, make_page, log_lines, broken, name, what
):
    page, _ = make_page()
    replace(script, broken)
    for _ in range(2):
        ((answer, outputs),) = answers(page, name)
        if what != "part of the panel":
            assert f"{what} failed (LookupError: on purpose)" in answer[0]
            answer = [gr.update(), *answer[1:]]
        assert answer == [gr.update()] * outputs
    assert_logged_once(log_lines, what)


@pytest.mark.parametrize("error", ["SettingsError", "NoResultError"])
def test_an_expected_error_is_shown_as_text_and_not_logged(script, make_page, log_lines, error):
    def fail(*_):
        raise getattr(script.log, error)("ratio must be < 1")

    page, _ = make_page()
    replace(script, "routes.measure.measure", fail)
    (((answer,), _),) = answers(page, "measure_start")
    assert answer == "ratio must be &lt; 1"
    assert log_lines == []


@pytest.mark.parametrize("path", ["/tome/presets", "/tome/status"])
def test_a_failing_route_is_an_error_of_its_own(script, modules, log_lines, path):
    app = FastAPI()
    app.get("/others")(lambda: "fine")
    modules.script_callbacks.app_started_callback(None, app)
    script.panel.presets.read = script.host.loaded_layers = fail
    client = TestClient(app)
    for _ in range(2):
        reply = client.get(path)
        assert reply.status_code == 500 and "LookupError" in reply.json()["detail"]
    assert client.get("/others").json() == "fine"
    assert_logged_once(log_lines, f"GET {path}")


@pytest.mark.parametrize(
    ("event", "arguments", "broken", "what"),
    [
        ("before_ui", (), "scripts.scripts_data", "axes"),
        ("ui_settings", (), "shared.OptionInfo", "settings"),
        ("app_started", (None, Unusable()), None, "routes"),
        ("app_started", (None, FastAPI()), "scripts.scripts_txt2img", "same title"),
    ],
)
@pytest.mark.usefixtures("script")
def test_a_failing_callback_is_logged_once(modules, log_lines, event, arguments, broken, what):
    if broken:
        replace(modules, broken, Unusable())
    for _ in range(2):
        getattr(modules.script_callbacks, f"{event}_callback")(*arguments)
    assert modules.errors.exceptions == []
    assert_logged_once(log_lines, what)


def test_a_failing_import_is_printed_and_registers_nothing(modules, capsys):
    """WebUI shows the error and runs the other scripts."""
    del modules.sd_models
    sys.modules["modules.sd_models"] = None
    modules.scripts.load_scripts()
    (error,) = modules.errors.exceptions
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "ToMe" in line]
    assert f"ModuleNotFoundError: {error}" in line and "Update WebUI" in line
    assert not any(modules.script_callbacks.callback_map.values())
