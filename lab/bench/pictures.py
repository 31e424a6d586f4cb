"""Pictures of a tiny model, made with and without merging, and kept on disk: what was made is never
made again."""

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

from tomesd_core import hooks, matching, partition, plan, proportional, schedule, token_map

from ..demo.model import TinyModel
from . import peers
from .contenders import UNWEIGHTED, Unweighted
from .models import attention
from .options import DTYPES
from .packages import require
from .peers import CA_TOME, CORNER, PUT_ON, QUERIES, RANDOM, Running
from .samplers import SAMPLERS
from .timing import timed
from .variants import Variant

CHUNK = 8
"""Pictures made at once, and kept in one file; guidance doubles them. On a CPU more at once were no
faster."""

UNTRAINED = "untrained"
"""A smaller model of random weights, in a trained one's place."""

PACKAGES = {**dict.fromkeys((CORNER, RANDOM, QUERIES), "tomesd"), CA_TOME: "ca-tome"}
"""By contender, whose code it is."""

TINY_SHAPE = {"image_size": 8, "channel_mult": [1, 1, 1], "context_dim": 32}
TINY_CAPTIONS = ("cat face", "red apple", "red cat", "apple face", "apple")


class Chunk(NamedTuple):
    """Pictures that were made at once."""

    pictures: Tensor
    """uint8, [N, H, W, 3]."""
    seconds: float
    merged: str
    """What was merged, for people; may be empty."""
    pairs: float
    """The share of query-key pairs that was left in merged layers; NaN where the ratio alone
    decides."""


@dataclasses.dataclass(frozen=True)
class Studio:
    """All that pictures depend on besides their number and the way to merge."""

    name: str
    """The model's: one of `MODELS`, or `UNTRAINED`."""
    steps: int
    """Where a variant doesn't say; they divide 1000."""
    scale: float
    """Of classifier-free guidance."""
    attention: str
    dtype: str
    device: torch.device
    side: int | None = None
    """Of a picture, in pixels; None: the model's own."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        channels, height, width = self.model().image_shape
        return channels, self.side or height, self.side or width

    def model(self) -> TinyModel:
        """The model, which later calls give again. Raises `FileNotFoundError` where its weights are
        missing."""
        return _model(self.name, self.device)

    def captions(self, count: int) -> list[int]:
        """The numbers of the captions that the first `count` pictures are made of.

        All captions in turn, in an order that is drawn once: those that come after each other in
        the model are alike.
        """
        captions = len(self.model().captions)
        order = torch.randperm(captions, generator=torch.Generator().manual_seed(0)).tolist()
        return [order[number % captions] for number in range(count)]

    def steps_of(self, variant: Variant) -> int:
        """In how many steps a variant's pictures are made."""
        return variant.steps or self.steps

    def make(self, variant: Variant, first: int) -> Chunk:
        """`CHUNK` pictures from number `first` on."""
        model = self.model()
        prompts = [model.captions[number] for number in self.captions(first + CHUNK)[first:]]
        unet, dtype = model.model.diffusion_model, DTYPES[self.dtype]
        # Older torch refuses to make an autocast to fp32, even one that is off.
        wide = dtype == torch.float32
        narrow = contextlib.nullcontext() if wide else torch.autocast(self.device.type, dtype)
        # `tomesd` draws from a copy of the global random state, which is made in its first call.
        with torch.random.fork_rng(devices=[]), attention(unet, self.attention), narrow:
            torch.manual_seed(first)
            with variant.put_on(unet) as running:
                work = functools.partial(self._sample, model, prompts, first, running, variant)
                seconds, x = timed(work, self.device)
                merged, pairs = running.describe(), running.pairs()
        pictures = model.to_rgb(x).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
        return Chunk(pictures, seconds, merged, math.nan if pairs is None else pairs)

    def _sample(
        self,
        model: TinyModel,
        prompts: Sequence[str],
        first: int,
        running: Running,
        variant: Variant,
    ) -> Tensor:
        """[B, 3, H, W]; picture i starts from the noise of seed `first` + i."""
        steps = self.steps_of(variant)
        noise = [
            torch.randn(self.image_shape, generator=torch.Generator().manual_seed(first + number))
            for number in range(len(prompts))
        ]
        return SAMPLERS[variant.sampler](
            model,
            torch.stack(noise).to(self.device),
            model.encode_prompts(prompts),
            model.encode_prompts([""] * len(prompts)),
            self.scale,
            steps,
            lambda step: running.begin_step(step, steps),
        )

    def digest(self, variant: Variant) -> str:
        """Of all that a variant's pictures depend on: the model, how it is run, and the code that
        merges."""
        code: list[object] = []
        if variant.settings is not None:
            # What settings come to, besides their values: not the text of their module, with its
            # labels and defaults.
            code += [
                _code_digest(),
                variant.settings.cell,
                variant.settings.draws_anew,
                variant.settings.exact,
            ]
        if package := PACKAGES.get(variant.contender):
            code.append(importlib.metadata.version(package))
        elif variant.contender in PUT_ON:
            code.append(inspect.getsource(peers))
        if variant.contender == UNWEIGHTED:
            code.append(inspect.getsource(Unweighted))
        how = [
            self.scale,
            self.attention,
            self.dtype,
            self.device.type,
            self.image_shape,
            CHUNK,
            Chunk._fields,
            torch.__version__,
        ]
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
    modules = (hooks, matching, partition, plan, proportional, schedule, token_map)
    sources = [inspect.getsource(module) for module in modules]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Series:
    """A variant's pictures."""

    pictures: Tensor
    """uint8, [N, H, W, 3]."""
    seconds: float
    """A picture: the median over its chunks. They are made one after the other, not in rounds."""
    merged: str
    pairs: float
    """As of a `Chunk`; the mean."""


@dataclasses.dataclass(frozen=True)
class Album:
    """The folder that pictures are kept in: a folder a variant, by its digest, and a file a chunk."""

    folder: Path
    studio: Studio

    def missing(self, variants: Sequence[Variant], count: int) -> dict[Path, tuple[Variant, int]]:
        """The chunks, by the file that each is kept in, that the variants' first `count` pictures
        lack.

        In turns: a slow minute of the machine falls on all variants alike.
        """
        # By where they are kept: the studio's number of steps, and the same said by a variant, give
        # the same pictures.
        chunks = [(variant, first) for first in range(0, count, CHUNK) for variant in variants]
        by_path = {self._path(*chunk): chunk for chunk in chunks}
        return {path: chunk for path, chunk in by_path.items() if not path.is_file()}

    def make(
        self, chunks: Sequence[tuple[Variant, int]], processes: int, threads: int
    ) -> Iterator[Variant]:
        """Makes chunks, in so many processes of so many threads; gives the variant of each, in
        order, once kept."""
        if processes == 1 or len(chunks) < 2:
            for chunk in chunks:
                yield self._make(chunk)
            return
        # Of tensors as small as these, two are computed faster side by side than each by two
        # threads.
        spawning = multiprocessing.get_context("spawn")
        with spawning.Pool(min(processes, len(chunks)), torch.set_num_threads, (threads,)) as pool:
            yield from pool.imap(self._make, chunks)

    def read(self, variant: Variant, count: int) -> Series:
        """The first `count` pictures of a variant, all of which must have been made."""
        chunks = []
        for first in range(0, count, CHUNK):
            with np.load(self._path(variant, first)) as arrays:
                chunks.append({name: arrays[name] for name in arrays.files})
        pictures = torch.from_numpy(np.concatenate([chunk["pictures"] for chunk in chunks])[:count])
        seconds = float(np.median([chunk["seconds"] for chunk in chunks])) / CHUNK
        return Series(
            pictures,
            seconds,
            str(chunks[0]["merged"]),
            float(np.mean([chunk["pairs"] for chunk in chunks])),
        )

    def _make(self, chunk: tuple[Variant, int]) -> Variant:
        variant, first = chunk
        made = self.studio.make(variant, first)
        path = self._path(variant, first)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under its own name only once it is whole: an interrupted run leaves no half chunk to be
        # read.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **{**made._asdict(), "pictures": made.pictures.numpy()})
        os.replace(partial, path)
        return variant

    def _path(self, variant: Variant, first: int) -> Path:
        return self.folder / self.studio.digest(variant) / f"{first:05d}.npz"
