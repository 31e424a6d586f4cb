"""Stands in for `modules.images`: grids, and parameters read from a picture's file."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as [3, H, W] in [0, 1]. The host's own: WebUI writes this out where it needs it."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255)


def to_image(picture: torch.Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as a picture; the host's own too."""
    return Image.fromarray((255.0 * np.moveaxis(picture.cpu().numpy(), 0, 2)).astype(np.uint8))


def image_grid(imgs, batch_size=1, rows=None):
    """All pictures in one."""
    rows = min(rows or round(math.sqrt(len(imgs))), len(imgs))
    columns = math.ceil(len(imgs) / rows)
    width, height = (max(image.size[axis] for image in imgs) for axis in (0, 1))
    grid = Image.new("RGB", (columns * width, rows * height), "black")
    for i, image in enumerate(imgs):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def read_info_from_image(image: Image.Image) -> tuple[str | None, dict]:
    """(infotext, other text in the file)."""
    items = {key: value for key, value in (image.info or {}).items() if isinstance(value, str)}
    return items.pop("parameters", None), items
