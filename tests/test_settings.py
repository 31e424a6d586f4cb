import dataclasses
import math

import pytest

import tomesd_core as tome
from tomesd_core.settings import FIELDS, max_ratio

NOT_A_NUMBER = [math.nan, math.inf, -math.inf, True, False, "abc", "0.5", None, [0.5], 1j]


def error_of(**values):
    with pytest.raises(tome.SettingsError) as caught:
        tome.MergeSettings(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 0.9}, "ratio must lie in [0, 0.75] for a 2×2 stride, got 0.9"),
        ({"ratio": 1.5}, "ratio must lie in [0, 0.75] for a 2×2 stride, got 1.5"),
        ({"ratio": -0.1}, "ratio must lie in [0, 0.75] for a 2×2 stride, got -0.1"),
        ({"ratio": 0.7, "stride": (1, 3)}, "ratio must lie in [0, 0.666667] for a 1×3 stride, got 0.7"),
        (
            {"ratio": 0.6, "partition": "alternating"},
            "ratio must lie in [0, 0.5] for the alternating partition, got 0.6",
        ),
        (
            {"late_ratio": 0.8, "schedule": "linear"},
            "late_ratio must lie in [0, 0.75] for a 2×2 stride, got 0.8",
        ),
        ({"late_ratio": 1.1, "schedule": "constant"}, "late_ratio must lie in [0, 1], got 1.1"),
        ({"schedule": "cosine"}, "schedule must be one of constant, linear, step, got 'cosine'"),
        ({"schedule": None}, "schedule must be one of constant, linear, step, got None"),
        ({"switch_at": 2}, "switch_at must lie in [0, 1], got 2"),
        ({"switch_at": -0.5}, "switch_at must lie in [0, 1], got -0.5"),
        ({"max_downsample": 3}, "max_downsample must be one of 1, 2, 4, 8, got 3"),
        ({"max_downsample": True}, "max_downsample must be one of 1, 2, 4, 8, got True"),
        ({"max_downsample": "1"}, "max_downsample must be one of 1, 2, 4, 8, got '1'"),
        ({"max_downsample": math.nan}, "max_downsample must be one of 1, 2, 4, 8, got nan"),
        ({"min_tokens": -1}, "min_tokens must lie in [0, 65536], got -1"),
        ({"min_tokens": 65537}, "min_tokens must lie in [0, 65536], got 65537"),
        ({"min_tokens": 0.5}, "min_tokens must be an integer in [0, 65536], got 0.5"),
        ({"apply_to": "third pass"}, "apply_to must be one of both passes, first pass, hires pass, got 'third pass'"),
        ({"stride": 2}, "stride must be two integers in [1, 16], got 2"),
        ({"stride": (2,)}, "stride must be two integers in [1, 16], got (2,)"),
        ({"stride": (0, 2)}, "stride must lie in [1, 16], got 0"),
        ({"stride": (2, 17)}, "stride must lie in [1, 16], got 17"),
        ({"stride": (2, 1.5)}, "stride must be an integer in [1, 16], got 1.5"),
        ({"stride": ("2", 2)}, "stride must be an integer in [1, 16], got '2'"),
        ({"stride": None}, "stride must be two integers in [1, 16], got None"),
        ({"partition": "best"}, "partition must be one of random, corner, uniform, alternating, got 'best'"),
        ({"window": 0}, "window must lie in [1, 4096], got 0"),
        ({"window": 2.5}, "window must be an integer in [1, 4096], got 2.5"),
        ({"shared_draw": 1}, "shared_draw must be true or false, got 1"),
        ({"shared_draw": None}, "shared_draw must be true or false, got None"),
        ({"shared_draw": "yes"}, "shared_draw must be true or false, got 'yes'"),
    ],
)
def test_a_wrong_value_names_the_setting_the_value_and_the_range(values, message):
    assert error_of(**values) == message


@pytest.mark.parametrize("name", ["ratio", "late_ratio", "switch_at", "min_tokens"])
@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=repr)
def test_what_is_no_number_is_refused_with_name_value_and_range(name, value):
    message = error_of(**{name: value})
    assert message.startswith(f"{name} must ")
    assert message.endswith(f", got {value!r}")
    assert " in [0, " in message


@pytest.mark.parametrize("name", [name for name, setting in FIELDS.items() if setting.kind == "choice"])
@pytest.mark.parametrize("value", [math.nan, None, True, False, "", "nothing", [], {}, 1j], ids=repr)
def test_what_is_no_choice_is_refused_with_name_value_and_choices(name, value):
    message = error_of(**{name: value})
    assert message.startswith(f"{name} must be one of {FIELDS[name].choices[0]}, ")
    assert message.endswith(f", got {value!r}")


@pytest.mark.parametrize("name", ["ratio", "late_ratio", "switch_at", "min_tokens", "window"])
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "minus huge"])
def test_an_integer_too_large_for_a_float_is_refused_like_any_other(name, value):
    """JSON knows no largest integer."""
    assert name in error_of(**{name: value})


def test_a_settings_error_is_a_value_error():
    assert issubclass(tome.SettingsError, ValueError)


def test_integral_floats_are_integers_and_integers_are_numbers():
    settings = tome.MergeSettings(min_tokens=256.0, max_downsample=2.0, stride=[2.0, 3.0], window=16.0, switch_at=1)
    assert settings == tome.MergeSettings(min_tokens=256, max_downsample=2, stride=(2, 3), window=16, switch_at=1.0)
    assert all(type(value) is int for value in (settings.min_tokens, settings.max_downsample, settings.window))
    assert all(type(side) is int for side in settings.stride)
    assert type(settings.switch_at) is float


@pytest.mark.parametrize("name", [name for name, setting in FIELDS.items() if setting.kind in ("number", "integer")])
def test_both_ends_of_a_range_are_in_it(name):
    setting = FIELDS[name]
    assert getattr(tome.MergeSettings(**{name: setting.minimum}), name) == setting.minimum
    assert getattr(tome.MergeSettings(**{name: setting.maximum}), name) == setting.maximum


def test_no_window_is_the_whole_image():
    assert tome.MergeSettings(window=None).window is None


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
    settings = tome.MergeSettings(ratio=highest, late_ratio=highest, stride=stride, partition=partition)
    assert (settings.ratio, settings.late_ratio) == (highest, highest)
    with pytest.raises(tome.SettingsError, match=r"^ratio must lie in"):
        tome.MergeSettings(ratio=highest + 1e-6, stride=stride, partition=partition)
    with pytest.raises(tome.SettingsError, match=r"^late_ratio must lie in"):
        tome.MergeSettings(
            ratio=highest, late_ratio=highest + 1e-6, schedule="linear", stride=stride, partition=partition
        )


def test_a_late_ratio_that_is_never_reached_may_be_any():
    assert tome.MergeSettings(ratio=0, late_ratio=0.2, schedule="constant", stride=(1, 1)).late_ratio == 0.2


def test_from_mapping_fills_in_the_defaults():
    assert tome.MergeSettings.from_mapping({}) == tome.MergeSettings()
    values = {"ratio": 0.3, "schedule": "step", "window": None, "stride": [2, 4]}
    assert tome.MergeSettings.from_mapping(values) == tome.MergeSettings(
        ratio=0.3, schedule="step", window=None, stride=(2, 4)
    )


def test_from_mapping_refuses_unknown_names_and_says_which_there_are():
    with pytest.raises(tome.SettingsError, match=r"^unknown setting strength, 5: the settings are ratio, late_ratio, "):
        tome.MergeSettings.from_mapping({"strength": 1, "ratio": 0.5, 5: 5})


def test_from_mapping_refuses_wrong_values():
    with pytest.raises(tome.SettingsError, match=r"^ratio must be a number in"):
        tome.MergeSettings.from_mapping({"ratio": None})


def test_the_field_list_has_every_field_in_order():
    assert list(FIELDS) == [field.name for field in dataclasses.fields(tome.MergeSettings)]
    assert all(setting.label and setting.help for setting in FIELDS.values())


def test_the_defaults_are_the_fields_own_and_valid():
    settings = tome.MergeSettings()
    assert {name: getattr(settings, name) for name in FIELDS} == {name: field.default for name, field in FIELDS.items()}


def test_the_panels_fields_and_their_infotext_keys():
    keys = [(name, setting.infotext) for name, setting in FIELDS.items() if setting.infotext]
    assert keys[:7] == [
        ("ratio", "ToMe ratio"),
        ("late_ratio", "ToMe late ratio"),
        ("schedule", "ToMe schedule"),
        ("switch_at", "ToMe switch at"),
        ("max_downsample", "ToMe max downsample"),
        ("min_tokens", "ToMe min tokens"),
        ("apply_to", "ToMe apply to"),
    ]


def test_what_match_tokens_can_do_is_an_expert_field_that_the_panel_does_not_show():
    assert all(FIELDS[name].infotext is None for name in ("stride", "partition", "window", "shared_draw"))


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tome.MergeSettings().ratio = 0.1
