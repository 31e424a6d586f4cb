import dataclasses
import math

import pytest

import tomesd_core as tome
from tomesd_core.settings import FIELDS, PANEL_FIELDS, max_ratio

NOT_A_NUMBER = [math.nan, math.inf, -math.inf, True, False, "abc", "0.5", None, [0.5], 1j]
WRONG = {
    "number": NOT_A_NUMBER,
    "integer": NOT_A_NUMBER,
    "choice": [math.nan, None, True, False, "", "nothing", "3", [], {}, 1j],
    "flag": [0, 1, "yes", [], 1j],
}
"""Values of no field of a kind; but a field may be optional."""


def error_of(**values):
    with pytest.raises(tome.SettingsError) as caught:
        tome.MergeSettings(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ratio": 0.95}, ["ratio", "[0, 0.9375]"]),
        ({"ratio": 0.9, "stride": (2, 2)}, ["ratio", "[0, 0.75]", "2×2"]),
        ({"ratio": 0.7, "stride": (1, 3)}, ["ratio", "[0, 0.666667]", "1×3"]),
        ({"ratio": 0.6, "partition": "alternating"}, ["ratio", "[0, 0.5]", "alternating"]),
        (
            {"late_ratio": 0.8, "ratio": 0.5, "schedule": "linear", "stride": (2, 2)},
            ["late_ratio", "[0, 0.75]", "2×2"],
        ),
        ({"late_ratio": 1.1, "schedule": "constant"}, ["late_ratio", "[0, 1]"]),
        ({"schedule": "cosine"}, ["schedule", "constant, linear, step"]),
        ({"max_downsample": 3}, ["max_downsample", "1, 2, 4, 8"]),
        ({"min_tokens": 0.5}, ["min_tokens", "integer", "[0, 65536]"]),
        ({"stride": 2}, ["stride", "two integers", "[1, 16]"]),
        ({"stride": (2,)}, ["stride", "two integers"]),
        ({"stride": "2x2"}, ["stride", "two integers"]),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_setting_and_range(values, words):
    error = error_of(**values)
    assert all(word in error for word in [*words, repr(next(iter(values.values())))])


@pytest.mark.parametrize("side", [0, 17, 1.5, "2"], ids=repr)
def test_a_wrong_side_of_a_stride_is_named(side):
    error = error_of(stride=(2, side))
    assert all(word in error for word in ("stride", "[1, 16]", repr(side)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, setting in FIELDS.items()
        for value in WRONG.get(setting.kind, [])
        if value is not None or not (setting.optional or name in ("late_ratio", "schedule"))
    ],
    ids=repr,
)
def test_a_value_of_another_kind_is_refused_with_what_the_setting_takes(name, value):
    setting, error = FIELDS[name], error_of(**{name: value})
    takes = {"flag": "true or false", "choice": ", ".join(map(str, setting.choices))}
    words = takes.get(setting.kind, f"[{setting.minimum}, ")
    assert all(part in error for part in (name, words, repr(value)))


@pytest.mark.parametrize(
    "name", [name for name, setting in FIELDS.items() if setting.kind in ("number", "integer")]
)
def test_a_range_includes_its_ends_and_nothing_outside(name):
    lowest, highest = FIELDS[name].minimum, FIELDS[name].maximum
    for end, outside in ((lowest, lowest - 1), (highest, highest + 1)):
        assert getattr(tome.MergeSettings(**{name: end}), name) == end
        error = error_of(**{name: outside})
        assert name in error and str(outside) in error
    # JSON has no largest integer, but floats have.
    assert all(name in error_of(**{name: outside}) for outside in (10**5000, -(10**5000)))


@pytest.mark.parametrize("value", [2, "2", 2.0], ids=repr)
def test_a_choice_may_be_its_text(value):
    assert tome.MergeSettings(max_downsample=value).max_downsample == 2
    assert type(tome.MergeSettings(max_downsample=value).max_downsample) is int


def test_a_ratio_alone_never_merges_more_late_than_early():
    assert tome.MergeSettings(ratio=0.5).late_ratio == 0.5
    assert tome.MergeSettings(ratio=0.9).late_ratio == tome.MergeSettings().late_ratio == 0.75
    assert tome.MergeSettings(ratio=0.5, late_ratio=0.9).late_ratio == 0.9


def test_a_late_ratio_alone_is_reached():
    assert tome.MergeSettings().schedule == tome.MergeSettings(ratio=0.5).schedule == "constant"
    assert tome.MergeSettings(late_ratio=0.2).schedule == "linear"
    assert tome.MergeSettings(late_ratio=0.2, schedule="constant").schedule == "constant"


def test_integral_floats_are_integers_and_integers_are_numbers():
    values = {"min_tokens": 256, "max_downsample": 2, "stride": (2, 3), "window": 16}
    floats = {"min_tokens": 256.0, "max_downsample": 2.0, "stride": [2.0, 3.0], "window": 16.0}
    settings = tome.MergeSettings(ratio=0.5, switch_at=1, **floats)
    assert settings == tome.MergeSettings(ratio=0.5, switch_at=1.0, **values)
    whole = settings.min_tokens, settings.max_downsample, settings.window, *settings.stride
    assert {type(value) for value in whole} == {int}
    assert type(settings.switch_at) is float


@pytest.mark.parametrize(
    ("stride", "partition", "highest"),
    [
        ((2, 2), "random", 0.75),
        ((2, 2), "corner", 0.75),
        ((2, 2), "uniform", 0.75),
        ((2, 2), "alternating", 0.5),
        ((4, 4), "alternating", 0.5),
        ((1, 2), "random", 0.5),
        ((2, 4), "corner", 0.875),
        ((4, 4), "random", 0.9375),
        ((1, 1), "random", 0.0),
    ],
)
def test_the_highest_ratio_is_the_share_of_sources(stride, partition, highest):
    assert max_ratio(stride, partition) == highest
    draw = {"stride": stride, "partition": partition}
    settings = tome.MergeSettings(ratio=highest, late_ratio=highest, **draw)
    assert (settings.ratio, settings.late_ratio) == (highest, highest)
    assert error_of(ratio=highest + 1e-6, **draw).startswith("ratio ")
    too_high = {"ratio": highest, "late_ratio": highest + 1e-6, "schedule": "linear"}
    assert error_of(**too_high, **draw).startswith("late_ratio ")


def test_a_late_ratio_that_is_never_reached_may_be_any():
    settings = tome.MergeSettings(ratio=0, late_ratio=0.2, schedule="constant", stride=(1, 1))
    assert settings.late_ratio == 0.2


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        ({"ratio": 0.75, "schedule": "constant"}, (2, 2)),
        ({"ratio": 0.7500001, "schedule": "constant"}, (4, 4)),
        ({"ratio": 0.5, "late_ratio": 0.9, "schedule": "constant"}, (2, 2)),
        ({"ratio": 0.5, "late_ratio": 0.9, "schedule": "linear"}, (4, 4)),
        ({"ratio": 0.9, "late_ratio": 0.5, "schedule": "linear"}, (4, 4)),
        ({"ratio": 0.9, "late_ratio": 0.5, "schedule": "step", "switch_at": 0.0}, (2, 2)),
        ({"ratio": 0.5, "late_ratio": 0.9, "schedule": "step", "switch_at": 1.0}, (4, 4)),
        ({"ratio": 0.5, "schedule": "constant", "stride": (4, 2)}, (4, 2)),
    ],
    ids=str,
)
def test_cells_follow_the_largest_ratio_that_the_schedule_reaches(values, cell):
    assert tome.MergeSettings(**values).cell == cell


@pytest.mark.parametrize("schedule", FIELDS["schedule"].choices)
@pytest.mark.parametrize("name", ["ratio", "late_ratio"])
def test_every_position_of_the_ratio_sliders_is_valid(schedule, name):
    setting = FIELDS[name]
    steps = round((setting.maximum - setting.minimum) / setting.step)
    assert setting.minimum + steps * setting.step == setting.maximum
    for value in (step * setting.step for step in range(steps + 1)):
        settings = tome.MergeSettings(**{name: value, "schedule": schedule})
        assert getattr(settings, name) == value


def test_the_method_paper_redraws_by_default_and_the_others_do_not():
    for method in FIELDS["method"].choices:
        assert tome.MergeSettings(method=method).redraws == (method == "paper")
    assert tome.MergeSettings(method="keys", redraw=True).redraws
    assert not tome.MergeSettings(method="paper", redraw=False).redraws


def test_the_field_list_has_every_field_in_order_with_its_default():
    values = dataclasses.asdict(tome.MergeSettings())
    assert list(values.items()) == [(name, field.default) for name, field in FIELDS.items()]
    assert all(setting.label and setting.help for setting in PANEL_FIELDS.values())


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tome.MergeSettings().ratio = 0.1


@pytest.mark.parametrize(
    ("steps", "ratio"), [(None, 0.85), (150, 0.85), (20, 0.85), (10, 0.762), (4, 0.561), (1, 0.0)]
)
def test_pictures_of_few_steps_keep_more_tokens(steps, ratio):
    settings = tome.MergeSettings(ratio=0.85, late_ratio=0.6, schedule="linear").in_steps(steps)
    assert settings.ratio == pytest.approx(ratio, abs=1e-3)
    assert settings.late_ratio == pytest.approx(max(0.0, 1 - 0.4 * (1 - ratio) / 0.15), abs=1e-2)
    assert settings.in_steps(steps) == settings
    assert settings.cell == ((4, 4) if ratio > 0.75 else (2, 2))


def test_full_steps_of_1_keep_the_ratio():
    settings = tome.MergeSettings(full_steps=1)
    assert settings.in_steps(1) is settings.in_steps(4) is settings
