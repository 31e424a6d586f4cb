"""The script's arguments: lists, objects, presets, and wrong values."""

from __future__ import annotations

import math

import pytest
from in_host import (
    FULL,
    HALVED,
    HIRES,
    HIRES_TOKENS,
    SIDE,
    arguments,
    keys_of,
    pixels,
)
from PIL import Image

from tomesd_core.settings import FIELDS, SettingsError
from tomesd_core.webui.arguments import read_arguments


@pytest.mark.parametrize(
    ("tome", "words"),
    [
        ([True, 1.5], ["ratio", "1.5", "[0, 0.9375]"]),
        ([True, "abc"], ["ratio", "'abc'", "[0, 0.9375]"]),
        ([True, math.nan], ["ratio", "nan", "[0, 0.9375]"]),
        ([True, 10**400], ["ratio", "inf", "[0, 0.9375]"]),
        ([True, [0.5]], ["ratio", "[0.5]", "[0, 0.9375]"]),
        ([True, {"ratio": {}}], ["ratio", "{}"]),
        (arguments(late=2, schedule="linear"), ["late_ratio", "2", "[0, 0.9375]"]),
        (arguments(schedule="zigzag"), ["schedule", "'zigzag'", "constant, linear, step"]),
        (arguments(schedule=["step"]), ["schedule", "['step']", "constant, linear, step"]),
        (arguments(switch_at=-1), ["switch_at", "-1", "[0, 1]"]),
        (arguments(level=3), ["max_downsample", "3", "1, 2, 4, 8"]),
        (arguments(least=-1), ["min_tokens", "-1", "[0, 65536]"]),
        (
            arguments(apply_to="no pass"),
            ["apply_to", "'no pass'", "both passes, first pass, hires pass"],
        ),
        (["yes"], ["enabled", "'yes'", "true or false"]),
        ([1, 0.5], ["enabled", "1", "true or false"]),
        ([{"ratio": 2}], ["ratio", "2", "[0, 0.9375]"]),
        ([{"rato": 0.5}], ["unknown setting", "'rato'", "late_ratio"]),
        ([{"stride": [2, 2]}], ["unknown setting", "'stride'"]),
        ([{"enabled": "yes"}], ["enabled", "'yes'", "true or false"]),
        ([{"preset": "No such"}], ["preset", "No such", "Balanced"]),
        ([{"preset": ["Fast"]}], ["preset", "['Fast']"]),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_wrong_value_is_named_with_its_setting_and_what_is_allowed(tome, words):
    with pytest.raises(SettingsError) as caught:
        read_arguments(tome)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("tome", [[True, 1.5], ["yes"], [{"rato": 0.5}], [{"preset": "No such"}]])
@pytest.mark.parametrize("tab", ["txt2img", "img2img", "hires fix"])
def test_a_wrong_value_leaves_the_picture_unmerged(make, log_lines, attention, tome, tab):
    fields = {"init_images": [Image.new("RGB", (SIDE, SIDE))]} if tab == "img2img" else {}
    fields |= HIRES if tab == "hires fix" else {}
    where = "img2img" if tab == "img2img" else "txt2img"
    plain = make(None, where, steps=1, **fields)
    processed = make(tome, where, steps=1, **fields)
    assert pixels(processed) == pixels(plain)
    assert set(attention.tokens) <= {FULL, HIRES_TOKENS}
    ((key, error),) = keys_of(processed).items()
    assert key == "ToMe error"
    assert error in processed.comments and [error in line for line in log_lines] == [True]


@pytest.mark.parametrize(
    "tome",
    [
        [True, 0.5, 0, "constant", 1, 1.0, 0.0, "both passes", 1.0, "paper"],
        arguments(late=0.9),
        [*HALVED[:5], "1", *HALVED[6:]],
        [*arguments(), 0, 1, 1, *["too", "many"] * 20],
    ],
    ids=["other types", "a value without effect", "a choice as text", "too many arguments"],
)
def test_equivalent_arguments_make_the_same_picture(make, merged, tome):
    assert pixels(make(tome)) == merged


OF_0_1_0 = [True, 0.6, 0.4, "linear", 0.5, 1, 0, "both passes", 4]


@pytest.mark.parametrize(
    "args", [OF_0_1_0, [*OF_0_1_0, 0, 1], [*OF_0_1_0, 1, 1]], ids=["9", "11", "a map"]
)
def test_a_list_of_version_0_1_0_keeps_its_meaning(make, args):
    """That version had one method, now `paper`, and the map's two numbers last."""
    processed, today = make(args), make([*OF_0_1_0, "paper"])
    assert processed.images[0].tobytes() == today.images[0].tobytes()
    assert keys_of(processed)["ToMe method"] == "paper" and keys_of(processed) == keys_of(today)
    assert len(processed.images) == 1 + (args[9:10] == [1])


@pytest.mark.parametrize("args", [[True], [True, 0.8], [True, 0.8, 0.7, "linear"]], ids=len)
def test_a_shorter_list_has_the_current_defaults(args):
    assert read_arguments(args).settings.method == "keys"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ratio": 0.6},
        {"ratio": 0.6, "late_ratio": 0.3, "preset": None},
        {"ratio": 0.6, "late_ratio": 0.9},
        {"late_ratio": 0.3, "schedule": "constant"},
        {"enabled": True, "min_tokens": 512},
    ],
    ids=str,
)
def test_an_object_switches_on_and_missing_keys_are_defaults(make, given):
    names = [
        "ratio",
        "late_ratio",
        "schedule",
        "max_downsample",
        "reuse_steps",
        "method",
        *(given.keys() & FIELDS),
    ]
    values = {FIELDS[name].infotext: given.get(name, FIELDS[name].default) for name in names}
    # A late ratio alone implies a schedule that reaches it.
    if "late_ratio" in given and "schedule" not in given:
        values["ToMe schedule"] = "linear"
    # A ratio alone never merges more late than early.
    if "late_ratio" not in given:
        values["ToMe late ratio"] = min(values["ToMe ratio"], FIELDS["late_ratio"].default)
    if values["ToMe schedule"] == "constant":
        del values["ToMe late ratio"]
    assert keys_of(make([given], steps=1)) == values


def test_an_object_may_name_a_preset_and_change_it(make):
    preset = keys_of(make([{"preset": "Fast"}], steps=1))
    changed = keys_of(make([{"preset": "Fast", "ratio": 0.6}], steps=1))
    assert changed == {**preset, "ToMe ratio": 0.6}
    late = keys_of(make([{"preset": "Fast", "late_ratio": 0.6}], steps=1))
    assert late == {**preset, "ToMe schedule": "linear", "ToMe late ratio": 0.6}
