"""The panel's controls: names, order, ranges; on the page, in ui-config.json and in the API's list."""

from __future__ import annotations

import json

import pytest
from in_host import KEYS
from starlette.testclient import TestClient

from tomesd_core.settings import FIELDS

PANEL = {name: setting for name, setting in FIELDS.items() if setting.infotext}
LAST = ["map_step", "map_layer"]
FIRST = ["enabled", "ratio", "late_ratio", "schedule", "switch_at", "max_downsample", "min_tokens", "apply_to"]

pytestmark = pytest.mark.parametrize("tab", ["txt2img", "img2img"])


@pytest.fixture
def controls(host, tab):
    """The page's controls by field, in the order of the script's arguments."""
    from modules import scripts

    found = getattr(scripts, f"scripts_{tab}").script("ToMe").controls
    assert set(found) <= set(host.demo.blocks.values())
    return dict(zip([c.elem_id.split("_tome_")[1].removesuffix("-checkbox") for c in found], found, strict=True))


def test_fields_in_the_order_that_programs_rely_on(controls):
    assert list(controls)[: len(FIRST)] == FIRST
    assert list(controls) == ["enabled", *PANEL, *LAST]


def test_every_field_has_its_element(host, tab):
    ids = [component["props"].get("elem_id") for component in host.demo.config["components"]]
    for name in ("enabled", *PANEL, *LAST):
        assert ids.count(f"script_{tab}_tome_{name}") == 1


def test_element_ids_are_unique(host, tab):
    ids = [c["props"].get("elem_id") for c in host.demo.config["components"]]
    ours = [elem_id for elem_id in ids if elem_id and elem_id.startswith(f"script_{tab}_tome")]
    assert len(ours) == len(set(ours)) > len(PANEL)


def test_ranges_and_defaults_are_the_field_lists(controls):
    assert controls["enabled"].value is False
    for name, setting in PANEL.items():
        control = controls[name]
        assert control.value == setting.default
        if setting.kind == "choice":
            assert [choice[1] for choice in control.choices] == [*setting.choices]
        else:
            assert (control.minimum, control.maximum) == (setting.minimum, setting.maximum)
            assert isinstance(control.value, float), "the API casts by this value's type"
    assert controls["ratio"].maximum == controls["late_ratio"].maximum == 0.9375
    assert [(controls[name].minimum, controls[name].value) for name in LAST] == [(0, 0.0), (1, 1.0)]


def test_defaults_of_the_page_are_a_generation(controls, make):
    processed = make([True, *[control.value for control in list(controls.values())[1:]]], steps=1)
    assert "ToMe error" not in processed.extra_generation_params
    assert processed.extra_generation_params["ToMe ratio"] == 0.9375


def test_labels_are_unique_in_the_script(controls):
    """ui-config.json tells controls apart by them."""
    labels = [control.label for control in controls.values()]
    assert all(labels)
    assert len(labels) == len(set(labels))


def test_ui_config_holds_every_control(host, controls, tab):
    from modules import shared

    with open(shared.ui_config_filename, encoding="utf8") as file:
        saved = json.load(file)
    for control in list(controls.values())[1:]:
        assert saved[f"customscript/tome.py/{tab}/{control.label}/value"] == control.value
    assert saved[f"customscript/tome.py/{tab}/{controls['enabled'].label}/value"] is False


def test_the_api_lists_the_script(host, controls, tab):
    listed = TestClient(host.app).get("/sdapi/v1/script-info").json()
    script = next(s for s in listed if s["name"] == "tome" and s["is_img2img"] == (tab == "img2img"))
    assert script["is_alwayson"] is True
    assert [argument["label"] for argument in script["args"]] == [control.label for control in controls.values()]
    ratio = script["args"][1]
    assert (ratio["value"], ratio["minimum"], ratio["maximum"]) == (0.9375, 0.0, 0.9375)


def test_over_http(host, tab):
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
    body = {"prompt": "cat", "steps": 1, "width": 32, "height": 32, "sampler_name": "Euler", "init_images": [picture]}
    body["alwayson_scripts"] = {"tome": {"args": [True, 0.5]}}
    reply = TestClient(host.app).post(f"/sdapi/v1/{tab}", json=body)
    assert reply.status_code == 200, reply.text
    info = json.loads(reply.json()["info"])
    assert info["extra_generation_params"]["ToMe ratio"] == 0.5
    assert "ToMe ratio: 0.5" in info["infotexts"][0]


def test_every_key_belongs_to_one_field(tab):
    assert len(KEYS) == len(set(KEYS)) == len(PANEL)
