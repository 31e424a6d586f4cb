"""Training pictures of the tiny models: emoji, and crops of photographs.

The emoji are the npm package `@lobehub/fluent-emoji-3d`, and their names are from
`emoji-datasource` (both MIT). The photographs are those of scikit-image that are CC0 or in the
public domain.
"""

from __future__ import annotations

import importlib.util
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .model import on_white
from .text import split_words

PICTURES, NAMES = "lobehub-fluent-emoji-3d-1.1.0.tgz", "emoji-datasource-16.0.0.tgz"

PICKED = """
mouse cow tiger rabbit cat horse monkey_face dog pig hamster wolf bear panda_face lion_face
unicorn_face fox_face frog baby_chick penguin owl duck parrot turtle octopus fish tropical_fish
whale=whale crab snail bee=bee ladybug=ladybug butterfly tulip rose sunflower evergreen_tree
deciduous_tree=tree palm_tree cactus four_leaf_clover maple_leaf mushroom grapes watermelon
tangerine=orange lemon banana pineapple apple green_apple pear peach cherries strawberry tomato
eggplant carrot corn=corn broccoli hamburger pizza=pizza fries=fries fried_egg=fried~egg doughnut
cookie cake=cake icecream=ice~cream lollipop beer=beer rainbow crescent_moon star=star sunny=sun
cloud fire snowman umbrella droplet=drop earth_americas=earth house=house car=red~car bus tractor
rocket airplane soccer=soccer~ball basketball=basketball 8ball=billiard~ball guitar heart=red~heart
yellow_heart green_heart blue_heart red_circle=red~circle large_blue_circle=blue~circle
large_green_circle=green~circle large_yellow_circle=yellow~circle large_red_square=red~square
large_blue_square=blue~square large_green_square=green~square large_yellow_square=yellow~square
balloon gift=present jack_o_lantern=pumpkin christmas_tree crown tophat bell key gem=diamond
bulb=light~bulb ghost alien=alien robot_face
"""
"""Short names of emoji-datasource, some with a simpler caption.

They are distinguishable at 32×32: no flags, no people, no signs with writing.
"""

Box = tuple[int, int, int, int]

REGIONS: tuple[tuple[str, str, tuple[Box, ...]], ...] = (
    ("astronaut.png", "american flag", ((0, 0, 95, 230),)),
    ("astronaut.png", "orange suit", ((40, 290, 140, 470),)),
    ("astronaut.png", "suit collar", ((105, 195, 310, 300),)),
    ("astronaut.png", "space helmet", ((280, 345, 512, 512),)),
    ("astronaut.png", "space shuttle", ((345, 0, 480, 290),)),
    ("chelsea.png", "cat eye", ((125, 70, 220, 160), (285, 95, 355, 175))),
    ("chelsea.png", "cat face", ((30, 0, 360, 300),)),
    ("chelsea.png", "cat fur", ((45, 0, 345, 80),)),
    ("chelsea.png", "cat nose", ((215, 205, 310, 285),)),
    ("chelsea.png", "cat whiskers", ((20, 195, 230, 300),)),
    ("chelsea.png", "white blanket", ((360, 150, 451, 300),)),
    ("coffee.png", "coffee cup", ((165, 10, 415, 300),)),
    ("coffee.png", "cup handle", ((185, 220, 270, 310),)),
    ("coffee.png", "espresso", ((200, 90, 375, 200),)),
    ("coffee.png", "brown saucer", ((75, 100, 175, 330), (240, 290, 450, 390))),
    ("coffee.png", "silver spoon", ((320, 205, 415, 335),)),
    ("coffee.png", "wooden table", ((480, 0, 600, 400), (0, 220, 90, 400))),
    ("hubble_deep_field.jpg", "galaxies", ((0, 0, 1000, 872),)),
    ("hubble_deep_field.jpg", "spiral galaxy", ((90, 365, 160, 435),)),
    ("hubble_deep_field.jpg", "yellow galaxy", ((685, 430, 770, 515),)),
    ("hubble_deep_field.jpg", "bright star", ((710, 535, 795, 620), (220, 135, 290, 200))),
    ("retina.jpg", "retina vessels", ((400, 180, 1200, 560), (300, 1050, 1150, 1330))),
    ("retina.jpg", "retina edge", ((1080, 80, 1400, 400), (20, 1050, 320, 1380))),
    ("retina.jpg", "optic disc", ((80, 530, 350, 790),)),
    ("retina.jpg", "macula", ((560, 560, 860, 840),)),
    ("rocket.jpg", "rocket", ((270, 110, 375, 420),)),
    ("rocket.jpg", "launch tower", ((0, 0, 95, 380), (555, 0, 640, 420))),
    ("rocket.jpg", "launch lights", ((80, 340, 280, 427), (340, 350, 490, 427))),
    ("rocket.jpg", "evening sky", ((95, 0, 300, 115), (345, 120, 435, 340))),
)
"""Photograph, caption, and boxes (left, top, right, bottom) of its crops; no human faces."""


@dataclass(frozen=True)
class Pictures:
    """Training pictures: `captions` and, in the same order, `rgb`, uint8 [N, 3, H, W] per size."""

    captions: list[str]
    rgb: list[Tensor]

    @property
    def words(self) -> list[str]:
        """Words of the captions, sorted, without repeats."""
        return sorted({word for caption in self.captions for word in split_words(caption)})

    @property
    def names(self) -> list[str]:
        """Captions without repeats."""
        return list(dict.fromkeys(self.captions))


def load_emoji(folder: Path, size: int = 32, margin: int = 1, picked: str = PICKED) -> Pictures:
    """Load the `picked` emoji on white, `size` pixels wide and high with a white `margin`.

    Raises `FileNotFoundError` without the two packages, `ValueError` for a repeated caption.
    """
    with tarfile.open(folder / NAMES) as tar:
        entries = json.load(tar.extractfile("package/emoji.json"))  # type: ignore[arg-type]
    by_name = {name: emoji for emoji in entries for name in emoji["short_names"]}
    captions, tensors = [], []
    with tarfile.open(folder / PICTURES) as tar:
        members = [member for member in tar.getmembers() if "/assets/" in member.name]
        files = {Path(member.name).stem: member for member in members}
        for entry in picked.split():
            name, _, caption = entry.partition("=")
            emoji = by_name[name]
            codes = (emoji["unified"], emoji["non_qualified"] or "")
            member = next(files[code.lower()] for code in codes if code.lower() in files)
            picture = on_white(Image.open(BytesIO(tar.extractfile(member).read())))  # type: ignore[union-attr]
            inner = picture.resize((size - 2 * margin,) * 2, Image.Resampling.LANCZOS)
            small = Image.new("RGB", (size, size), "white")
            small.paste(inner, (margin, margin))
            captions.append(" ".join(split_words(caption.replace("~", " ") or emoji["name"])))
            tensors.append(_bytes(small))
    repeated = {caption for caption in captions if captions.count(caption) > 1}
    if repeated:
        raise ValueError(f"two pictures share a caption: {sorted(repeated)}")
    return Pictures(captions, [torch.stack(tensors)])


def load_photographs(
    folder: Path | None = None, crops: int = 64, sizes: Sequence[int] = (32, 64)
) -> Pictures:
    """Cut `crops` of each of the `REGIONS`, each one in all `sizes`.

    A crop's side is between half of its box's shorter side and all of it. `folder` holds the
    photographs, by default scikit-image's. Raises `FileNotFoundError` if one is missing.
    """
    if folder is None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("the photographs are in scikit-image: pip install scikit-image")
        folder = Path(spec.submodule_search_locations[0]) / "data"
    chance = random.Random(0)
    captions: list[str] = []
    rgb: list[list[Tensor]] = [[] for _ in sizes]
    for file, caption, boxes in REGIONS:
        photograph = Image.open(folder / file).convert("RGB")
        for number in range(crops):
            left, top, right, bottom = boxes[number % len(boxes)]
            longest = min(right - left, bottom - top)
            # Scales are log-uniform, and never so small that only blur remains.
            part, shortest = chance.random(), max(48, longest / 2)
            side = round(shortest**part * longest ** (1 - part))
            x, y = chance.randint(left, right - side), chance.randint(top, bottom - side)
            captions.append(caption)
            for size, tensors in zip(sizes, rgb, strict=True):
                window = (x, y, x + side, y + side)
                crop = photograph.resize((size, size), Image.Resampling.LANCZOS, window)
                tensors.append(_bytes(crop))
    return Pictures(captions, [torch.stack(tensors) for tensors in rgb])


def _bytes(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Source:
    """Loads a model's training pictures; `shape` overrides the model's default shape."""

    load: Callable[..., Pictures]
    remarks: dict[str, Any]
    shape: dict[str, Any] = field(default_factory=dict)


SOURCES = {
    "emoji": Source(load_emoji, {"pictures": PICTURES, "names": NAMES}),
    "photos": Source(
        load_photographs,
        {"pictures": sorted({f"scikit-image: {file}" for file, _, _ in REGIONS})},
        {"pixel_offset": 0.36, "pixel_scale": 0.27},
    ),
}
"""By model. The offset and scale of the photographs are their pixels' mean and spread."""
