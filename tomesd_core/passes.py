"""State that the hooks on one UNet share: the current step, pass and calls, for each thread."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .settings import MergeSettings
from .token_map import TokenMap

if TYPE_CHECKING:
    from .calls import Call

Grid = tuple[int, int]
"""Rows and columns."""

MapMaker = Callable[[int], TokenMap]
"""Makes the map that removes a number of tokens, by one matching."""


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
        self.map_makers: dict[tuple[Any, ...], MapMaker] = {}
        """Of the matchings kept for the steps that reuse them."""
        self.kept_tokens = 0


def grid_of(x: Any) -> Grid | None:
    """The rows and columns of an image [B, C, H, W]; None for anything else."""
    return (x.shape[2], x.shape[3]) if isinstance(x, Tensor) and x.ndim == 4 else None
