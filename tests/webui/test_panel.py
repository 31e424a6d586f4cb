"""The panel's controls: names, order, ranges, and what ui-config.json keeps."""

from __future__ import annotations

import pytest

from tomesd_core.settings import PANEL_FIELDS

MAP = ["map_step", "map_layer"]
ORDER = ["enabled", "ratio", "late_ratio", "schedule", "switch_at", "max_downsample"]
ORDER += ["min_tokens", "apply_to", "reuse_steps", "method", *MAP, "full_steps"]

pytestmark = pytest.mark.parametrize("tab", ["txt2img", "img2img"])


@pytest.fixture
def controls(host, tab):
    """The controls by field, in the order of the script's arguments."""
    from modules import scripts

    components = getattr(scripts, f"scripts_{tab}").script("ToMe").controls
    return {c.elem_id.split("_tome_")[1].removesuffix("-checkbox"): c for c in components}


@pytest.fixture
def components(host, tab):
    """The panel's components, by id."""
    start = f"script_{tab}_tome_"
    own = [
        block
        for block in host.demo.blocks.values()
        if str(getattr(block, "elem_id", None)).startswith(start)
    ]
    by_name = {block.elem_id.removeprefix(start): block for block in own}
    assert len(by_name) == len(own), "each id once"
    return by_name


def test_fields_in_the_order_that_programs_rely_on(controls):
    assert list(controls) == ORDER
    assert {"enabled", *PANEL_FIELDS, *MAP} == set(ORDER)


def test_ranges_and_defaults_are_the_field_lists(controls):
    assert controls["enabled"].value is False
    for name, setting in PANEL_FIELDS.items():
        control = controls[name]
        if setting.kind == "choice":
            # WebUI takes numbers for indices of choices.
            assert [choice[1] for choice in control.choices] == [*map(str, setting.choices)]
            assert control.value == str(setting.default)
        else:
            assert control.value == setting.default
            assert (control.minimum, control.maximum) == (setting.minimum, setting.maximum)
            assert isinstance(control.value, float), "the API casts by this value's type"
    assert controls["ratio"].maximum == controls["late_ratio"].maximum == 0.9375
    assert [(controls[name].minimum, controls[name].value) for name in MAP] == [(0, 0.0), (1, 1.0)]


def test_the_pages_defaults_merge(controls, make):
    _, *values, _ = [control.value for control in controls.values()]
    processed = make([True, *values, 1], steps=1)
    assert "ToMe error" not in processed.extra_generation_params
    assert processed.extra_generation_params["ToMe ratio"] == 0.8


def test_labels_are_unique_in_the_script(controls):
    """ui-config.json identifies controls by them."""
    labels = [control.label for control in controls.values()]
    assert all(labels)
    assert len(labels) == len(set(labels))


def test_ui_config_has_the_scripts_controls_only(components):
    """What WebUI has written there overrides the code."""
    saved = {
        name
        for name, block in components.items()
        if hasattr(block, "value") and not getattr(block, "do_not_save_to_config", False)
    }
    assert saved == {"enabled-checkbox", *ORDER[1:]}


def test_every_control_has_its_element_and_explains_itself(components):
    assert {"enabled", "preview", "refresh", "preset"} <= set(components)
    buttons = [f"preset_{name}" for name in ("save", "delete", "reload")] + ["measure"]
    assert all(" " in components[name].webui_tooltip for name in (*ORDER[1:], *buttons))


def test_the_page_shows_the_fields_of_its_default_schedule(host, controls):
    """`ui-config.json` may have another default than the code."""
    schedule = next(number for number, c in host.demo.blocks.items() if c is controls["schedule"])
    (show,) = [
        function.fn
        for dependency, function in zip(host.demo.dependencies, host.demo.fns, strict=True)
        if dependency["trigger"] == "load" and dependency["inputs"] == [schedule]
    ]
    for name, hidden in (("step", set()), ("constant", {"late_ratio", "switch_at"})):
        updates = zip(PANEL_FIELDS, show(name), strict=True)
        assert {field for field, update in updates if not update["visible"]} == hidden
