"""What `speed` and `memory` share: the UNet of the arguments, and everything that runs on it, size by size."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from tomesd_core.settings import MergeSettings

from .contenders import Contender, contenders
from .models import LATENT_FACTOR, SD1, TINY, attention, build_unet, one_step, read_checkpoint
from .options import Size


@dataclasses.dataclass(frozen=True)
class Case:
    """A UNet at one size."""

    size: Size
    unet: nn.Module
    step: Callable[[], Tensor]
    contenders: Sequence[Contender]
    notes: Sequence[str]

    @property
    def size_name(self) -> str:
        """Width and height in pixels."""
        return f"{self.size[0]}x{self.size[1]}"


@contextlib.contextmanager
def cases(args: argparse.Namespace, settings: MergeSettings) -> Iterator[list[Case]]:
    """One case for each of the arguments' sizes, all of one UNet, which has the arguments' attention while open.

    `settings` is how ours merges, at one ratio in all steps; with `--force` also where the rule says that it can't pay.
    """
    settings = dataclasses.replace(settings, schedule="constant", skip_unprofitable=not args.force)
    config, weights = (TINY if args.tiny else SD1), None
    if args.checkpoint is not None:
        config, weights = read_checkpoint(args.checkpoint)
    unet = build_unet(config, args.device, args.torch_dtype, weights)
    with attention(unet, args.attention):
        found = []
        for width, height in args.sizes:
            tokens = (width // LATENT_FACTOR) * (height // LATENT_FACTOR)
            some, notes = contenders(tokens, args.torch_dtype, settings)
            found.append(Case((width, height), unet, one_step(unet, config, (width, height)), some, notes))
        yield found
