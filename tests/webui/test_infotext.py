"""From a picture's parameters back to the panel, by "Send to" and by the API's `infotext`."""

from __future__ import annotations

import pytest
from in_host import HIRES, KEYS

from tomesd_core.settings import BEFORE_NAMED, PANEL_FIELDS
from tomesd_core.webui.arguments import CONTROLS, MAP_FIELDS, shown

DEFAULTS = {name: shown(name, setting.default) for name, setting in PANEL_FIELDS.items()}
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
"""For every field a value that isn't its default."""


@pytest.fixture
def pasted(host):
    """Each field's value on a tab, from the dict of WebUI's parser.

    WebUI casts it by the type of the control's value without catching errors, so the cast must
    change nothing.
    """
    from modules import scripts

    def all_fields(parsed, tab="txt2img"):
        runner = getattr(scripts, f"scripts_{tab}")
        every_name = dict(zip(runner.script("ToMe").controls, CONTROLS, strict=True))
        # The merge map's fields are in no picture's parameters.
        names = {control: name for control, name in every_name.items() if name not in MAP_FIELDS}
        values = {names[control]: function(parsed) for control, function in runner.infotext_fields}
        for control, name in names.items():
            kind = type(control.value)
            assert isinstance(values[name], kind) or kind(values[name]) == values[name]
        return values

    return all_fields


def parsed(**values):
    """What WebUI reads from the infotext that it writes."""
    from modules import infotext_utils

    pairs = {"Steps": 1, "Sampler": "Euler", "CFG scale": 7.0, "Seed": 1}
    pairs |= {PANEL_FIELDS[name].infotext: value for name, value in values.items()}
    text = ", ".join(f"{key}: {infotext_utils.quote(value)}" for key, value in pairs.items())
    return infotext_utils.parse_generation_parameters(f"cat\n{text}")


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_an_absent_key_is_the_default_and_switches_off(pasted, tab):
    assert pasted({}, tab) == pasted(parsed(), tab) == {"enabled": False, **DEFAULTS}


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_every_field_comes_back_typed(pasted, tab):
    values = pasted(parsed(**VALUES), tab)
    assert values == {"enabled": True, **VALUES}
    assert not [name for name, default in DEFAULTS.items() if values[name] == default]
    assert all(type(values[name]) is type(value) for name, value in VALUES.items())


@pytest.mark.parametrize("name", PANEL_FIELDS)
def test_a_field_alone_leaves_the_others_at_their_defaults(pasted, name):
    values = pasted(parsed(**{name: VALUES[name]}))
    others = DEFAULTS | (BEFORE_NAMED if name == "ratio" else {})
    assert values == {"enabled": name == "ratio", **others, name: VALUES[name]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", "abc"),
        ("ratio", "nan"),
        ("schedule", "zigzag"),
        ("max_downsample", "3"),
        ("min_tokens", "1.5"),
        ("min_tokens", "9" * 5000),
    ],
)
def test_a_wrong_value_gives_the_default_and_is_logged(pasted, log_lines, name, value):
    key = PANEL_FIELDS[name].infotext
    assert pasted({key: value})[name] == DEFAULTS[name]
    (line,) = log_lines
    assert key in line


def test_values_that_webui_split_or_that_are_no_texts_give_defaults(pasted, log_lines):
    for value in (None, 8, ["0.5"], {}):
        assert pasted({"ToMe schedule": value})["schedule"] == "constant"
    assert len(log_lines) == 4
    assert pasted({"ToMe ratio-1": "8", "ToMe ratio-2": "8"})["enabled"] is False


def test_sending_a_picture_between_the_tabs_takes_all_fields(host):
    from modules import scripts

    for runner in (scripts.scripts_txt2img, scripts.scripts_img2img):
        assert runner.script("ToMe").paste_field_names == KEYS


def test_a_picture_made_again_from_its_parameters_is_the_same(make, pasted):
    from modules import infotext_utils

    values, fields = {**VALUES, "ratio": 0.6, "max_downsample": "1"}, {**HIRES, "steps": 4}
    first = make([values], **fields)
    read = pasted(infotext_utils.parse_generation_parameters(first.infotexts[0]))
    assert read == {"enabled": True, **values}
    arguments = list(read.values())
    again = make([*arguments[:-1], 0, 1, arguments[-1]], **fields)
    assert again.images[0].tobytes() == first.images[0].tobytes()
    assert again.infotexts == first.infotexts
