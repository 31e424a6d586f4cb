"""A call of `attn1`: its arguments, and what is kept of it until its output is known."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .proportional import Weighted
from .reasons import NotMerged
from .token_map import TokenMap
from .unet import Names

ODD_OUTPUT = "its attention returned an unexpected shape"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of a call of `attn1`; x, context and mask may be positional."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: Names

    def _get(self, place: int, name: str) -> Any:
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    @property
    def x(self) -> Any:
        """The tokens, [B, N, C]."""
        return self._get(0, self.names.hidden)

    @property
    def context(self) -> Any:
        """The tokens attended to; None for the tokens themselves."""
        return self._get(1, self.names.context)

    @property
    def mask(self) -> Any:
        """The attention mask, if any."""
        return self._get(2, self.names.mask)

    @property
    def attends_to_itself(self) -> bool:
        """Whether the keys are computed from x."""
        return self.context is None or self.context is self.x

    def each(self, change: Callable[[Any], Any]) -> Inputs:
        """Apply `change` to every argument."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return Inputs(tuple(map(change, self.args)), kwargs, self.names)

    def replaced(self, place: int, name: str, value: Any) -> Inputs:
        """Replace one argument, by position if it is positional."""
        if place < len(self.args):
            args = (*self.args[:place], value, *self.args[place + 1 :])
            return dataclasses.replace(self, args=args)
        return dataclasses.replace(self, kwargs={**self.kwargs, name: value})

    def held_weakly(self) -> Inputs:
        """Replace every argument by a function that returns it; tensors are held weakly."""
        return self.each(_weak)

    def recovered(self) -> Inputs:
        """Undo `held_weakly`."""
        return self.each(lambda value: value())


@dataclasses.dataclass
class Call:
    """A call of `attn1` in progress: unmerged, unless it is a `MergedCall`."""

    weighted: Weighted | None = None
    """The behaviour of the hooks on its projections."""


@dataclasses.dataclass(kw_only=True)
class MergedCall(Call):
    """A call of `attn1` in progress with merged inputs."""

    inputs: Inputs
    """The original arguments, from `Inputs.held_weakly`."""
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
        raise NotMerged(ODD_OUTPUT)


def _weak(value: Any) -> Callable[[], Any]:
    return weakref.ref(value) if isinstance(value, Tensor) else lambda: value
