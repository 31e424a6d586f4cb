"""Comparison of two small pictures: enlarged, amplified difference, on one labelled sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

SCALE = 8

AMPLIFIED = 10
"""Factor of a shown difference, most of which is too faint to see."""

MARGIN, LINE = 8, 28


def enlarged(picture: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """Enlarge `picture` as RGB by `SCALE` or to (width, height), without smoothing."""
    size = size or (picture.width * SCALE, picture.height * SCALE)
    return picture.convert("RGB").resize(size, Image.NEAREST)


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """Difference of two RGB pictures of one size per channel, times `AMPLIFIED`."""
    return ImageChops.difference(one, other).point(lambda value: min(value * AMPLIFIED, 255))


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Arrange pictures of one size in rows of `columns`, with black labels on white above them."""
    font = ImageFont.load_default(18)
    rows = math.ceil(len(pictures) / columns)
    wide, high = pictures[0].width + MARGIN, pictures[0].height + LINE + MARGIN
    whole = Image.new("RGB", (columns * wide + MARGIN, rows * high + MARGIN), "white")
    draw = ImageDraw.Draw(whole)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * wide, MARGIN + row * high
        draw.text((left, top), label, fill="black", font=font)
        whole.paste(picture, (left, top + LINE))
    return whole
