import pytest

import tomesd_core as tome
from tomesd_core.schedule import SCHEDULES, progress_of, ratio_at


def test_progress_runs_from_0_at_the_first_step_to_1_at_the_last():
    assert [progress_of(step, 5) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("step", [0, 1, 7])
def test_progress_is_0_for_a_single_step_and_for_an_unknown_total(step):
    assert progress_of(step, 1) == 0
    assert progress_of(step, 0) == 0
    assert progress_of(step, None) == 0


def test_progress_stays_at_1_past_the_total_and_at_0_before_the_first_step():
    assert progress_of(20, 20) == 1
    assert progress_of(1000, 20) == 1
    assert progress_of(-1, 20) == 0


def test_constant_keeps_the_ratio():
    assert {ratio_at(progress / 10, "constant", 0.6, 0.1, 0.5) for progress in range(11)} == {0.6}


def test_linear_goes_from_ratio_to_late_ratio():
    ratios = [ratio_at(progress, "linear", 0.6, 0.2, 0.5) for progress in (0, 0.25, 0.5, 1)]
    assert ratios == pytest.approx([0.6, 0.5, 0.4, 0.2])
    assert ratio_at(0.5, "linear", 0.2, 0.6, 0.5) == pytest.approx(0.4)


def test_step_changes_at_switch_at():
    ratios = [ratio_at(progress, "step", 0.6, 0.2, 0.5) for progress in (0, 0.49, 0.5, 0.51, 1)]
    assert ratios == [0.6, 0.6, 0.2, 0.2, 0.2]


def test_switch_at_0_is_always_late_and_1_only_in_the_last_step():
    assert ratio_at(0, "step", 0.6, 0.2, 0) == 0.2
    assert ratio_at(0.99, "step", 0.6, 0.2, 1) == 0.6
    assert ratio_at(1, "step", 0.6, 0.2, 1) == 0.2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_progress_outside_0_to_1_is_clamped(schedule):
    assert ratio_at(-3, schedule, 0.6, 0.2, 0.5) == ratio_at(0, schedule, 0.6, 0.2, 0.5)
    assert ratio_at(7, schedule, 0.6, 0.2, 0.5) == ratio_at(1, schedule, 0.6, 0.2, 0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("progress", [0, 0.3, 0.7, 1])
def test_settings_ratio_at_is_the_schedule(schedule, progress):
    settings = tome.MergeSettings(ratio=0.7, late_ratio=0.3, schedule=schedule, switch_at=0.6)
    assert settings.ratio_at(progress) == ratio_at(progress, schedule, 0.7, 0.3, 0.6)
