"""How far pictures are from their unmerged twins and from the training pictures, and how sure that is.

Whatever is compared is made from the same seeds and prompts, and resampled alike: `resamples` are drawn once, every
value is computed on each of them, and the spread of a value, or of a difference of two, over them is its error.
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
"""What rounding to whole pixel values alone gives as mean square: a smaller one is taken as this, 59 dB."""


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
        """The difference. What is alike in both, since both were made from the same seeds, is not in its interval."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)


def resamples(count: int, seed: int = 0) -> Tensor:
    """[R, count]: the numbers of `count` pictures drawn with replacement, R times over."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def mean(values: Tensor, numbers: Tensor) -> Estimate:
    """The mean of one value a picture, [N]; `numbers`: [R, N], as `resamples` gives them."""
    values = values.double()
    return Estimate(float(values.mean()), values[numbers].mean(1))


def psnr(pictures: Tensor, twins: Tensor) -> Tensor:
    """[N]: the peak signal-to-noise ratio in dB of each picture to its twin; both uint8, [N, H, W, 3]."""
    square = (pictures.double() - twins.double()).square().mean(dim=(1, 2, 3))
    return 10 * (255**2 / square.clamp(min=LEAST_SQUARE)).log10()


def ssim(pictures: Tensor, twins: Tensor) -> Tensor:
    """[N]: the structural similarity of each picture to its twin, at most 1; both uint8, [N, H, W, 3]."""
    structural_similarity = require("skimage.metrics").structural_similarity
    pairs = zip(pictures.numpy(), twins.numpy(), strict=True)
    return torch.tensor([structural_similarity(one, other, channel_axis=-1, data_range=255) for one, other in pairs])


class Frechet:
    """The Fréchet distance of sets of features to a reference set (arXiv 1706.08500): both are taken as normal.

    It is larger for small sets, whose covariance is not well known: compare only sets of one size.
    """

    def __init__(self, reference: Tensor) -> None:
        """`reference`: [M, D] features."""
        self._mean, self._covariance = _moments(reference.double())
        values, vectors = torch.linalg.eigh(self._covariance)
        self._root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distance(self, features: Tensor) -> Tensor:
        """[...]: the distances of sets of features, [..., N, D]."""
        centre, covariance = _moments(features.double())
        # The root of a product of covariances has the trace of the root of this one, which is symmetric.
        shared = torch.linalg.eigvalsh(self._root @ covariance @ self._root).clamp(min=0).sqrt().sum(-1)
        traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + self._covariance.trace()
        return (centre - self._mean).square().sum(-1) + traces - 2 * shared

    def estimate(self, features: Tensor, numbers: Tensor) -> Estimate:
        """The distance of one set, [N, D]; `numbers`: [R, N], as `resamples` gives them."""
        resampled = torch.cat([self.distance(features[part]) for part in numbers.split(50)])
        return Estimate(float(self.distance(features)), resampled)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., D] and covariance [..., D, D] of [..., N, D]."""
    centre = features.mean(-2)
    away = features - centre.unsqueeze(-2)
    return centre, away.mT @ away / (features.shape[-2] - 1)


def verdict(difference: Estimate, higher_is_better: bool) -> str:
    """`better` or `worse`; `none` where the interval of the difference holds 0."""
    if abs(difference.value) <= difference.interval:
        return "none"
    return "better" if (difference.value > 0) == higher_is_better else "worse"
