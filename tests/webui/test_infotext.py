"""A picture's parameters back into the panel: by "Send to", and by the API's `infotext`."""

from __future__ import annotations

import pytest
from in_host import KEYS, SIDE, left

from tomesd_core.settings import FIELDS

PANEL = {name: setting for name, setting in FIELDS.items() if setting.infotext}

VALUES = {
    "ratio": 0.3,
    "late_ratio": 0.15,
    "schedule": "step",
    "switch_at": 0.25,
    "max_downsample": 2,
    "min_tokens": 1024,
    "apply_to": "hires pass",
    "reuse_steps": 3,
    "method": "tokens",
}
"""None is its field's default."""


@pytest.fixture
def read(host):
    """What each field becomes on a tab, from a dict of texts as WebUI's parser makes it."""
    from modules import infotext_utils, scripts

    def all_fields(parsed, tab="txt2img"):
        controls = getattr(scripts, f"scripts_{tab}").script("ToMe").controls
        # The last two are the merge map's, which is in no picture's parameters.
        names = dict(zip(controls[:-2], ["enabled", *PANEL], strict=True))
        pairs = infotext_utils.paste_fields[tab]["fields"]
        return {names[control]: function(parsed) for control, function in pairs if control in names}

    return all_fields


def text(**values):
    """An infotext as WebUI writes it."""
    from modules import infotext_utils

    pairs = {"Steps": 1, "Sampler": "Euler", "CFG scale": 7.0, "Seed": 1}
    pairs |= {PANEL[name].infotext: value for name, value in values.items()}
    return "cat\n" + ", ".join(f"{key}: {infotext_utils.quote(value)}" for key, value in pairs.items())


def parsed(**values):
    from modules import infotext_utils

    return infotext_utils.parse_generation_parameters(text(**values))


def test_the_values_of_this_test_are_no_defaults():
    assert set(VALUES) == set(PANEL)
    assert all(VALUES[name] != setting.default for name, setting in PANEL.items())


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_an_absent_key_is_the_default_and_switches_off(read, tab):
    expected = {"enabled": False, **{name: setting.default for name, setting in PANEL.items()}}
    assert read({}, tab) == read(parsed(), tab) == expected


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_every_field_comes_back_typed(read, tab):
    found = read(parsed(**VALUES), tab)
    assert found == {"enabled": True, **VALUES}
    types = {name: type(value) for name, value in found.items() if name in VALUES}
    assert types == {name: type(value) for name, value in VALUES.items()}


@pytest.mark.parametrize("name", PANEL)
def test_a_field_alone_leaves_the_others_at_their_defaults(read, name):
    found = read(parsed(**{name: VALUES[name]}))
    defaults = {field: setting.default for field, setting in PANEL.items()}
    assert found == {"enabled": name == "ratio", **defaults, name: VALUES[name]}


def test_a_picture_gives_back_what_it_was_made_with(make, read):
    from modules import infotext_utils

    values = {**VALUES, "ratio": 0.6, "max_downsample": 1}
    processed = make([True, *values.values()], enable_hr=True, hr_scale=1.25, steps=1)
    found = read(infotext_utils.parse_generation_parameters(processed.infotexts[0]))
    assert found == {"enabled": True, **values}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", "abc"),
        ("ratio", "1.5"),
        ("ratio", "nan"),
        ("ratio", ""),
        ("ratio", "1e999"),
        ("late_ratio", "-1"),
        ("schedule", "zigzag"),
        ("schedule", "1"),
        ("switch_at", "2"),
        ("max_downsample", "3"),
        ("max_downsample", "True"),
        ("min_tokens", "1.5"),
        ("min_tokens", "-5"),
        ("min_tokens", "9" * 400),
        ("min_tokens", "9" * 5000),
        ("apply_to", "no pass"),
    ],
)
def test_a_wrong_value_is_the_default_and_logged(read, log_lines, name, value):
    found = read({PANEL[name].infotext: value})
    assert found[name] == PANEL[name].default
    assert len(log_lines) == 1
    assert PANEL[name].infotext in log_lines[0]


def test_values_that_a_webui_split_or_that_are_no_texts_are_defaults(read, log_lines):
    for value in (None, 8, ["0.5"], {}):
        assert read({"ToMe schedule": value})["schedule"] == "linear"
    assert len(log_lines) == 4
    assert read({"ToMe ratio-1": "8", "ToMe ratio-2": "8"})["enabled"] is False


def test_sending_a_picture_between_the_tabs_takes_all_fields(host):
    from modules import scripts

    for runner in (scripts.scripts_txt2img, scripts.scripts_img2img):
        assert [key for key in runner.paste_field_names if key.startswith("ToMe")] == KEYS


# On the page


@pytest.fixture
def paste(host):
    """What "Send to" does with an infotext, without the browser: the values of our controls afterwards."""
    from modules import scripts

    def run(infotext, tab):
        button = next(b for b in host.demo.blocks.values() if getattr(b, "elem_id", None) == f"{tab}_tab")
        bound = [d for d in host.demo.dependencies if button._id in d["targets"] and len(d["outputs"]) > 5]
        updates = host.demo.fns[host.demo.dependencies.index(bound[0])].fn(infotext)
        found = dict(zip(bound[0]["outputs"], updates, strict=True))
        controls = getattr(scripts, f"scripts_{tab}").script("ToMe").controls
        pairs = [c for c in host.demo.blocks.values() if c.elem_id and c.elem_id.startswith(f"script_{tab}_tome_")]
        assert {c.elem_id for c in controls} <= {c.elem_id for c in pairs}
        shown = {c.elem_id: found[c._id]["value"] for c in pairs if c._id in found}
        start = f"script_{tab}_tome_"
        return {elem_id.removeprefix(start).removesuffix("-checkbox"): value for elem_id, value in shown.items()}

    return run


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_send_to_sets_every_control(paste, tab):
    assert paste(text(**VALUES), tab) == {"enabled": True, **VALUES}
    defaults = {name: setting.default for name, setting in PANEL.items()}
    assert paste(text(), tab) == {"enabled": False, **defaults}
    assert paste(text(ratio="abc", schedule="zigzag"), tab) == {"enabled": True, **defaults}


# Over the API


def test_the_apis_infotext_sets_the_arguments(make, attention):
    processed = make(infotext=text(ratio=0.6, late_ratio=0.2, schedule="linear"), steps=2)
    assert attention.tokens == [left(0.6), left(0.2)]
    assert processed.extra_generation_params["ToMe ratio"] == 0.6
    attention.tokens.clear()
    make(infotext=text(), steps=1)
    make(infotext=text(ratio=0.6), tome=[False], steps=1)
    assert attention.tokens == [SIDE * SIDE] * 2


@pytest.mark.parametrize("values", [{"ratio": "abc"}, {"ratio": 0.6, "min_tokens": "0.5"}, {"ratio": "False"}])
def test_the_apis_infotext_may_be_wrong(make, attention, log_lines, values):
    processed = make(infotext=text(**values), steps=1)
    assert attention.tokens == [left(values["ratio"] if "min_tokens" in values else PANEL["ratio"].default)]
    assert "ToMe error" not in processed.extra_generation_params
    assert "is ignored" in log_lines[0]


def test_a_picture_made_anew_from_its_infotext_is_the_same(make):
    first = make([True, 0.6, 0.1, "linear"], steps=3)
    again = make(infotext=first.infotexts[0], steps=3)
    assert again.images[0].tobytes() == first.images[0].tobytes()
    assert again.infotexts == first.infotexts
