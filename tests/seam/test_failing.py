"""Failures of the extension: the host works as usual, and the log has each of them once."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import gradio as gr
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tomesd_core.settings import PANEL_FIELDS


def fail(*_, **__):
    raise LookupError("on purpose")


def assert_logged_once(lines, what):
    (line,) = [line for line in lines if what in line]
    assert all(word in line for word in ("LookupError: on purpose", "Update WebUI", "report"))


def components_of(block):
    """The components of a page, outermost first."""
    for child in getattr(block, "children", ()):
        yield child
        yield from components_of(child)


@pytest.fixture
def make_page(load, part_of):
    """Make a page with both tabs' panels, some of whose parts fail; return the controls too."""

    def make(*broken):
        script = load()
        for name, attribute in broken:
            setattr(part_of(script, name), attribute, fail)
        controls = []
        with gr.Blocks() as page:
            gr.Button("before")
            for is_img2img in (False, True):
                instance = script.ToMe()
                instance.is_img2img = is_img2img
                controls.append(instance.ui(is_img2img))
                assert len(instance.infotext_fields) in (0, 1 + len(PANEL_FIELDS))
            gr.Button("after")
        assert page.get_config_file()["components"]
        buttons = [child.value for child in page.children if isinstance(child, gr.Button)]
        assert buttons == ["before", "after"]
        return script, page, controls

    return make


@pytest.mark.parametrize(
    "broken",
    [
        ("webui.panel", "MeasureRow"),
        ("webui.presets", "read"),
        ("webui.host", "listen"),
        ("webui.panel", "PresetRow"),
        ("webui.panel", "useful_fields"),
    ],
    ids=lambda part: part[1],
)
def test_without_a_part_the_panel_is_its_controls_alone(make_page, log_lines, broken):
    _, page, given = make_page(broken)
    names = [
        "enabled",
        *(name for name in PANEL_FIELDS if name != "full_steps"),
        "map_step",
        "map_layer",
        "full_steps",
    ]
    for tab, controls in zip(("txt2img", "img2img"), given, strict=True):
        ids = [f"script_{tab}_tome_{name}" for name in names]
        assert [control.elem_id for control in controls] == ids
        on_page = [
            child.elem_id
            for child in components_of(page)
            if (child.elem_id or "").startswith(f"script_{tab}")
        ]
        assert on_page == ids, "nothing is left of the whole panel"
        assert [control.value for control in controls[1:3]] == [0.8, 0.75]
    assert_logged_once(log_lines, "making the panel failed")


def test_a_host_without_an_accordion_or_tooltips_has_the_controls(make_page, modules, log_lines):
    del modules.ui_components.InputAccordion
    _, _, controls = make_page()
    assert [len(names) for names in controls] == [len(PANEL_FIELDS) + 3] * 2
    assert len(log_lines) == 1 and "making the panel failed (AttributeError" in log_lines[0]


def test_without_any_control_there_is_no_panel(make_page, log_lines, monkeypatch):
    monkeypatch.setattr(gr, "Slider", fail)
    _, page, controls = make_page()
    assert controls == [[], []]
    assert not [child for child in components_of(page) if "tome" in (child.elem_id or "")]
    assert_logged_once(log_lines, "making the panel failed")
    assert_logged_once(log_lines, "making a panel without preview and presets failed")
    assert len(log_lines) == 2, "once for both tabs"


def answers(page, name):
    """Outputs of the functions that an element's events call, and how many the page expects."""
    functions = page.fns.values() if isinstance(page.fns, dict) else page.fns
    elem_id = f"script_txt2img_tome_{name}"
    element = next(number for number, block in page.blocks.items() if block.elem_id == elem_id)
    for number, dependency in enumerate(page.get_config_file()["dependencies"]):
        targets = [
            target[0] if isinstance(target, (list, tuple)) else target
            for target in dependency["targets"]
        ]
        function = list(functions)[number].fn
        if element in targets and function is not None:
            answer = function(*[page.blocks[number].value for number in dependency["inputs"]])
            outputs = len(dependency["outputs"])
            yield answer if outputs > 1 else [answer], outputs


@pytest.mark.parametrize(
    ("broken", "name", "what"),
    [
        (("webui.preset_row", "useful_fields"), "preset", "this button"),
        (("webui.presets", "save"), "preset_save", "this button"),
        (("webui.presets", "delete"), "preset_delete", "this button"),
        (("webui.measure", "measure"), "measure_start", "measuring"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_failing_button_changes_nothing(make_page, part_of, log_lines, broken, name, what):
    script, page, _ = make_page()
    module, attribute = broken
    setattr(part_of(script, module), attribute, fail)
    script.panel.presets.save(
        "mine", script.generation.MergeSettings()
    ) if attribute != "save" else None
    preset = next(
        block for block in page.blocks.values() if block.elem_id == "script_txt2img_tome_preset"
    )
    preset.value = "mine"
    for _ in range(2):
        ((answer, outputs),) = answers(page, name)
        assert len(answer) == outputs
        assert f"{what} failed (LookupError: on purpose)" in answer[0]
        assert list(answer[1:]) == [gr.update()] * (outputs - 1)
    assert_logged_once(log_lines, f"{what} failed")


@pytest.mark.parametrize("error", ["SettingsError", "NoResultError"])
def test_an_expected_error_is_shown_as_text_and_not_logged(make_page, part_of, log_lines, error):
    script, page, _ = make_page()

    def fail(*_):
        raise getattr(script.log, error)("ratio must be < 1")

    part_of(script, "webui.measure").measure = fail
    (((answer,), _),) = answers(page, "measure_start")
    assert answer == "ratio must be &lt; 1"
    assert log_lines == []


@pytest.mark.parametrize(
    ("broken", "name"),
    [("preview", "refresh"), ("useful_fields", "schedule")],
    ids=["preview", "schedule"],
)
def test_a_failing_preview_changes_nothing(make_page, log_lines, broken, name):
    script, page, _ = make_page()
    setattr(script.panel, broken, fail)
    for _ in range(2):
        ((answer, outputs),) = answers(page, name)
        assert list(answer) == [gr.update()] * outputs
    (line,) = log_lines
    assert "panel failed" in line and "Update WebUI" in line


@pytest.mark.parametrize("path", ["/tome/presets", "/tome/status"])
def test_a_failing_route_is_an_error_of_its_own(load, modules, log_lines, path):
    script, app = load(), FastAPI()
    app.get("/others")(lambda: "fine")
    (add_routes, _) = modules.script_callbacks.registered["on_app_started"]
    script.panel.presets.read = script.host.loaded_layers = fail
    add_routes(None, app)
    client = TestClient(app)
    for _ in range(2):
        reply = client.get(path)
        assert reply.status_code == 500 and "LookupError" in reply.json()["detail"]
    assert client.get("/others").json() == "fine"
    assert_logged_once(log_lines, f"GET {path} failed")


class Lacking:
    """A part of the host without any attribute."""

    def __getattr__(self, name):
        fail()


def break_axes(modules):
    grid = SimpleNamespace(AxisOption=fail, axis_options=[])
    modules.scripts.scripts_data.append(SimpleNamespace(module=grid, path="xyz_grid.py"))


def break_settings(modules):
    modules.shared.OptionInfo = fail


def break_routes(modules):
    modules.shared.cmd_opts = Lacking()


def break_titles(modules):
    modules.scripts.scripts_txt2img = modules.scripts.scripts_img2img = Lacking()


@pytest.mark.parametrize(
    ("category", "number", "break_it", "what"),
    [
        ("on_before_ui", 0, break_axes, "axes"),
        ("on_ui_settings", 0, break_settings, "settings"),
        ("on_app_started", 0, break_routes, "routes"),
        ("on_app_started", 1, break_titles, "same title"),
    ],
    ids=["axes", "settings", "routes", "titles"],
)
def test_a_failing_callback_is_logged_once(
    load, modules, log_lines, category, number, break_it, what
):
    load()
    break_it(modules)
    for _ in range(2):
        modules.script_callbacks.registered[category][number](
            *((None, FastAPI()) if "app" in category else ())
        )
    assert_logged_once(log_lines, what)


def test_a_failing_import_is_printed_and_registers_nothing(load, modules, capsys):
    """WebUI shows the error and runs the other scripts."""
    del modules.sd_models
    del sys.modules["modules.sd_models"]
    with pytest.raises(ImportError):
        load()
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("ToMe", "ImportError", "Update WebUI"))
    assert modules.script_callbacks.registered == {}
