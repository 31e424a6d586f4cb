"""State that the hooks on one UNet share: the current step, pass and calls, for each thread."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from .proportional import Weighted
from .reasons import NotMerged
from .settings import MergeSettings
from .token_map import TokenMap
from .unet import Names

Grid = tuple[int, int]
"""Rows and columns."""


@dataclasses.dataclass
class Step:
    """One step of the sampling; each step has a new one."""

    number: int
    ratio: float
    cell: tuple[int, int]
    """Rows and columns of the cell that has one destination."""
    passes: int = 0
    """UNet passes in this step so far."""
    has_merged: bool = False


@dataclasses.dataclass
class Place:
    """Grid and level of a SpatialTransformer in the current pass, and its reason not to merge."""

    grid: Grid | None = None
    level: int | None = None
    """The measured level."""
    reason: str | None = None


class Inputs:
    """The arguments of a call of `attn1`; x, context and mask may be positional.

    `x` is the tokens, [B, N, C], and `context` those attended to; None: x itself.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names) -> None:
        self.args, self.kwargs, self.names = args, kwargs, names
        named = (names.hidden, names.context, names.mask)[len(args) :]
        self.x, self.context, self.mask = (*args, *map(kwargs.get, named))[:3]
        self.attends_to_itself = self.context is None or self.context is self.x

    def each(self, change: Callable[[Any], Any]) -> Inputs:
        """Apply `change` to every argument."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return Inputs(tuple(map(change, self.args)), kwargs, self.names)

    def replaced(self, place: int, name: str, value: Any) -> Inputs:
        """Replace one argument, by position if it is positional."""
        if place < len(self.args):
            args = (*self.args[:place], value, *self.args[place + 1 :])
            return Inputs(args, self.kwargs, self.names)
        return Inputs(self.args, {**self.kwargs, name: value}, self.names)


@dataclasses.dataclass
class Call:
    """A call of `attn1` in progress: unmerged, unless it is a `MergedCall`."""

    weighted: Weighted | None = None
    """The behaviour of the hooks on its projections."""


@dataclasses.dataclass(kw_only=True)
class MergedCall(Call):
    """A call of `attn1` in progress with merged inputs."""

    inputs: Inputs
    """The original arguments, each by `held_weakly`."""
    token_map: TokenMap
    has_merged_queries: bool
    output: Any = None
    """The unmerged output, if the call had to be repeated unmerged."""

    def unmerge(self, output: Any) -> Any:
        """The output for every token. Raises `NotMerged` if its shape doesn't fit the inputs."""
        (items, tokens), merged = self.token_map.shape, self.token_map.merged_tokens
        is_merged = isinstance(output, Tensor) and output.shape[:2] == (items, merged)
        if self.has_merged_queries and is_merged:
            return self.token_map.unmerge(output)
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.ndim == 3 and first.shape[1] == tokens:
            return output
        raise NotMerged("its attention returned an unexpected shape")


def held_weakly(value: Any) -> Callable[[], Any]:
    """A function that returns the value, and keeps no tensor alive."""
    return weakref.ref(value) if isinstance(value, Tensor) else lambda: value


@dataclasses.dataclass
class LayerPass:
    """One layer in the current pass."""

    normed: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
    """The block's input and norm1's output, held weakly so that no activation outlives its use."""
    calls: list[Call] = dataclasses.field(default_factory=list)
    """The calls of attention in progress, innermost last."""
    matched_calls: int = 0


class Passes(threading.local):
    """Per-thread state of the passes."""

    def __init__(self, settings: MergeSettings, ratio: float | None = None) -> None:
        self.step = Step(-1, settings.ratio_at(0.0) if ratio is None else ratio, settings.cell)
        self.counts_passes = True
        self.latent: Grid | None = None
        self.is_checkpointed = False
        self.places: dict[weakref.ref[nn.Module], Place] = {}
        self.layers: defaultdict[Hashable, LayerPass] = defaultdict(LayerPass)
        self.map_makers: dict[tuple[Any, ...], Callable[[int], TokenMap]] = {}
        """`Matching.token_map` of the matchings kept for the steps that reuse them."""
        self.kept_tokens = 0


def grid_of(x: Any) -> Grid | None:
    """The rows and columns of an image [B, C, H, W]; None for anything else."""
    return (x.shape[2], x.shape[3]) if isinstance(x, Tensor) and x.ndim == 4 else None
