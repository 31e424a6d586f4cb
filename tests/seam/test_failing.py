"""Whatever of the extension fails, its host goes on: it is said once in the log, with what to do."""

from __future__ import annotations

import sys

import gradio as gr
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tomesd_core.settings import PANEL_FIELDS

ADVICE = "Update WebUI and this extension; report this if it stays"


def fail(*_, **__):
    raise LookupError("on purpose")


def assert_said_once(lines, what):
    (line,) = [line for line in lines if what in line]
    assert "LookupError: on purpose" in line
    assert "everything else goes on" in line
    assert ADVICE in line


def components_of(block):
    """What the page shows, outermost first."""
    for child in getattr(block, "children", ()):
        yield child
        yield from components_of(child)


@pytest.fixture
def make_page(load):
    """The page with both tabs' panels after some part of the extension was made to fail; and what
    `ui` gave."""

    def make(*broken):
        script = load()
        for name, attribute in broken:
            setattr(script._module(name) if isinstance(name, str) else name, attribute, fail)
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
    assert_said_once(log_lines, "making the panel failed")


def test_a_host_without_an_accordion_or_tooltips_has_the_controls(make_page, modules, log_lines):
    del modules.ui_components.InputAccordion
    _, _, controls = make_page()
    assert [len(names) for names in controls] == [len(PANEL_FIELDS) + 3] * 2
    assert len(log_lines) == 1 and "making the panel failed (AttributeError" in log_lines[0]


def test_without_any_control_there_is_nothing_and_merging_is_off(make_page, log_lines):
    _, page, controls = make_page(("webui.panel", "_control"))
    assert controls == [[], []]
    assert not [child for child in components_of(page) if "tome" in (child.elem_id or "")]
    assert_said_once(log_lines, "making the panel failed")
    assert_said_once(log_lines, "making a panel without preview and presets failed")
    assert len(log_lines) == 2, "once for both tabs"


def answers(page, name):
    """What the functions give that an event of the element calls, with whatever inputs."""
    functions = page.fns.values() if isinstance(page.fns, dict) else page.fns
    element = next(
        block for block in page.blocks.values() if block.elem_id == f"script_txt2img_tome_{name}"
    )
    for number, dependency in enumerate(page.get_config_file()["dependencies"]):
        targets = [
            target[0] if isinstance(target, (list, tuple)) else target
            for target in dependency["targets"]
        ]
        function = list(functions)[number].fn
        if element._id in targets and function is not None:
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
def test_a_failing_button_changes_nothing_and_says_so(make_page, log_lines, broken, name, what):
    script, page, _ = make_page()
    module, attribute = broken
    setattr(script._module(module), attribute, fail)
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
    assert_said_once(log_lines, f"{what} failed")


@pytest.mark.parametrize("error", ["SettingsError", "NoResultError"])
def test_what_is_wrong_is_shown_as_text_and_not_logged(make_page, log_lines, monkeypatch, error):
    script, page, _ = make_page()
    log = script._module("webui.log")

    def fail(*_):
        raise getattr(log, error)("ratio must be < 1")

    monkeypatch.setattr(script._module("webui.measure"), "measure", fail)
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
    assert len(log_lines) == 1
    assert "a part of the panel failed" in log_lines[0]
    assert ADVICE in log_lines[0]


@pytest.mark.parametrize("path", ["/tome/presets", "/tome/status"])
def test_a_failing_route_is_an_error_of_its_own(load, modules, log_lines, path):
    script, app = load(), FastAPI()
    app.get("/others")(lambda: "fine")
    (add_routes, _) = modules.script_callbacks.registered["on_app_started"]
    script.panel.presets.read = script._module("webui.host").loaded_layers = fail
    add_routes(None, app)
    client = TestClient(app)
    for _ in range(2):
        reply = client.get(path)
        assert reply.status_code == 500
        assert f"GET {path} failed (LookupError" in reply.json()["detail"]
    assert client.get("/others").json() == "fine"
    assert_said_once(log_lines, f"GET {path} failed")


@pytest.mark.parametrize(
    ("category", "number", "broken", "what"),
    [
        ("on_before_ui", 0, ("webui.axes", "_axes"), "adding the plot's axes"),
        ("on_ui_settings", 0, ("shared", "OptionInfo"), "adding the settings"),
        ("on_app_started", 0, ("webui.routes", "_logins"), "adding the routes"),
        (
            "on_app_started",
            1,
            ("webui.duplicate_scripts", "_of_title"),
            "looking for scripts of the same title",
        ),
    ],
)
def test_a_failing_callback_is_said_once(load, modules, log_lines, category, number, broken, what):
    script = load()
    name, attribute = broken
    setattr(modules.shared if name == "shared" else script._module(name), attribute, fail)
    if category == "on_before_ui":
        grid = type("Grid", (), {"AxisOption": None, "axis_options": []})
        modules.scripts.scripts_data.append(
            type("Data", (), {"module": grid, "path": "xyz_grid.py"})
        )
    for _ in range(2):
        modules.script_callbacks.registered[category][number](
            *((None, FastAPI()) if "app" in category else ())
        )
    assert_said_once(log_lines, f"{what} failed")


def test_an_import_that_fails_says_what_to_do_and_registers_nothing(load, modules, capsys):
    """WebUI shows what is raised and goes on with the other scripts."""
    del modules.sd_models
    del sys.modules["modules.sd_models"]
    with pytest.raises(ImportError):
        load()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ToMe: it can't be loaded here (ImportError: ") and ADVICE in line
    assert modules.script_callbacks.registered == {}
