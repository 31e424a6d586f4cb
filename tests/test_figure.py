"""The figure of the algorithm."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ldm", reason="the picture is made by ldm's own sampler")
pytest.importorskip("matplotlib")

from PIL import Image

from lab.figure import draw


def test_the_figure_is_drawn_from_a_real_picture(tmp_path):
    with torch.no_grad():
        draw(tmp_path / "algorithm.png")
    with Image.open(tmp_path / "algorithm.png") as figure:
        colors = {
            figure.convert("RGB").getpixel((x, y))
            for x in range(5, 340, 9)
            for y in range(20, 350, 9)
        }
    assert len(colors) > 20, "it shows a picture"
