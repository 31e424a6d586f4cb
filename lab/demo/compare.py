"""Two small pictures made fit to be compared: enlarged, their difference amplified, on one sheet
under their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

SCALE = 8
"""Pixels of an enlarged picture for each of the model's: its own are too small to look at."""

AMPLIFIED = 10
"""How often the difference of two pictures is taken: most of it is too faint to see."""

MARGIN, LINE = 8, 28


def enlarged(picture: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """`picture` as RGB, `SCALE` times as large or of a given (width, height), without smoothing."""
    size = size or (picture.width * SCALE, picture.height * SCALE)
    return picture.convert("RGB").resize(size, Image.NEAREST)


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """How far two RGB pictures of one size differ in each channel, times `AMPLIFIED`: black where
    they are equal."""
    return ImageChops.difference(one, other).point(lambda value: min(value * AMPLIFIED, 255))


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`, black labels above them on white."""
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
