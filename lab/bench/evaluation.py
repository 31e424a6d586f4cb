"""Rows of `bench quality`: each variant's distance to unmerged pictures and to its reference."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
from PIL import Image

from ..demo.compare import enlarged, sheet
from . import distances
from .contenders import UNMERGED
from .distances import Estimate
from .equal_time import times_faster
from .pictures import PictureCache, Pictures
from .variants import Gains, Row, Table, Variant

METRICS = {"psnr": distances.psnr, "ssim": distances.ssim}
"""Measures of quality by column; higher is better."""

SHOWN_PICTURES, ENLARGED = 10, 3


class Evaluator:
    """Computes the metrics of variants on their first `samples` pictures, once per variant."""

    def __init__(self, cache: PictureCache, samples: int) -> None:
        self._cache, self._samples = cache, samples
        self._resamples = distances.resamples(samples)
        self._evaluated: dict[Variant, tuple[Pictures, dict[str, Estimate]]] = {}

    def rows(self, table: Table, gains: Gains) -> list[dict[str, object]]:
        """Rows of a table, whose pictures and their unmerged twins must have been made."""
        return [self._row(row, gains) for row in table.rows]

    def _row(self, row: Row, gains: Gains) -> dict[str, object]:
        pipeline, variant, reference = self._cache.pipeline, row.variant, row.reference
        pictures, values = self._evaluate(variant)
        others = {} if reference is None else self._evaluate(reference.variant)[1]
        pairs = variant.pairs if math.isnan(pictures.pairs) else pictures.pairs
        line: dict[str, object] = {
            "row": row.name,
            "contender": variant.contender,
            "ratio": variant.mean_ratio,
            "pairs": pairs,
            "faster": times_faster(variant, gains, pairs),
            "steps": pipeline.steps_of(variant),
        }
        for name in METRICS:
            line |= _compared(name, values.get(name), others.get(name))
        return line | {
            "seconds": pictures.seconds,
            "reference": reference and reference.name,
            "merged": pictures.merged,
            "model": pipeline.name,
            "side": pipeline.image_shape[-1],
            "samples": self._samples,
            "scale": pipeline.scale,
            "how": json.dumps(dataclasses.asdict(variant)),
        }

    def sheet(self, table: Table) -> Image.Image:
        """Some pictures of each row, enlarged, under its name and its PSNR."""
        strips, labels = [], []
        for row in table.rows:
            pictures, values = self._evaluate(row.variant)
            strip = np.concatenate(list(pictures.pixels[:SHOWN_PICTURES].numpy()), axis=1)
            size = ENLARGED * strip.shape[1], ENLARGED * strip.shape[0]
            strips.append(enlarged(Image.fromarray(strip), size))
            label = row.name
            if psnr := values.get("psnr"):
                ratio = f" {row.variant.ratio:g}" if row.variant.contender == row.name else ""
                label += f"{ratio}, {psnr.value:.1f} dB"
            labels.append(label)
        return sheet(strips, labels, columns=1)

    def _evaluate(self, variant: Variant) -> tuple[Pictures, dict[str, Estimate]]:
        if variant not in self._evaluated:
            pictures, values = self._cache.read(variant, self._samples), {}
            if variant.contender != UNMERGED:
                twins = self._evaluate(variant.unmerged)[0].pixels
                values = {
                    name: distances.mean(metric(pictures.pixels, twins), self._resamples)
                    for name, metric in METRICS.items()
                }
            self._evaluated[variant] = pictures, values
        return self._evaluated[variant]


def _compared(name: str, value: Estimate | None, other: Estimate | None) -> dict[str, object]:
    """Columns of a metric: the value and its difference to the reference's, with intervals."""
    columns = (f"{name}{part}" for part in ("", "_interval", "_difference", "_difference_interval"))
    difference = value.minus(other) if value is not None and other is not None else None
    numbers = [
        number
        for one in (value, difference)
        for number in ((None, None) if one is None else (one.value, one.interval))
    ]
    verdict = None if difference is None else distances.verdict(difference)
    return {**dict(zip(columns, numbers, strict=True)), f"{name}_verdict": verdict}
