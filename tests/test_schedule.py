import pytest

import tomesd_core as tome
from tomesd_core.settings import progress_of


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (5, {0: 0, 1: 0.25, 2: 0.5, 3: 0.75, 4: 1}),
        (20, {-1: 0, 20: 1, 1000: 1}),
        *((unknown_or_single, {0: 0, 1: 0, 7: 0}) for unknown_or_single in (None, 0, 1)),
    ],
)
def test_progress_runs_from_0_at_the_first_step_to_1_at_the_last_of_several(total, expected):
    assert {step: progress_of(step, total) for step in expected} == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule": "constant"}, {-3: 0.6, 0: 0.6, 0.3: 0.6, 0.5: 0.6, 1: 0.6, 7: 0.6}),
        ({"schedule": "linear"}, {-3: 0.6, 0: 0.6, 0.3: 0.48, 0.5: 0.4, 1: 0.2, 7: 0.2}),
        ({"schedule": "linear", "late_ratio": 0.8}, {0: 0.6, 0.5: 0.7, 1: 0.8}),
        ({"schedule": "step"}, {-3: 0.6, 0: 0.6, 0.49: 0.6, 0.5: 0.2, 0.51: 0.2, 1: 0.2, 7: 0.2}),
        ({"schedule": "step", "switch_at": 0}, {0: 0.2}),
        ({"schedule": "step", "switch_at": 1}, {0.99: 0.6, 1: 0.2}),
    ],
    ids=str,
)
def test_the_ratio_at_each_progress(values, expected):
    settings = tome.MergeSettings(**{"ratio": 0.6, "late_ratio": 0.2, **values})
    assert {progress: settings.ratio_at(progress) for progress in expected} == expected
