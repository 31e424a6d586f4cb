"""Estimates for GPUs: launches of a merged layer, and the table."""

from __future__ import annotations

import itertools

import pytest
import torch
from on_bench import rows_of

from lab.bench.__main__ import main
from lab.bench.contenders import CORNER, KEYS, TOKENS, UNMERGED
from lab.bench.estimate import SHAPES, record, record_step
from lab.bench.roofline import CARDS
from tomesd_core.plan import pays

REUSED = {"reuse_steps": 50}
BUDGET = [
    ("sd15", 64, KEYS, 0.84, {}, 38),
    ("sd15", 128, KEYS, 0.84, {}, 42),
    ("sd15", 64, KEYS, 0.75, {}, 33),
    ("sd15", 64, KEYS, 0.9375, {}, 33),
    ("sd15", 64, TOKENS, 0.5, {}, 39),
    ("sd15", 64, KEYS, 0.84, REUSED, 13),
    ("sd15", 64, KEYS, 0.84, {**REUSED, "schedule": "linear", "late_ratio": 0.6}, 30),
    ("sdxl", 64, KEYS, 0.84, {}, 38),
]
"""Model, side of the token grid, method, ratio, settings, and the most launches per call."""


@pytest.mark.parametrize(("model", "side", "method", "ratio", "settings", "most"), BUDGET)
def test_a_merged_layer_keeps_to_its_budget_of_launches(model, side, method, ratio, settings, most):
    recorder = record(side, SHAPES[model], torch.float16, method, ratio, **settings)
    assert 6 < recorder.launches <= most
    assert recorder.waits == []


def recorded(side, *contenders, layer=SHAPES["sd15"], autocast=False):
    """Records of one layer with each contender at its ratio."""
    return [record(side, layer, torch.float16, *one, autocast) for one in contenders]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_layer_without_merging_is_a_norm_an_attention_and_its_projections(dtype):
    recorder = record(64, SHAPES["sd15"], dtype, UNMERGED, 0.0)
    assert recorder.launches == 6 and recorder.waits == []


def test_the_peer_has_the_launches_of_its_code():
    assert record(64, SHAPES["sd15"], torch.float16, CORNER, 0.5).launches == 46


@pytest.mark.parametrize("card", CARDS)
def test_more_merging_is_faster_and_a_larger_grid_gains_more(card):
    def faster(side, ratio):
        whole, merged = recorded(side, (UNMERGED, 0.0), (KEYS, ratio))
        return whole.seconds(CARDS[card]) / merged.seconds(CARDS[card])

    assert 1 < faster(64, 0.75) < faster(64, 0.9375) < faster(128, 0.9375)


def test_the_table_calls_every_time_an_estimate(tmp_path, capsys):
    assert main(["estimate", "--quick", "--models", "sd15", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "every time is an estimate" in text
    assert "data sheets" in text
    assert text.count("estimated times faster") == len(CARDS)
    rows = rows_of(tmp_path / "estimate.csv")
    names = [row["contender"] for row in rows]
    assert names == [UNMERGED, "keys", "tokens", "paper", CORNER, "ToDo"]
    assert all(float(row[card]) > 0 for row in rows for card in CARDS)


LAYERS = [(320, 8), (640, 8), (1280, 8), (320, 5), (640, 10), (1280, 20)]
"""Channels and heads of SD 1.5, SD 2 and SDXL, at any level."""
RATIOS = (0.1, 0.25, 0.4375, 0.5, 0.6, 0.7, 0.75, 0.84, 0.9375)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp16", "autocast"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_layer_that_the_rule_merges_on_a_gpu_loses(layer, autocast):
    merging = set()
    for side, method in itertools.product((32, 40, 48, 56, 64, 80), (KEYS, TOKENS)):
        for ratio in RATIOS:
            if pays(side**2, *layer, ratio, "cuda", method):
                merging.add(method)
                how = {"layer": layer, "autocast": autocast}
                whole, merged = recorded(side, (UNMERGED, 0.0), (method, ratio), **how)
                for card in (CARDS["RTX 4090"], CARDS["H200"]):
                    assert whole.seconds(card) >= merged.seconds(card), (side, method, ratio)
                break
    assert merging == {KEYS, TOKENS}


@pytest.mark.parametrize("layer", [(320, 8), (320, 5), (640, 10)], ids=str)
def test_48x48_tokens_of_a_finest_layer_do_not_merge_on_a_gpu(layer):
    for ratio, method in itertools.product(RATIOS[:-1], (KEYS, TOKENS)):
        assert not pays(48**2, *layer, ratio, "cuda", method), (ratio, method)


def test_the_peak_is_close_to_the_unmerged_one():
    whole, merged = recorded(128, (UNMERGED, 0.0), (KEYS, 0.75))
    assert 0 < merged.peak - whole.peak <= 12e6


@pytest.mark.parametrize("kind", ["sdp", "plain"])
def test_a_whole_step_gains_less_than_a_layer_and_more_at_a_larger_size(kind):
    def seconds(side, *contender):
        step = record_step("sd15", side, torch.float16, kind, *contender)
        return step.seconds(CARDS["RTX 4090"])

    gains = [seconds(side, UNMERGED, 0.0) / seconds(side, KEYS, 0.84) for side in (64, 128)]
    assert 1 < gains[0] < gains[1] < 4


def test_sdxl_has_its_own_depths_and_no_attention_at_full_resolution():
    whole = record_step("sdxl", 32, torch.float16, "sdp", UNMERGED, 0.0)
    calls = [one.inputs[0].shape[2] for one in whole.operations if one.name == "fused_attention"]
    # Each block attends twice: 2 + 3 transformers per level, of 2 and 10 blocks; 10 in the middle.
    assert calls.count(16 * 16) == 2 * 5 * 2 and calls.count(8 * 8) == 2 * (5 + 1) * 10


@pytest.mark.parametrize(
    ("device", "side", "ratio", "merges"),
    [
        ("cpu", 16, 0.3, True),
        ("cpu", 16, 0.25, False),
        ("cuda", 48, 0.3, True),
        ("cuda", 32, 0.75, False),
    ],
)
def test_the_method_paper_merges_where_version_0_1_0_did(device, side, ratio, merges):
    assert pays(side**2, 320, 8, ratio, device, "paper") == merges
