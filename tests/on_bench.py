"""Helpers of the benchmark's tests, which need every package that it measures or uses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lab.bench.contenders import Contender, available
from lab.bench.pictures import UNTRAINED, Pipeline
from tomesd_core.settings import MergeSettings

for package in ("ldm", "matplotlib", "safetensors", "skimage", "tomesd", "tqdm"):
    pytest.importorskip(package)

CPU = torch.device("cpu")
TINY_PIPELINE = Pipeline(
    UNTRAINED, steps=4, scale=3.0, attention="sdp", dtype="float32", device=CPU
)
"""A pipeline with a small untrained model."""


def one_contender(name: str, ratio: float) -> Contender:
    """A contender that merges layers of any size."""
    settings = MergeSettings(schedule="constant", skip_unprofitable=False)
    (contender,), _ = available([name], ratio, 256, torch.float32, settings)
    return contender


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
