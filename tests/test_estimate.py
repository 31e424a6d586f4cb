"""What a merged layer asks of a GPU: the budget of launches, and what the table says."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("ldm", reason="the layer is ldm's own")

from lab.bench.__main__ import main
from lab.bench.contenders import CORNER, KEYS, TOKENS, UNMERGED
from lab.bench.estimate import CARDS, SHAPES, record

REUSED = {"reuse_steps": 50}
BUDGET = [
    ("sd15", 64, KEYS, 0.84, {}, 40),
    ("sd15", 128, KEYS, 0.84, {}, 46),
    ("sd15", 64, KEYS, 0.75, {}, 34),
    ("sd15", 64, KEYS, 0.9375, {}, 34),
    ("sd15", 64, TOKENS, 0.5, {}, 42),
    ("sd15", 64, KEYS, 0.84, REUSED, 16),
    ("sd15", 64, KEYS, 0.84, {**REUSED, "schedule": "linear", "late_ratio": 0.6}, 30),
    ("sdxl", 64, KEYS, 0.84, {}, 40),
]
"""Model, side of the token grid, method, ratio, settings, and the most launches of a call in the steady state."""


@pytest.mark.parametrize(("model", "side", "method", "ratio", "settings", "most"), BUDGET)
def test_a_merged_layer_keeps_to_its_budget_of_launches(model, side, method, ratio, settings, most):
    recorder = record(side, SHAPES[model], torch.float16, method, ratio, **settings)
    assert 6 < recorder.launches <= most
    assert recorder.waits == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_layer_without_merging_is_a_norm_an_attention_and_its_projections(dtype):
    recorder = record(64, SHAPES["sd15"], dtype, UNMERGED, 0.0)
    assert recorder.launches == 6 and recorder.waits == []


def test_the_peer_asks_for_as_many_launches_as_its_code_has():
    assert record(64, SHAPES["sd15"], torch.float16, CORNER, 0.5).launches == 46


@pytest.mark.parametrize("card", CARDS)
def test_more_merging_is_faster_and_a_larger_grid_gains_more(card):
    def faster(side, ratio):
        times = [
            sum(each.seconds(CARDS[card]) for each in record(side, SHAPES["sd15"], torch.float16, *what).operations)
            for what in ((UNMERGED, 0.0), (KEYS, ratio))
        ]
        return times[0] / times[1]

    assert 1 < faster(64, 0.75) < faster(64, 0.9375) < faster(128, 0.9375)


def test_the_table_calls_every_time_an_estimate(tmp_path, capsys):
    assert main(["estimate", "--quick", "--models", "sd15", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "every time is an estimate" in text and text.count("estimated times faster") == len(CARDS)
    with open(tmp_path / "estimate.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == [UNMERGED, "keys", "tokens", "paper", CORNER, "ToDo"]
    assert all(float(row[card]) > 0 for row in rows for card in CARDS)
