"""Distances of pictures to their unmerged twins, with bootstrap intervals.

All variants are made from the same seeds and prompts and share one set of resamples. The spread of
a value, or of a difference of two, over the resamples is its error.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .packages import require

RESAMPLES = 400
"""Number of bootstrap resamples; an interval's own error is then about 4 %."""

LEAST_SQUARE = 1 / 12
"""Mean square of rounding to whole pixel values, a PSNR of 59 dB: the smallest one used."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value over a set of pictures, and over every resample of it, [R]."""

    value: float
    resampled: Tensor

    @property
    def interval(self) -> float:
        """Half of the 95 % interval: 1.96 bootstrap standard errors."""
        return 1.96 * float(self.resampled.std())

    def minus(self, other: Estimate) -> Estimate:
        """Return the paired difference; variation that both share cancels in its interval."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)


def resamples(count: int, seed: int = 0) -> Tensor:
    """Draw `count` picture numbers with replacement, R times: [R, count]."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def mean(values: Tensor, numbers: Tensor) -> Estimate:
    """Mean over pictures of one value each, [N]; `numbers` [R, N] as from `resamples`."""
    values = values.double()
    return Estimate(float(values.mean()), values[numbers].mean(1))


def psnr(pictures: Tensor, twins: Tensor) -> Tensor:
    """PSNR in dB of each picture to its twin, [N]; both uint8 [N, H, W, 3]."""
    square = (pictures.double() - twins.double()).square().mean(dim=(1, 2, 3))
    return 10 * (255**2 / square.clamp(min=LEAST_SQUARE)).log10()


def ssim(pictures: Tensor, twins: Tensor) -> Tensor:
    """SSIM of each picture to its twin, [N]; both uint8 [N, H, W, 3]."""
    structural_similarity = require("skimage.metrics").structural_similarity
    pairs = zip(pictures.numpy(), twins.numpy(), strict=True)
    return torch.tensor(
        [structural_similarity(one, other, channel_axis=-1, data_range=255) for one, other in pairs]
    )


def verdict(difference: Estimate) -> str:
    """Return `better` or `worse`, or `none` if the difference's interval holds 0."""
    if abs(difference.value) <= difference.interval:
        return "none"
    return "better" if difference.value > 0 else "worse"
