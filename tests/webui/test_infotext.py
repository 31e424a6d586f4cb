"""A picture's parameters back into the panel: by "Send to", and by the API's `infotext`."""

from __future__ import annotations

import pytest
from in_host import KEYS, left

from tomesd_core.settings import BEFORE_NAMED, FIELDS
from tomesd_core.webui.arguments import CONTROLS, MAP_FIELDS, shown

PANEL = {name: setting for name, setting in FIELDS.items() if setting.infotext}

VALUES = {
    "ratio": 0.3,
    "late_ratio": 0.15,
    "schedule": "step",
    "switch_at": 0.25,
    "max_downsample": "2",
    "min_tokens": 1024,
    "apply_to": "hires pass",
    "reuse_steps": 3,
    "method": "tokens",
    "full_steps": 4,
}
"""None is its field's default."""


@pytest.fixture
def pasted(host):
    """What each field becomes on a tab, from a dict of texts as WebUI's parser makes it.

    WebUI casts it by the type of the control's value, and doesn't catch what that raises: no cast
    may change it.
    """
    from modules import scripts

    def all_fields(parsed, tab="txt2img"):
        runner = getattr(scripts, f"scripts_{tab}")
        every_name = dict(zip(runner.script("ToMe").controls, CONTROLS, strict=True))
        # The merge map's are in no picture's parameters.
        names = {control: name for control, name in every_name.items() if name not in MAP_FIELDS}
        values = {names[control]: function(parsed) for control, function in runner.infotext_fields}
        for control, name in names.items():
            kind = type(control.value)
            assert isinstance(values[name], kind) or kind(values[name]) == values[name]
        return values

    return all_fields


def text(**values):
    """An infotext as WebUI writes it."""
    from modules import infotext_utils

    pairs = {"Steps": 1, "Sampler": "Euler", "CFG scale": 7.0, "Seed": 1}
    pairs |= {PANEL[name].infotext: value for name, value in values.items()}
    return "cat\n" + ", ".join(
        f"{key}: {infotext_utils.quote(value)}" for key, value in pairs.items()
    )


def parsed(**values):
    from modules import infotext_utils

    return infotext_utils.parse_generation_parameters(text(**values))


def test_the_values_of_this_test_are_no_defaults():
    assert set(VALUES) == set(PANEL)
    assert all(VALUES[name] != setting.default for name, setting in PANEL.items())


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_an_absent_key_is_the_default_and_switches_off(pasted, tab):
    expected = {
        "enabled": False,
        **{name: shown(name, setting.default) for name, setting in PANEL.items()},
    }
    assert pasted({}, tab) == pasted(parsed(), tab) == expected


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_every_field_comes_back_typed(pasted, tab):
    values = pasted(parsed(**VALUES), tab)
    assert values == {"enabled": True, **VALUES}
    types = {name: type(value) for name, value in values.items() if name in VALUES}
    assert types == {name: type(value) for name, value in VALUES.items()}


@pytest.mark.parametrize("name", PANEL)
def test_a_field_alone_leaves_the_others_at_their_defaults(pasted, name):
    values = pasted(parsed(**{name: VALUES[name]}))
    defaults = {field: shown(field, setting.default) for field, setting in PANEL.items()}
    if name == "ratio":
        defaults |= BEFORE_NAMED
    assert values == {"enabled": name == "ratio", **defaults, name: VALUES[name]}


def test_a_picture_gives_back_what_it_was_made_with(make, pasted):
    from modules import infotext_utils

    values = {**VALUES, "ratio": 0.6, "max_downsample": "1"}
    processed = make([values], enable_hr=True, hr_scale=1.25, steps=4)
    from_text = pasted(infotext_utils.parse_generation_parameters(processed.infotexts[0]))
    assert from_text == {"enabled": True, **values}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", "abc"),
        ("ratio", "nan"),
        ("ratio", "1e999"),
        ("schedule", "zigzag"),
        ("max_downsample", "3"),
        ("max_downsample", "True"),
        ("min_tokens", "1.5"),
        ("min_tokens", "9" * 400),
        ("min_tokens", "9" * 5000),
    ],
)
def test_a_wrong_value_is_the_default_and_logged(pasted, log_lines, name, value):
    values = pasted({PANEL[name].infotext: value})
    assert values[name] == shown(name, PANEL[name].default)
    assert len(log_lines) == 1
    assert PANEL[name].infotext in log_lines[0]


def test_values_that_a_webui_split_or_that_are_no_texts_are_defaults(pasted, log_lines):
    for value in (None, 8, ["0.5"], {}):
        assert pasted({"ToMe schedule": value})["schedule"] == "constant"
    assert len(log_lines) == 4
    assert pasted({"ToMe ratio-1": "8", "ToMe ratio-2": "8"})["enabled"] is False


def test_sending_a_picture_between_the_tabs_takes_all_fields(host):
    from modules import scripts

    for runner in (scripts.scripts_txt2img, scripts.scripts_img2img):
        assert runner.script("ToMe").paste_field_names == KEYS


def test_a_picture_made_anew_from_its_infotext_is_the_same(make, pasted):
    """By "Send to", or by the API's `infotext`."""
    from modules import infotext_utils

    first = make([True, 0.6, 0.1, "linear"], steps=3)
    again = make(
        [*pasted(infotext_utils.parse_generation_parameters(first.infotexts[0])).values()], steps=3
    )
    assert again.images[0].tobytes() == first.images[0].tobytes()
    assert again.infotexts == first.infotexts


@pytest.mark.parametrize(
    "values", [{"ratio": "abc"}, {"ratio": 0.6, "min_tokens": "0.5"}, {"ratio": "False"}]
)
def test_a_wrong_infotext_still_makes_a_merged_picture(make, pasted, attention, values):
    processed = make([*pasted(parsed(**values)).values()], steps=1)
    assert attention.tokens == [
        left(values["ratio"] if "min_tokens" in values else PANEL["ratio"].default)
    ]
    assert "ToMe error" not in processed.extra_generation_params
