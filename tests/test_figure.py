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
        picture = figure.convert("RGB").crop((5, 20, 340, 350))
    colors = picture.resize((37, 37), Image.NEAREST).getcolors(37 * 37)
    assert len(colors) > 20, "it shows a picture"
