"""Trains a tiny text-to-image model on a hundred emoji or on crops of photographs, on a CPU, in an
hour or two.

    python -m lab.demo.train emoji --data DIR --out DIR --steps 3000       (again with --resume, to
    go on)
    python -m lab.demo.train photos --out DIR --steps 3000
    python -m lab.demo.train photos --out DIR --export                     (into weights/photos)

The emoji are the npm package ``@lobehub/fluent-emoji-3d``, their names come from
``emoji-datasource`` (both MIT): ``npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource@16.0.0``
in the ``--data`` folder fetches them. The photographs are those in scikit-image's wheel that are in
the public domain; nothing is fetched. Whatever is random in a step is drawn from the seed and the
step's number, so a run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import signal
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tomesd_core.matching import similarity_dtype

from .model import MODELS, WEIGHTS, TinyModel, on_white, split_words

PICTURES, NAMES = "lobehub-fluent-emoji-3d-1.1.0.tgz", "emoji-datasource-16.0.0.tgz"

# : The pictures trained on: emoji-datasource's short names, with a caption of our own where its
# name is not what one : would type. Things that are told apart at 32×32; no flags, no people, no
# signs with writing on them.
PICKED = """
mouse cow tiger rabbit cat horse monkey_face dog pig hamster wolf bear panda_face lion_face unicorn_face fox_face
frog baby_chick penguin owl duck parrot turtle octopus fish tropical_fish whale=whale crab snail bee=bee
ladybug=ladybug butterfly
tulip rose sunflower evergreen_tree deciduous_tree=tree palm_tree cactus four_leaf_clover maple_leaf mushroom
grapes watermelon tangerine=orange lemon banana pineapple apple green_apple pear peach cherries strawberry tomato
eggplant carrot corn=corn broccoli
hamburger pizza=pizza fries=fries fried_egg=fried~egg doughnut cookie cake=cake icecream=ice~cream lollipop beer=beer
rainbow crescent_moon star=star sunny=sun cloud fire snowman umbrella droplet=drop earth_americas=earth
house=house car=red~car bus tractor rocket airplane
soccer=soccer~ball basketball=basketball 8ball=billiard~ball guitar
heart=red~heart yellow_heart green_heart blue_heart
red_circle=red~circle large_blue_circle=blue~circle large_green_circle=green~circle large_yellow_circle=yellow~circle
large_red_square=red~square large_blue_square=blue~square large_green_square=green~square
large_yellow_square=yellow~square
balloon gift=present jack_o_lantern=pumpkin christmas_tree crown tophat bell key gem=diamond bulb=light~bulb
ghost alien=alien robot_face
"""

Box = tuple[int, int, int, int]

# : A photograph's file, a caption, and the boxes (left, top, right, bottom) that its crops lie in.
# Only : photographs that scikit-image says are CC0 or in the public domain; no face of a person.
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


# --- The pictures
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """What is trained on: ``captions`` and, in the same order, ``rgb``: a uint8 tensor [N, 3, H, W]
    a size."""

    captions: list[str]
    rgb: list[Tensor]

    @property
    def words(self) -> list[str]:
        """The captions' words, each once, sorted."""
        return sorted({word for caption in self.captions for word in split_words(caption)})

    @property
    def names(self) -> list[str]:
        """The captions, each once."""
        return list(dict.fromkeys(self.captions))


def load_emoji(folder: Path, size: int = 32, margin: int = 1, picked: str = PICKED) -> Pictures:
    """The ``picked`` emoji on white, ``size`` pixels wide and high, ``margin`` of them white on
    each side.

    Raises `FileNotFoundError` without the two packages, `ValueError` when two pictures have the
    same caption.
    """
    with tarfile.open(folder / NAMES) as tar:
        entries = json.load(tar.extractfile("package/emoji.json"))  # type: ignore[arg-type]
    by_name = {name: emoji for emoji in entries for name in emoji["short_names"]}
    captions, tensors = [], []
    with tarfile.open(folder / PICTURES) as tar:
        files = {
            Path(member.name).stem: member
            for member in tar.getmembers()
            if "/assets/" in member.name
        }
        for entry in picked.split():
            name, _, caption = entry.partition("=")
            emoji = by_name[name]
            codes = (emoji["unified"], emoji["non_qualified"] or "")
            member = next(files[code.lower()] for code in codes if code.lower() in files)
            picture = on_white(Image.open(BytesIO(tar.extractfile(member).read())))  # type: ignore[union-attr]
            small = Image.new("RGB", (size, size), "white")
            small.paste(
                picture.resize((size - 2 * margin,) * 2, Image.Resampling.LANCZOS), (margin, margin)
            )
            captions.append(" ".join(split_words(caption.replace("~", " ") or emoji["name"])))
            tensors.append(_bytes(small))
    if len(set(captions)) < len(captions):
        raise ValueError(
            f"two pictures share a caption: {sorted({c for c in captions if captions.count(c) > 1})}"
        )
    return Pictures(captions, [torch.stack(tensors)])


def load_photographs(
    folder: Path | None = None, crops: int = 64, sizes: Sequence[int] = (32, 64)
) -> Pictures:
    """So many ``crops`` of each of the `REGIONS`, each one in all ``sizes``.

    A crop's side is half of its box's shorter side to all of it. ``folder`` holds the photographs:
    by default scikit-image's. Raises `FileNotFoundError` where one is missing.
    """
    if folder is None:
        found = importlib.util.find_spec("skimage")
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError("the photographs are in scikit-image: pip install scikit-image")
        folder = Path(found.submodule_search_locations[0]) / "data"
    chance = random.Random(0)
    captions: list[str] = []
    rgb: list[list[Tensor]] = [[] for _ in sizes]
    for file, caption, boxes in REGIONS:
        photograph = Image.open(folder / file).convert("RGB")
        for number in range(crops):
            left, top, right, bottom = boxes[number % len(boxes)]
            longest = min(right - left, bottom - top)
            # Each scale as often; never so small that nothing but blur is left.
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
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Source:
    """Where a model's pictures come from; ``shape`` is what its model has of its own."""

    load: Callable[..., Pictures]
    remarks: dict[str, Any]
    shape: dict[str, Any] = field(default_factory=dict)


#: By model. The offset and scale of the photographs are their pixels' mean and spread.
SOURCES = {
    "emoji": Source(load_emoji, {"pictures": PICTURES, "names": NAMES}),
    "photos": Source(
        load_photographs,
        {"pictures": sorted({f"scikit-image: {file}" for file, _, _ in REGIONS})},
        {"pixel_offset": 0.36, "pixel_scale": 0.27},
    ),
}


# --- One step
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that a run's result depends on, besides the pictures. A resumed run keeps the one it was
    started with."""

    seed: int = 0
    batch: int = 16
    shards: int = (
        2  # each on a thread of its own; part of the recipe because sums round differently
    )
    lr: float = 1e-3
    warmup: int = 200
    decay_part: float = 0.35  # the last part of the run, in which the learning rate falls to 0
    weight_decay: float = 0.01
    ema: float = 0.999
    drop_prompt: float = 0.12
    drop_words: float = 0.1
    snr_limit: float = 5.0
    # Only where the CPU multiplies it by itself: by emulation, a step of 1.4 seconds took 26.
    bf16: bool = field(default_factory=lambda: similarity_dtype(torch.empty(0)) == torch.bfloat16)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Warm-up, then level, then down to 0 along half a cosine over the run's last part."""
    start = int(steps * (1 - recipe.decay_part))
    done = max(0.0, (step - start) / max(1, steps - start))
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * done))


def draw_batch(
    pictures: Pictures, model: TinyModel, recipe: Recipe, step: int
) -> tuple[Tensor, ...]:
    """What step ``step`` trains on: pictures, word numbers, diffusion steps, noise. A function of
    seed and step.

    The sizes take turns; of larger pictures there are fewer, so that each step is of as many
    pixels.
    """
    turn, which = divmod(step, len(pictures.rgb))
    rgb = pictures.rgb[which]
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    chance = random.Random(recipe.seed * 1_000_003 + step)
    count, n = len(rgb), recipe.batch * model.shape["image_size"] ** 2 // rgb[0, 0].numel()

    # Every picture once an epoch: position i of the endless sequence lies in epoch i // count.
    numbers, epochs = [], {}
    for i in range(turn * n, (turn + 1) * n):
        if i // count not in epochs:
            epochs[i // count] = torch.randperm(
                count, generator=torch.Generator().manual_seed(recipe.seed * 7_919 + i // count)
            )
        numbers.append(int(epochs[i // count][i % count]))

    # As they are, neither mirrored nor shifted: a model this small, trained this briefly, learns
    # few pictures well rather than many in part.
    prompts = []
    for i in numbers:
        words = split_words(pictures.captions[i])
        draw = chance.random()
        if draw < recipe.drop_prompt:
            words = []
        elif draw < recipe.drop_prompt + recipe.drop_words:
            # So that a part of a caption means something too: "apple" is a red or a green one.
            words = [word for word in words if chance.random() < 0.5] or [chance.choice(words)]
        prompts.append(" ".join(words))
    x = (rgb[numbers].float() / 255 - model.shape["pixel_offset"]) / model.shape["pixel_scale"]
    # Spread evenly over all diffusion steps, not drawn one by one: the loss, and so the gradient,
    # is much less noisy.
    spread = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    t = (spread * model.num_timesteps).long().clamp(max=model.num_timesteps - 1)
    return x, model.tokenize(prompts), t, torch.randn(x.shape, generator=generator)


def shard_gradients(
    model: TinyModel,
    parameters: Sequence[nn.Parameter],
    shard: Sequence[Tensor],
    recipe: Recipe,
    share: float,
) -> tuple[float, tuple[Tensor, ...]]:
    """Error of the predicted noise, and the gradients, of one part of a batch; ``share`` is its
    part of the whole."""
    x, ids, t, noise = shard
    alpha = model.alphas_cumprod[t]
    # Min-SNR weighting (arXiv 2303.09556) for a model that predicts the velocity.
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=recipe.snr_limit) / (snr + 1)
    signal, spread = (part.sqrt().view(-1, 1, 1, 1) for part in (alpha, 1 - alpha))
    noisy, velocity = signal * x + spread * noise, signal * noise - spread * x
    # The weight cache is shared by all threads and would tie their graphs together.
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16, cache_enabled=False):
        error = model.velocity(noisy, t, model.text(ids)) - velocity
    each = error.square().mean(dim=(1, 2, 3))
    gradients = torch.autograd.grad((each * weight).mean() * share, parameters)
    return float((each.detach() * alpha).mean()) * share, gradients


# --- The run
# ----------------------------------------------------------------------------------------------------------


class Training:
    """A run: model, its moving average, optimiser and step; what is saved and resumed."""

    def __init__(
        self, pictures: Pictures, recipe: Recipe, shape: dict[str, Any] | None = None
    ) -> None:
        self.pictures = pictures
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = TinyModel(pictures.words, pictures.names, shape)
        self.parameters = list(self.model.parameters())
        self.average = {
            name: value.detach().clone() for name, value in self.model.state_dict().items()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
        # One thread a shard, not each operation on all threads: on a busy machine, threads that
        # wait for each other at every operation take many times as long. (torch's number of threads
        # belongs to the thread that sets it.)
        self.pool = ThreadPoolExecutor(
            recipe.shards, initializer=torch.set_num_threads, initargs=(1,)
        )
        self.step = 0

    def train_step(self, lr: float) -> float:
        """One optimiser step at learning rate ``lr``; returns the mean squared error of the
        predicted noise."""
        self.model.train()
        batch = draw_batch(self.pictures, self.model, self.recipe, self.step)
        shards = list(zip(*(part.chunk(self.recipe.shards) for part in batch), strict=True))
        jobs = [
            self.pool.submit(
                shard_gradients,
                self.model,
                self.parameters,
                shard,
                self.recipe,
                len(shard[0]) / len(batch[0]),
            )
            for shard in shards
        ]
        results = [job.result() for job in jobs]
        for parameter, *gradients in zip(
            self.parameters, *(gradients for _, gradients in results), strict=True
        ):
            parameter.grad = sum(gradients[1:], gradients[0])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        # Short memory at first, so that an early average is not mostly the random start.
        keep = min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        return sum(loss for loss, _ in results)

    def averaged(self) -> TinyModel:
        """The model with the averaged weights, in eval mode, as it would be shipped (but in fp32)."""
        model = TinyModel(self.model.words, self.model.captions, self.model.shape)
        model.load_state_dict(self.average)
        return model.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Everything that resuming needs, to ``path``, which is replaced only once the whole is
        written."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        state |= {"step": self.step, "recipe": vars(self.recipe), "shape": self.model.shape}
        state["captions"] = self.pictures.captions
        torch.save(state, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)

    @classmethod
    def resume(cls, path: Path, pictures: Pictures) -> Training:
        """The run saved in ``path``. Raises `ValueError` when it was trained on other pictures."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["captions"] != pictures.captions:
            raise ValueError(f"{path.name} was trained on other pictures: its captions differ")
        training = cls(pictures, Recipe(**state["recipe"]), state["shape"])
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.average, training.step = state["average"], state["step"]
        return training


def run(training: Training, out: Path, steps: int, every: float = 300.0) -> bool:
    """Trains until ``steps`` is reached, and saves to ``out``, on the way every so many seconds.

    Returns whether the run has come to its end; not so after SIGTERM or SIGINT, which end it after
    the step in hand.
    """
    stopped: list[int] = []
    previous = {
        s: signal.signal(s, lambda number, _: stopped.append(number))
        for s in (signal.SIGTERM, signal.SIGINT)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses: list[float] = []
    began = saved = time.monotonic()
    try:
        with open(out / "train.log", "a", encoding="utf-8", buffering=1) as log:
            while training.step < steps and not stopped:
                lr = learning_rate(training.recipe, training.step, steps)
                losses.append(training.train_step(lr))
                if training.step % 50 == 0 or training.step == steps:
                    mean, losses = sum(losses) / len(losses), []
                    minutes = (time.monotonic() - began) / 60
                    print(
                        f"step {training.step}/{steps}  loss {mean:.4f}  lr {lr:.2e}  {minutes:.1f} min",
                        file=log,
                    )
                if time.monotonic() - saved > every:
                    training.save(out / "checkpoint.pt")
                    saved = time.monotonic()
    finally:
        torch.set_num_threads(threads)
        for number, handler in previous.items():
            signal.signal(number, handler)
    training.save(out / "checkpoint.pt")
    return training.step >= steps


# --- What is shipped
# --------------------------------------------------------------------------------------------------


def export(training: Training, folder: Path, log: Path, **remarks: Any) -> None:
    """Writes what is shipped to ``folder``: the averaged model and the log's end.

    ``remarks``, on the pictures, stand beside the recipe in the model's ``.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remarks |= {"recipe": vars(training.recipe), "steps": training.step}
    training.averaged().save(folder / "tiny.safetensors", training=remarks)
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    (folder / "train.log").write_text("\n".join(lines[-20:]) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.demo.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", choices=MODELS, help="by what it is trained on")
    parser.add_argument(
        "--data", type=Path, help="folder of the two npm packages, or of the photographs"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoint and the log"
    )
    parser.add_argument(
        "--steps", type=int, default=3000, help="optimiser steps in all (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--export",
        action="store_true",
        help="train nothing; write the averaged weights to weights/",
    )
    args = parser.parse_args(arguments)

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    source = SOURCES[args.model]
    if args.model == "emoji" and args.data is None:
        parser.error("emoji needs --data")
    pictures = source.load(args.data)
    if args.resume or args.export:
        if not checkpoint.is_file():
            parser.error(f"there is no checkpoint.pt in {args.out}")
        training = Training.resume(checkpoint, pictures)
    else:
        if checkpoint.is_file():
            parser.error(f"{args.out} holds a checkpoint already: give --resume, or another --out")
        training = Training(pictures, Recipe(seed=args.seed), source.shape)
    if args.export:
        folder = WEIGHTS / args.model
        export(training, folder, args.out / "train.log", **source.remarks)
        print(f"step {training.step} written to {folder}")
        return 0
    ended = run(training, args.out, args.steps)
    print(f"{'ended' if ended else 'stopped'} at step {training.step}; {checkpoint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
