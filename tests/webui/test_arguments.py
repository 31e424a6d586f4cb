"""The script's arguments: lists, objects, presets, and wrong values."""

from __future__ import annotations

import dataclasses

import pytest
from in_host import FULL, HIRES, HIRES_TOKENS, SIDE, arguments, keys_of, pixels
from PIL import Image

from tomesd_core.settings import MergeSettings, SettingsError
from tomesd_core.webui import presets
from tomesd_core.webui.arguments import read_arguments


@pytest.mark.parametrize(
    ("tome", "words"),
    [
        ([True, 1.5], ["ratio", "1.5", "[0, 0.9375]"]),
        ([True, {"ratio": {}}], ["ratio", "{}"]),
        (arguments(apply_to="no pass"), ["apply_to", "'no pass'", "both passes, first pass"]),
        (["yes"], ["enabled", "'yes'", "true or false"]),
        ([{"enabled": "yes"}], ["enabled", "'yes'", "true or false"]),
        ([{"stride": [2, 2]}], ["unknown", "'stride'", "late_ratio", "map_step", "map_layer"]),
        ([{"map_step": -1}], ["map_step", "-1", "[0, 150]"]),
        ([{"map_step": 1.5}], ["map_step", "1.5", "[0, 150]"]),
        ([True, *[None] * 10, 0], ["map_layer", "0", "[1, 70]"]),
        ([{"map_step": 0, "map_layer": True}], ["map_layer", "True", "[1, 70]"]),
        ([{"preset": "No such"}], ["preset", "No such", "Balanced"]),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_wrong_value_is_named_with_its_setting_and_range(tome, words):
    with pytest.raises(SettingsError) as caught:
        read_arguments(tome)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("tome", "tab", "fields"),
    [
        ([True, 1.5], "txt2img", {}),
        (["yes"], "img2img", {"init_images": [Image.new("RGB", (SIDE, SIDE))]}),
        ([{"rato": 0.5}], "txt2img", HIRES),
    ],
    ids=["ratio", "switch, img2img", "name, hires fix"],
)
def test_a_wrong_value_leaves_the_picture_unmerged(make, log_lines, attention, tome, tab, fields):
    plain = make(None, tab, steps=1, **fields)
    processed = make(tome, tab, steps=1, **fields)
    assert pixels(processed) == pixels(plain)
    assert set(attention.tokens) <= {FULL, HIRES_TOKENS}
    ((key, error),) = keys_of(processed).items()
    assert key == "ToMe error"
    assert error in processed.comments and [error in line for line in log_lines] == [True]


@pytest.mark.parametrize(
    "tome",
    [
        [True, 0.5, 0, "constant", 1, 1.0, 0.0, "both passes", 1.0, "paper"],
        [*arguments(late=0.9, level="1"), 0, 1, 1, *["too", "many"] * 20],
    ],
    ids=["other types", "a choice as text and too many arguments"],
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
        {"ratio": 0.6, "late_ratio": 0.9},
        {"late_ratio": 0.3, "schedule": "constant", "method": "tokens"},
    ],
    ids=str,
)
def test_an_object_switches_on_and_missing_fields_are_defaults(given):
    for named in (given, {**given, "preset": None}, {**given, "enabled": True}):
        asked = read_arguments([named])
        assert asked.enabled and asked.settings == MergeSettings(**given)


def test_an_object_may_name_a_preset_and_change_it():
    fast = presets.get("Fast")
    assert read_arguments([{"preset": "Fast"}]).settings == fast
    changed = read_arguments([{"preset": "Fast", "ratio": 0.6}]).settings
    assert changed == dataclasses.replace(fast, ratio=0.6, late_ratio=changed.late_ratio)
    late = read_arguments([{"preset": "Fast", "late_ratio": 0.6}]).settings
    assert late == dataclasses.replace(fast, late_ratio=0.6, schedule="linear")
