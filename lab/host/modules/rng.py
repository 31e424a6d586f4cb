"""Stands in for `modules.rng`: the noise of a batch."""

from __future__ import annotations

from typing import Any

import torch
from modules import shared
from torch import Tensor


class ImageRNG:
    """One generator per picture, so that a picture doesn't depend on its batch."""

    def __init__(self, shape: Any, seeds: list[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def next(self) -> Tensor:
        """Return the next noise for the whole batch: [B, *shape]."""
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(shared.device)
