"""Stands in for `modules.rng`: noise that depends on each picture's own seed. Variation seeds are left out."""

from __future__ import annotations

import torch
from modules import devices


class ImageRNG:
    """One generator a picture, so that a picture does not depend on the batch that it is made in."""

    def __init__(self, shape, seeds, subseeds=None, subseed_strength=0.0, seed_resize_from_h=0, seed_resize_from_w=0):
        self.shape = tuple(map(int, shape))
        self.generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def next(self) -> torch.Tensor:
        """The next noise for the whole batch: [B, *shape]."""
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(devices.device)
