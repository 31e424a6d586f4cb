"""One call of a layer's self-attention, recorded, and the same merge done by hand."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tomesd_core as tome
from tomesd_core.foreign_hooks import Hook
from tomesd_core.matching import match
from tomesd_core.partition import make_partition
from tomesd_core.unet import Layer, find_layers

FIRST = "input_blocks.1.1.transformer_blocks.0"
"""Name of a UNet's first block, at level 1."""
SD1 = {"attention_resolutions": [1, 2, 4], "channel_mult": (1, 1, 1, 1)}
"""Options of a UNet with SD 1.5's levels."""


@contextlib.contextmanager
def recorded(unet: nn.Module) -> Iterator[dict[str, Any]]:
    """The last call of each layer, by name.

    A call has the token grid, the block's input `x`, norm1's output `y`, the queries' input `q`
    and attention's output. The last hook is marked as the extension's own, since a layer with a
    foreign hook on its output isn't merged.
    """
    calls: dict[str, Any] = {}

    def tap(layer: Layer) -> list[Any]:
        transformer, norm1, attn1 = layer.transformer, layer.block.norm1, layer.block.attn1
        calls[layer.name] = types.SimpleNamespace(attn=attn1)
        note = vars(calls[layer.name]).update
        return [
            transformer.register_forward_pre_hook(lambda _, args: note(grid=args[0].shape[2:])),
            norm1.register_forward_hook(lambda _, args, y: note(x=args[0], y=y)),
            attn1.to_q.register_forward_pre_hook(lambda _, args: note(q=args[0])),
            attn1.register_forward_hook(Hook(lambda _, args, output: note(output=output))),
        ]

    with contextlib.ExitStack() as handles:
        for handle in itertools.chain(*map(tap, find_layers(unet))):
            handles.enter_context(handle)
        yield calls


def assert_merged(call: Any, settings: tome.MergeSettings, step: int = 0) -> None:
    """Attention saw norm1's output merged by the block's input, and its output was unmerged."""
    removed = call.y.shape[1] - call.q.shape[1]
    assert removed > 0
    if settings.window is None:
        assert removed == int(call.y.shape[1] * settings.ratio)
    split = make_partition(
        call.grid,
        settings.cell,
        settings.partition,
        step if settings.redraws else 0,
        settings.window,
        1 if settings.shared_draw else call.x.shape[0],
    )
    the_map = match(call.x, split, settings.exact).token_map(removed)
    assert torch.equal(call.q, the_map.merge(call.y))
    expected = the_map.unmerge(call.attn.forward(the_map.merge(call.y)))
    torch.testing.assert_close(call.output, expected, rtol=0, atol=1e-6)


def assert_unmerged(call: Any) -> None:
    assert call.q is call.y
    assert call.output.shape == call.y.shape


def assert_merged_alone(
    output: Tensor, attention: Any, y: Tensor, of: Tensor | None = None, **options: Any
) -> None:
    """`output` is that of one call of attention on `y`, merged by the similarity of `of` or `y`."""
    the_map = tome.match_tokens(y if of is None else of, (16, 12), 0.5, window=None)
    expected = the_map.unmerge(attention.forward(the_map.merge(y), **options))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
