"""Draw docs/algorithm.png: how one layer of a real picture merges, by the core's own code.

`python -m lab.figure docs/algorithm.png` needs ldm and matplotlib, as the benchmarks do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomesd_core import MergeSettings
from tomesd_core.matching import match
from tomesd_core.partition import make_partition
from tomesd_core.plan import tokens_removed
from tomesd_core.token_map import TokenMap
from tomesd_core.unet import find_layers

from .bench.packages import require
from .bench.samplers import SAMPLERS, Guidance
from .demo.model import TinyModel

PROMPT, SEED, SCALE, STEPS, AT_STEP, RATIO = "cat face", 1, 3.0, 20, 14, 0.85
QUERY = (12, 11)
"""Row and column of the token whose attention is shown."""


def make_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m lab.figure", description=summary)
    parser.add_argument("out", type=Path, help="a PNG")
    return parser


def draw(path: Path) -> None:
    """Write the figure to `path`."""
    picture, x, queries, keys = _layer_inputs()
    side = picture.shape[0]
    settings = MergeSettings(ratio=RATIO, skip_unprofitable=False)
    partition = make_partition((side, side), settings.cell, window=settings.window)
    removed = tokens_removed(side * side, settings.ratio, rounded=True)
    token_map = match(x, partition).token_map(removed)
    destinations = partition.dst[0]

    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    pyplot.rcParams["axes.titlesize"] = 10
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 9), layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    rows, columns = settings.cell

    axis = axes[0, 0]
    axis.imshow(picture)
    axis.set_title(f"1. {side}×{side} tokens, a destination in each {rows}×{columns} cell")
    for at in range(0, side + 1, rows):
        axis.axhline(at - 0.5, color="grey", linewidth=0.5)
        axis.axvline(at - 0.5, color="grey", linewidth=0.5)
    axis.plot(destinations % side, destinations // side, "s", color="red", markersize=4)

    _draw_sources(axes[0, 1], picture, token_map, destinations)
    axes[0, 1].set_title(f"2. {removed} sources are merged into their most similar destination")

    means = token_map.merge(torch.from_numpy(picture).float().view(1, side * side, 3))
    axes[0, 2].imshow(token_map.unmerge(means).view(side, side, 3).numpy().clip(0, 1))
    axes[0, 2].set_title(f"3. {token_map.merged_tokens} slots, each the mean of its tokens")

    counts = token_map.counts[0]
    place = QUERY[0] * side + QUERY[1]
    merged = token_map.merge(keys)[0]
    logits, merged_logits = (queries[0, place] @ one.T for one in (keys[0], merged))
    every = logits.softmax(0)
    weighted = (merged_logits + counts.log()).softmax(0)
    unweighted = merged_logits.softmax(0)
    maps = {
        "4. One query (+) attends to all keys": every,
        "5. To merged keys, log n added": (weighted / counts)[token_map.slots[0]],
        "Without log n": (unweighted / counts)[token_map.slots[0]],
    }
    highest = float(every.max())
    for axis, (title, weights) in zip(axes[1], maps.items(), strict=True):
        axis.imshow(weights.view(side, side).numpy(), vmin=0, vmax=highest, cmap="viridis")
        axis.plot(QUERY[1], QUERY[0], "+", color="red", markersize=12)
        elsewhere = float((weights - every).abs().sum()) / 2
        suffix = "" if weights is every else f": {elsewhere:.0%} of the weight elsewhere"
        axis.set_title(f"{title}{suffix}")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_sources(
    axis: Any, picture: np.ndarray, token_map: TokenMap, destinations: Tensor
) -> None:
    side = picture.shape[0]
    axis.imshow(picture, alpha=0.6)
    slots = token_map.slots[0]
    # Only every fourth destination's: all sources would hide each other.
    destination_of = {int(slots[one]): int(one) for one in destinations[::4]}
    for token, slot in enumerate(slots.tolist()):
        end = destination_of.get(slot, token)
        if end != token:
            columns, rows = [token % side, end % side], [token // side, end // side]
            axis.plot(columns, rows, color="black", linewidth=0.4)
    axis.plot(destinations % side, destinations // side, "s", color="red", markersize=3)


def _layer_inputs() -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Picture [H, W, 3], block input [1, N, C], one head's scaled queries and keys [1, N, d]."""
    model = TinyModel.load("emoji")
    layers = reversed(find_layers(model.model.diffusion_model))
    layer = next(layer for layer in layers if layer.is_self_attention)
    seen: dict[str, Tensor] = {}

    is_seeing = [False]

    def see(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor | None = None) -> None:
            if is_seeing[0]:
                seen[name] = (args[0] if output is None else output)[-1:]

        return hook

    attention = layer.block.attn1
    layer.block.register_forward_pre_hook(see("x"))
    for name in ("to_q", "to_k"):
        getattr(attention, name).register_forward_hook(see(name))

    def begin_step(step: int) -> None:
        is_seeing[0] = step == AT_STEP

    noise = torch.randn(1, *model.image_shape, generator=torch.Generator().manual_seed(SEED))
    guidance = Guidance(model.encode_prompts([PROMPT]), model.encode_prompts([""]), SCALE)
    latent = SAMPLERS["PLMS"](model, noise, guidance, STEPS, begin_step)
    size = seen["to_q"].shape[-1] // attention.heads
    picture = model.to_rgb(latent)[0].permute(1, 2, 0).numpy()
    return picture, seen["x"], seen["to_q"][..., :size] * attention.scale, seen["to_k"][..., :size]


if __name__ == "__main__":
    with torch.no_grad():
        draw(make_parser().parse_args().out)
