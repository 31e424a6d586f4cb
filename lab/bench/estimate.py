"""Estimates what one self-attention layer asks of a GPU, without one: launches, waits, bytes, and times by a roofline.

The layer runs on the meta device, where tensors have shapes and no values, and every operation is recorded. How many
kernels CUDA launches for it is read off ATen's sources. Every time is an estimate: the larger of an operation's bytes
over the card's bandwidth, its products over the card's rate, and 2.5 µs a launch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tomesd_core import layer_hooks, token_map
from tomesd_core.proportional import BIAS_CHANNELS, WIDTH, Heads
from tomesd_core.settings import MergeSettings

from . import output
from .contenders import CORNER, KEYS, PAPER, TODO, TODO_FACTORS, TOKENS, TOMESD_MOST, UNMERGED, match_tomesd, put_on
from .models import OneLayer, attention
from .options import add_shared, fill_in, merge_ratio, whole_number

USUAL = {"tokens": [64, 128], "ratios": [0.5, 0.75, 0.84, 0.9375], "attention": "sdp"}
QUICK = {"tokens": [64], "ratios": [0.75]}
TINY: dict[str, Any] = {}
STEPS = 3
"""The last of them is what is counted: by then constants are kept."""

SHAPES = {"sd15": (320, 8), "sd2": (320, 5), "sdxl": (640, 10)}
"""Channels and heads of the finest self-attention layers."""

LAUNCH_SECONDS, KERNEL_SECONDS, BANDWIDTH_SHARE = 2.5e-6, 5e-6, 0.8


@dataclasses.dataclass(frozen=True)
class Card:
    """What a GPU does, in bytes and operations a second: the makers' data sheets, and published measurements."""

    bandwidth: float
    products: float
    """Dense fp16 products with fp32 sums, as matrices of this size reach it."""
    attention: dict[int, float]
    """FlashAttention 2's forward pass, by the size of heads that its kernels have."""


CARDS = {
    "RTX 4090": Card(1.008e12, 132e12, {64: 161e12, 96: 163e12, 128: 163e12, 192: 150e12}),
    "A100": Card(2.039e12, 225e12, {64: 177e12, 96: 190e12, 128: 203e12, 192: 190e12}),
    "H200": Card(4.8e12, 593e12, {64: 320e12, 96: 345e12, 128: 368e12, 192: 330e12}),
    "RTX 3060": Card(0.36e12, 20.4e12, {64: 24.5e12, 96: 24.5e12, 128: 24.5e12, 192: 22e12}),
}

FUSED = "fused_attention"
"""On the meta device PyTorch would take its fused attention apart: this operation stands for it."""

VIEWS = {
    *("view", "_unsafe_view", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("alias", "detach", "as_strided", "unfold", "narrow", "split", "_reshape_alias", "empty", "empty_like"),
    *("empty_strided", "new_empty", "new_empty_strided", "diagonal", "lift_fresh", "split_with_sizes", "chunk"),
    *("unbind",),
}
READING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "is_nonzero"}
"""Operations whose result the CPU waits for."""
CLONING = {"constant_pad_nd", "scatter", "index_put", "masked_fill"}
"""Operations of two kernels: a fill or a copy, and their own."""
SHORT_ROW = 4096
"""Rows up to this length are sorted by one block; longer ones by radix, a pass for each byte."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on the device."""

    name: str
    launches: int
    inputs: list[Tensor]
    outputs: list[Tensor]

    def seconds(self, card: Card) -> float:
        """About how long it takes."""
        ins, outs = self.inputs, self.outputs
        if self.name == FUSED:
            (items, heads, queries, size), keys = ins[0].shape, ins[1].shape[2]
            wide = next(width for width in (64, 96, 128, 192, 256) if size <= width)
            rate = card.attention.get(wide, card.attention[64])
            rate *= 0.88 if min(queries, keys) <= 1024 else 0.95 if min(queries, keys) <= 2048 else 1
            moved = 4 * items * heads * size * (queries + keys)
            work = 4 * items * heads * queries * keys * wide / rate
            return max(work, moved / card.bandwidth / BANDWIDTH_SHARE) + KERNEL_SECONDS
        moved = sum(map(_bytes, outs))
        if self.name in ("index_select", "gather", "index"):
            moved = 2 * moved + sum(map(_bytes, ins[1:]))  # The rows that it takes, not all.
        else:
            moved += sum(map(_bytes, ins))
        products = 0
        if self.name in ("mm", "addmm", "bmm"):
            products = 2 * outs[0].numel() * ins[-1].shape[-2]
        return max(self.launches * LAUNCH_SECONDS, moved / card.bandwidth / BANDWIDTH_SHARE, products / card.products)


def _bytes(tensor: Tensor) -> int:
    """Of memory: a dimension of stride 0 has none."""
    count = 1
    for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= side if stride else 1
    return count * tensor.element_size()


class Recorder(TorchDispatchMode):
    """While it is open: the operations on the meta device, and what the CPU would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.waits: list[str] = []

    @property
    def launches(self) -> int:
        """Kernels that CUDA would launch."""
        return sum(operation.launches for operation in self.operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        outputs, inputs = _tensors([results]), _tensors([*args, *(kwargs or {}).values()])
        devices = {tensor.device.type for tensor in inputs + outputs if tensor.ndim}
        if (name in READING and devices != {"cpu"}) or len(devices) > 1:
            self.waits.append(name)
        if devices != {"cpu"} and (launches := _launches(name, args, outputs)):
            self.operations.append(Operation(name, launches, inputs, outputs))
        return results


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among the values, and in lists of them."""
    each = (one for value in values for one in (value if isinstance(value, (list, tuple)) else [value]))
    return [one for one in each if isinstance(one, Tensor)]


def _launches(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """How many kernels CUDA launches for an operation."""
    if name in VIEWS or (outputs and all(tensor.numel() == 0 for tensor in outputs)):
        return 0
    if name in CLONING:
        return 2
    if name in ("sort", "argsort"):
        values = args[0]
        numbers = [each for each in args[1:] if isinstance(each, int) and not isinstance(each, bool)]
        length = values.shape[numbers[0] if numbers else -1]
        if length <= SHORT_ROW:
            return 4
        return values.element_size() + (4 if values.numel() == length else 11)
    return 7 if name == "scatter_reduce" else 1


def record(side: int, shape: tuple[int, int], dtype: torch.dtype, name: str, ratio: float, **settings: Any) -> Recorder:
    """One call of a layer with a contender on it, batch 2, once its constants are kept. `settings` are ours."""
    _define_fused()
    channels, heads = shape
    with torch.device("meta"):
        layer = OneLayer(channels, heads).to(dtype).eval().requires_grad_(False)
        image = torch.empty(2, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)
    how = MergeSettings(**{"schedule": "constant", "skip_unprofitable": False, **settings})
    with _as_cuda(), attention(layer, "sdp"), torch.no_grad():
        if name == CORNER:
            with Recorder() as recorder:
                x = image.permute(0, 2, 3, 1).flatten(1, 2)
                merge, unmerge = match_tomesd(x, (side, side), ratio, step=0, use_rand=False)
                unmerge(layer.block.attn1(merge(layer.block.norm1(x))))
            return recorder
        with put_on(layer, name, ratio, how) as running:
            for step in range(STEPS):
                running.begin_step(step, 20)
                with Recorder() as recorder:
                    layer(image)
    return recorder


@contextlib.contextmanager
def _as_cuda() -> Iterator[None]:
    """While open, the meta device takes the branches that CUDA takes, and an attention has the scale of its heads."""

    def known(attention: Any, x: Tensor, run: Any) -> Heads:
        size = x.shape[-1] // attention.heads
        wide = -(-(size + BIAS_CHANNELS) // WIDTH) * WIDTH
        return Heads(attention.heads, size, wide, wide**-0.5)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return getattr(torch.ops.tome_estimate, FUSED)(q, k, v)

    with (
        patch.object(token_map, "BAG_DEVICES", {"meta"}),
        patch.object(layer_hooks, "probe_heads", known),
        patch.object(F, "scaled_dot_product_attention", fused),
    ):
        yield


@functools.cache
def _define_fused() -> torch.library.Library:
    """Makes the operation; what it returns keeps it."""
    library = torch.library.Library("tome_estimate", "DEF")
    library.define(f"{FUSED}(Tensor q, Tensor k, Tensor v) -> Tensor")
    # As FlashAttention lays its output.
    shape = lambda q, k, v: q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # noqa: E731
    library.impl(FUSED, shape, "Meta")
    return library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench estimate`."""
    add_shared(parser, rounds=False)
    parser.set_defaults(dtype="float16")
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=[*SHAPES], help="whose finest layer")
    parser.add_argument("--tokens", type=whole_number, nargs="+", metavar="SIDE", help="sides of square token grids")
    parser.add_argument("--ratios", type=merge_ratio, nargs="+", metavar="R", help="shares of the tokens to remove")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)


COLUMNS: output.Columns = {
    "model": ("model", str),
    "grid": ("tokens", str),
    "contender": ("contender", str),
    "ratio": ("ratio", output.number(4)),
    "launches": ("launches", str),
    "waits": ("waits", str),
    "bytes": ("MB moved", output.number(1, 1e-6)),
    **{card: (f"{card}, estimated times faster", output.number(2)) for card in CARDS},
}


def run(args: argparse.Namespace) -> None:
    """Records, prints the table, writes `estimate.csv`."""
    fill_in(args, USUAL, QUICK, TINY)
    rows: list[dict[str, object]] = []
    for model in args.models:
        for side in args.tokens:
            whole = record(side, SHAPES[model], args.torch_dtype, UNMERGED, 0.0)
            rows.append(_row(model, side, UNMERGED, None, whole, whole))
            for ratio in args.ratios:
                for name in contenders_at(ratio):
                    merged = record(side, SHAPES[model], args.torch_dtype, name, ratio)
                    rows.append(_row(model, side, name, ratio, merged, whole))
    machine = output.this_machine(torch.device("meta"), args.dtype, args.command)
    file = args.out / "estimate.csv"
    output.write_csv(file, rows, machine)
    notes = ["every time is an estimate, by a roofline; none was measured"]
    output.show(output.table(COLUMNS, rows), machine, notes, [file])


def contenders_at(ratio: float) -> list[str]:
    """Who can remove this ratio."""
    names = [KEYS, TOKENS, PAPER]
    names += [CORNER] if ratio <= TOMESD_MOST else []
    return names + ([TODO] if ratio in TODO_FACTORS else [])


def _row(
    model: str, side: int, name: str, ratio: float | None, recorder: Recorder, whole: Recorder
) -> dict[str, object]:
    moved = sum(_bytes(each) for one in recorder.operations for each in one.inputs + one.outputs)
    row = {"model": model, "grid": f"{side}x{side}", "contender": name, "ratio": ratio}
    row |= {"launches": recorder.launches, "waits": len(recorder.waits), "bytes": moved}
    for card_name, card in CARDS.items():
        times = [sum(one.seconds(card) for one in each.operations) for each in (whole, recorder)]
        row[card_name] = times[0] / times[1]
    return row
