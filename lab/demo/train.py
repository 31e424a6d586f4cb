"""Train a tiny text-to-image model on emoji or photographs, on a CPU, in an hour or two.

    python -m lab.demo.train emoji --data DIR --out DIR --steps 3000    (--resume continues)
    python -m lab.demo.train photos --out DIR --steps 3000
    python -m lab.demo.train photos --out DIR --export                  (writes weights/photos)

`npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource@16.0.0` in the `--data` folder fetches the
emoji; the photographs are in scikit-image. All random draws of a step depend on the seed and the
step's number alone, so an interrupted run continues as if it had not been interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_core.matching import similarity_dtype

from .model import MODELS, WEIGHTS, TinyModel
from .text import split_words
from .training_pictures import SOURCES, Pictures


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters, which decide a run's result with the pictures; a resumed run keeps them."""

    seed: int = 0
    batch: int = 16
    shards: int = 2
    """Threads per batch, in the recipe since they change the rounding of sums."""
    lr: float = 1e-3
    warmup: int = 200
    decay_part: float = 0.35
    """Last fraction of the run, in which the learning rate falls to 0."""
    weight_decay: float = 0.01
    ema: float = 0.999
    drop_prompt: float = 0.12
    drop_words: float = 0.1
    snr_limit: float = 5.0
    # Only if the CPU has it: emulated, a step of 1.4 seconds took 26.
    bf16: bool = field(default_factory=lambda: similarity_dtype(torch.empty(0)) == torch.bfloat16)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate: a linear warm-up, a constant part, and half a cosine down to 0."""
    start = int(steps * (1 - recipe.decay_part))
    done = max(0.0, (step - start) / max(1, steps - start))
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * done))


def draw_batch(
    pictures: Pictures, model: TinyModel, recipe: Recipe, step: int
) -> tuple[Tensor, ...]:
    """Draw the batch of a step from seed and step: pictures, word numbers, diffusion steps, noise.

    Sizes take turns; a batch of larger pictures has fewer of them, with the same number of pixels.
    """
    turn, which = divmod(step, len(pictures.rgb))
    rgb = pictures.rgb[which]
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    chance = random.Random(recipe.seed * 1_000_003 + step)
    count, n = len(rgb), recipe.batch * model.shape["image_size"] ** 2 // rgb[0, 0].numel()

    # Every picture once per epoch: position i of the endless sequence is in epoch i // count.
    numbers, epochs = [], {}
    for i in range(turn * n, (turn + 1) * n):
        epoch, place = divmod(i, count)
        if epoch not in epochs:
            order = torch.Generator().manual_seed(recipe.seed * 7_919 + epoch)
            epochs[epoch] = torch.randperm(count, generator=order)
        numbers.append(int(epochs[epoch][place]))

    # No mirroring or shifting: a small, briefly trained model learns few pictures well.
    prompts = []
    for i in numbers:
        words = split_words(pictures.captions[i])
        draw = chance.random()
        if draw < recipe.drop_prompt:
            words = []
        elif draw < recipe.drop_prompt + recipe.drop_words:
            # A part of a caption should have a meaning too: "apple" is a red or a green one.
            words = [word for word in words if chance.random() < 0.5] or [chance.choice(words)]
        prompts.append(" ".join(words))
    x = (rgb[numbers].float() / 255 - model.shape["pixel_offset"]) / model.shape["pixel_scale"]
    # Evenly spread diffusion steps give a less noisy loss and gradient than independent draws.
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
    """Error of the predicted noise and gradients of a shard, which is `share` of its batch."""
    x, ids, t, noise = shard
    alpha = model.alphas_cumprod[t]
    # Min-SNR weighting (arXiv 2303.09556) for a model that predicts the velocity.
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=recipe.snr_limit) / (snr + 1)
    signal, spread = (part.sqrt().view(-1, 1, 1, 1) for part in (alpha, 1 - alpha))
    noisy, velocity = signal * x + spread * noise, signal * noise - spread * x
    # Autocast's weight cache is shared by all threads and would join their graphs.
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16, cache_enabled=False):
        error = model.velocity(noisy, t, model.text(ids)) - velocity
    each = error.square().mean(dim=(1, 2, 3))
    gradients = torch.autograd.grad((each * weight).mean() * share, parameters)
    return float((each.detach() * alpha).mean()) * share, gradients


class Training:
    """A training run: model, its moving average, optimiser and step."""

    def __init__(
        self, pictures: Pictures, recipe: Recipe, shape: dict[str, Any] | None = None
    ) -> None:
        self.pictures = pictures
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = TinyModel(pictures.words, pictures.names, shape)
        self.parameters = list(self.model.parameters())
        state = self.model.state_dict()
        self.average = {name: value.detach().clone() for name, value in state.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
        # One thread per shard: on a busy machine, threads that wait for each other at every
        # operation are many times slower. torch's number of threads is set per thread.
        self.pool = ThreadPoolExecutor(
            recipe.shards, initializer=torch.set_num_threads, initargs=(1,)
        )
        self.step = 0

    def train_step(self, lr: float) -> float:
        """Take one optimiser step; return the mean squared error of the predicted noise."""
        self.model.train()
        batch = draw_batch(self.pictures, self.model, self.recipe, self.step)
        shards = list(zip(*(part.chunk(self.recipe.shards) for part in batch), strict=True))
        jobs = []
        for shard in shards:
            share = len(shard[0]) / len(batch[0])
            how = self.model, self.parameters, shard, self.recipe, share
            jobs.append(self.pool.submit(shard_gradients, *how))
        losses, gradients = zip(*(job.result() for job in jobs), strict=True)
        for parameter, *parts in zip(self.parameters, *gradients, strict=True):
            parameter.grad = sum(parts[1:], parts[0])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        # A short memory at first keeps the random start out of early averages.
        keep = min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        return sum(losses)

    def averaged(self) -> TinyModel:
        """Model with the averaged weights in fp32, in eval mode."""
        model = TinyModel(self.model.words, self.model.captions, self.model.shape)
        model.load_state_dict(self.average)
        return model.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Save the run to `path`, which is replaced once the new file is complete."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "recipe": vars(self.recipe),
            "shape": self.model.shape,
            "captions": self.pictures.captions,
        }
        torch.save(state, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)

    @classmethod
    def resume(cls, path: Path, pictures: Pictures) -> Training:
        """Load the run saved in `path`. Raises `ValueError` for other pictures."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["captions"] != pictures.captions:
            raise ValueError(f"{path.name} was trained on other pictures: its captions differ")
        training = cls(pictures, Recipe(**state["recipe"]), state["shape"])
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.average, training.step = state["average"], state["step"]
        return training


def run(training: Training, out: Path, steps: int, every: float = 300.0) -> bool:
    """Train up to `steps`, saving to `out` every `every` seconds and at the end.

    Returns whether the run is complete; SIGTERM and SIGINT end it after the current step.
    """
    stopped: list[int] = []

    def stop(number: int, _: Any) -> None:
        stopped.append(number)

    previous = {one: signal.signal(one, stop) for one in (signal.SIGTERM, signal.SIGINT)}
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
                    at = f"step {training.step}/{steps}"
                    print(f"{at}  loss {mean:.4f}  lr {lr:.2e}  {minutes:.1f} min", file=log)
                if time.monotonic() - saved > every:
                    training.save(out / "checkpoint.pt")
                    saved = time.monotonic()
    finally:
        torch.set_num_threads(threads)
        for number, handler in previous.items():
            signal.signal(number, handler)
    training.save(out / "checkpoint.pt")
    return training.step >= steps


def export(training: Training, folder: Path, log: Path, **remarks: Any) -> None:
    """Write the averaged model and the log's last lines to `folder`.

    `remarks` on the pictures are written to the model's `.json` with the recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remarks |= {"recipe": vars(training.recipe), "steps": training.step}
    training.averaged().save(folder / "tiny.safetensors", training=remarks)
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    (folder / "train.log").write_text("\n".join(lines[-20:]) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m lab.demo.train", description=summary)
    parser.add_argument("model", choices=MODELS, help="its training pictures")
    parser.add_argument("--data", type=Path, help="folder of the npm packages, or of photographs")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--export", action="store_true", help="only write weights to weights/")
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
