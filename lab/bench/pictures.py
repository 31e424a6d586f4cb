"""Pictures of a tiny model, with and without merging, cached on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tomesd_core import hooks, matching, partition, plan, proportional, token_map
from tomesd_core.settings import progress_of

from ..demo.model import TinyModel
from . import peers
from .contenders import UNWEIGHTED, Unweighted
from .models import attention
from .options import DTYPES
from .packages import require
from .peers import ATTACH_PEER, CA_TOME, CORNER, QUERIES, RANDOM, Attached
from .samplers import SAMPLERS, Guidance
from .timing import timed
from .variants import Variant

BATCH = 8
"""Pictures made at once and kept in one file; larger batches were no faster on a CPU."""

UNTRAINED = "untrained"
"""Name of a smaller model with random weights."""

PACKAGES = {**dict.fromkeys((CORNER, RANDOM, QUERIES), "tomesd"), CA_TOME: "ca-tome"}

TINY_SHAPE = {"image_size": 8, "channel_mult": [1, 1, 1], "context_dim": 32}
TINY_CAPTIONS = ("cat face", "red apple", "red cat", "apple face", "apple")


class Batch(NamedTuple):
    """Pictures that were made at once."""

    pictures: Tensor
    """uint8, [N, H, W, 3]."""
    seconds: float
    merged: str
    pairs: float
    """Fraction of query-key pairs left in merged layers; NaN if the ratio alone decides."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Everything that pictures depend on except their number and variant."""

    name: str
    """One of `MODELS`, or `UNTRAINED`."""
    steps: int
    """Steps of variants without their own; they divide 1000."""
    scale: float
    attention: str
    dtype: str
    device: torch.device
    side: int | None = None
    """Side of a picture in pixels; None for the model's own."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        channels, height, width = self.model().image_shape
        return channels, self.side or height, self.side or width

    def model(self) -> TinyModel:
        """The model, cached. Raises `FileNotFoundError` if its weights are missing."""
        return _model(self.name, self.device)

    def captions(self, count: int) -> list[int]:
        """Caption numbers of the first `count` pictures.

        All captions take turns in a fixed random order, since the model's neighbours are alike.
        """
        captions = len(self.model().captions)
        order = torch.randperm(captions, generator=torch.Generator().manual_seed(0)).tolist()
        return [order[number % captions] for number in range(count)]

    def steps_of(self, variant: Variant) -> int:
        """Number of steps of a variant."""
        return variant.steps or self.steps

    def make(self, variant: Variant, first: int) -> Batch:
        """Make `BATCH` pictures from number `first` on."""
        model = self.model()
        unet, dtype = model.model.diffusion_model, DTYPES[self.dtype]
        # Older torch refuses an autocast to fp32, even a disabled one.
        wide = dtype == torch.float32
        narrow = contextlib.nullcontext() if wide else torch.autocast(self.device.type, dtype)
        # `tomesd` draws from a copy of the global random state, made in its first call.
        with torch.random.fork_rng(devices=[]), attention(unet, self.attention), narrow:
            torch.manual_seed(first)
            with variant.attach(unet) as attached:
                work = functools.partial(self._sample, variant, first, attached)
                seconds, x = timed(work, self.device)
                merged, pairs = attached.describe(), attached.pairs()
        pictures = model.to_rgb(x).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
        return Batch(pictures, seconds, merged, math.nan if pairs is None else pairs)

    def _sample(self, variant: Variant, first: int, attached: Attached) -> Tensor:
        """Sample latents [B, 3, H, W]; picture i starts from the noise of seed `first` + i."""
        model, steps = self.model(), self.steps_of(variant)
        numbers = range(first, first + BATCH)
        prompts = [model.captions[number] for number in self.captions(first + BATCH)[first:]]
        seeded = [torch.Generator().manual_seed(number) for number in numbers]
        noise = [torch.randn(self.image_shape, generator=generator) for generator in seeded]
        x = torch.stack(noise).to(self.device)
        contexts = (model.encode_prompts(some) for some in (prompts, [""] * BATCH))
        guidance = Guidance(*contexts, self.scale)

        def begin_step(step: int) -> None:
            attached.begin_step(step, steps)

        return SAMPLERS[variant.sampler](model, x, guidance, steps, begin_step)

    def digest(self, variant: Variant) -> str:
        """Digest of model, pipeline, variant and merging code, on which the pictures depend."""
        code: list[object] = []
        if variant.settings is not None:
            # Resolved values; the text of the settings' module has labels and defaults too.
            steps = self.steps_of(variant)
            settings = variant.settings.in_steps(steps)
            ratios = [settings.ratio_at(progress_of(step, steps)) for step in range(steps)]
            code += [_code_digest(), settings.cell, settings.redraws, settings.exact, ratios]
        if package := PACKAGES.get(variant.contender):
            code.append(importlib.metadata.version(package))
        elif variant.contender in ATTACH_PEER:
            code.append(inspect.getsource(peers))
        if variant.contender == UNWEIGHTED:
            code.append(inspect.getsource(Unweighted))
        how = [self.scale, self.attention, self.dtype, self.device.type, self.image_shape]
        how += [BATCH, Batch._fields, torch.__version__]
        way = {**dataclasses.asdict(variant), "steps": self.steps_of(variant)}
        everything = [_model_digest(self.model()), how, way, code]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _model(name: str, device: torch.device) -> TinyModel:
    require("ldm.modules.diffusionmodules.openaimodel")
    if name != UNTRAINED:
        return TinyModel.load(name).to(device)
    model = TinyModel.random(**TINY_SHAPE)
    model.captions = list(TINY_CAPTIONS)
    return model.to(device)


@functools.lru_cache(maxsize=1)
def _model_digest(model: TinyModel) -> str:
    digest = hashlib.sha256(json.dumps([model.shape, model.words, model.captions]).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _code_digest() -> str:
    modules = (hooks, matching, partition, plan, proportional, token_map)
    sources = [inspect.getsource(module) for module in modules]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A variant's pictures."""

    pixels: Tensor
    seconds: float
    """Per picture, the median over its batches, which are made one after the other."""
    merged: str
    pairs: float


@dataclasses.dataclass(frozen=True)
class PictureCache:
    """Cache of pictures: a folder per variant, named by its digest, with a file per batch."""

    folder: Path
    pipeline: Pipeline

    def missing(self, variants: Sequence[Variant], count: int) -> dict[Path, tuple[Variant, int]]:
        """Missing batches of the variants' first `count` pictures, by file.

        Variants take turns, so that a slow minute of the machine affects all alike.
        """
        # Keyed by file: a variant that names the pipeline's number of steps has the same pictures.
        batches = [(variant, first) for first in range(0, count, BATCH) for variant in variants]
        by_path = {self._path(*batch): batch for batch in batches}
        return {path: batch for path, batch in by_path.items() if not path.is_file()}

    def make(
        self, batches: Sequence[tuple[Variant, int]], processes: int, threads: int
    ) -> Iterator[Variant]:
        """Make batches in parallel; yield the variant of each, in order, once it is saved."""
        if processes == 1 or len(batches) < 2:
            for batch in batches:
                yield self._make(batch)
            return
        # Tensors are so small that two single-threaded processes beat one of two threads.
        spawning = multiprocessing.get_context("spawn")
        with spawning.Pool(min(processes, len(batches)), torch.set_num_threads, (threads,)) as pool:
            yield from pool.imap(self._make, batches)

    def read(self, variant: Variant, count: int) -> Pictures:
        """Read a variant's first `count` pictures, all of which must have been made."""
        batches = []
        for first in range(0, count, BATCH):
            with np.load(self._path(variant, first)) as arrays:
                batches.append({name: arrays[name] for name in arrays.files})
        pixels = np.concatenate([batch["pictures"] for batch in batches])[:count]
        seconds = float(np.median([batch["seconds"] for batch in batches])) / BATCH
        pairs = float(np.mean([batch["pairs"] for batch in batches]))
        return Pictures(torch.from_numpy(pixels), seconds, str(batches[0]["merged"]), pairs)

    def _make(self, batch: tuple[Variant, int]) -> Variant:
        variant, first = batch
        made = self.pipeline.make(variant, first)
        path = self._path(variant, first)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed once it is complete, so that an interrupted run leaves no partial batch.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **{**made._asdict(), "pictures": made.pictures.numpy()})
        os.replace(partial, path)
        return variant

    def _path(self, variant: Variant, first: int) -> Path:
        return self.folder / self.pipeline.digest(variant) / f"{first:05d}.npz"
