"""How far pictures are from their unmerged twins, and how sure that is.

Whatever is compared is made from the same seeds and prompts, and resampled alike: `resamples` are
drawn once, every value is computed on each of them, and the spread of a value, or of a difference
of two, over them is its error.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .packages import require

RESAMPLES = 400
"""Drawn in a bootstrap; with so many, an interval's own error is about 4 %."""

NORMAL_95 = 1.96
"""Standard errors to either side that hold 95 % of a normal distribution."""

LEAST_SQUARE = 1 / 12
"""What rounding to whole pixel values alone gives as mean square: a smaller one is taken as this,
59 dB."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value of a set of pictures, and the same on every resample of the set, [R]."""

    value: float
    resampled: Tensor

    @property
    def interval(self) -> float:
        """How far the 95 % interval reaches to either side: 1.96 bootstrap standard errors."""
        return NORMAL_95 * float(self.resampled.std())

    def minus(self, other: Estimate) -> Estimate:
        """The difference. What is alike in both, since both were made from the same seeds, is not
        in its interval."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)


def resamples(count: int, seed: int = 0) -> Tensor:
    """[R, count]: the numbers of `count` pictures drawn with replacement, R times over."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def mean(values: Tensor, numbers: Tensor) -> Estimate:
    """The mean of one value a picture, [N]; `numbers`: [R, N], as `resamples` gives them."""
    values = values.double()
    return Estimate(float(values.mean()), values[numbers].mean(1))


def psnr(pictures: Tensor, twins: Tensor) -> Tensor:
    """[N]: the peak signal-to-noise ratio in dB of each picture to its twin; both uint8, [N, H, W,
    3]."""
    square = (pictures.double() - twins.double()).square().mean(dim=(1, 2, 3))
    return 10 * (255**2 / square.clamp(min=LEAST_SQUARE)).log10()


def ssim(pictures: Tensor, twins: Tensor) -> Tensor:
    """[N]: the structural similarity of each picture to its twin, at most 1; both uint8, [N, H, W,
    3]."""
    structural_similarity = require("skimage.metrics").structural_similarity
    pairs = zip(pictures.numpy(), twins.numpy(), strict=True)
    return torch.tensor(
        [structural_similarity(one, other, channel_axis=-1, data_range=255) for one, other in pairs]
    )


def verdict(difference: Estimate) -> str:
    """`better` or `worse`; `none` where the interval of the difference holds 0."""
    if abs(difference.value) <= difference.interval:
        return "none"
    return "better" if difference.value > 0 else "worse"
