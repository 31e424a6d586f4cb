"""Arbitrary values in arguments, parameters and presets: reported, and nothing else is raised."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomesd_core.settings import PANEL_FIELDS, SettingsError
from tomesd_core.webui import presets
from tomesd_core.webui.arguments import CONTROLS, from_text, paste_fields, read_arguments, shown

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = (
    PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)
)
BY_NAME = st.dictionaries(
    st.sampled_from([*CONTROLS, "preset", "x"]), ANYTHING, min_size=1, max_size=3
)


def many(count):
    checks = [HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks
    )


@pytest.mark.usefixtures("presets_path")
@many(400)
@given(
    st.lists(ANYTHING, max_size=14).map(lambda args: [True, *args])
    | BY_NAME.map(lambda named: [named])
)
def test_arguments(args):
    try:
        result = read_arguments(args)
    except SettingsError as error:
        message = str(error)
        assert "unknown setting" in message or (
            "got" in message and any(name in message for name in (*CONTROLS, "preset"))
        )
    else:
        for name, setting in PANEL_FIELDS.items():
            value = getattr(result.settings, name)
            # A late ratio that is never reached may be 1.
            assert value in setting.choices or setting.minimum <= value <= max(setting.maximum, 1)


@many(300)
@given(
    st.dictionaries(
        st.sampled_from([setting.infotext for setting in PANEL_FIELDS.values()]),
        ANYTHING,
        min_size=1,
    )
)
def test_parameters(log_lines, parameters):
    log_lines.clear()
    for name, value_of in paste_fields({name: name for name in PANEL_FIELDS}):
        setting, logged = PANEL_FIELDS[name], len(log_lines)
        value = value_of(parameters)
        assert shown(name, setting.check(name, value)) == value
        if (
            value == shown(name, setting.default)
            and setting.infotext in parameters
            and len(log_lines) == logged
        ):
            text = parameters[setting.infotext]
            assert shown(name, setting.check(name, from_text(setting, text))) == value, (
                "its own default"
            )


@many(150)
@given(BY_NAME | ANYTHING, st.text(max_size=5))
def test_a_presets_file(presets_path, entry, name):
    presets_path.write_text(
        json.dumps({"version": 1, "presets": {name: entry, "kept": {"ratio": 0.25}}}),
        encoding="utf-8",
    )
    usable, messages = presets.read()
    assert {*presets.BUILT_IN, "kept"} <= set(usable)
    assert bool(messages) == (len(usable) == len(presets.BUILT_IN) + 1 and name != "kept")
