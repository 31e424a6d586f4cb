"""Estimates what a self-attention layer, or a whole guided step, asks of a GPU, without one: by
`roofline`.

Launches, waits, bytes, memory, and how many times faster than unmerged. Every time is an estimate.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tomesd_core import layer_hooks, token_map
from tomesd_core.partition import make_partition
from tomesd_core.proportional import Heads, padded_size
from tomesd_core.settings import MergeSettings

from . import output
from .contenders import (
    CORNER,
    KEYS,
    PAPER,
    TODO,
    TODO_FACTORS,
    TOKENS,
    TOMESD_MOST,
    UNMERGED,
    match_tomesd,
    put_on,
)
from .models import CONTEXT_TOKENS, LATENT_FACTOR, SD1, SD2, SDXL, OneLayer, attention, make_unet
from .options import add_shared, fill_in, merge_ratio, picture_size, whole_number
from .roofline import CARDS, FUSED, Recorder

USUAL = {"tokens": [64, 128], "ratios": [0.5, 0.75, 0.84, 0.9375], "attention": "sdp"}
QUICK = {"tokens": [64], "ratios": [0.75]}
TINY: dict[str, Any] = {}
STEPS = 3
"""The last of them is what is counted: by then constants are kept."""

MODELS: Mapping[str, dict[str, Any]] = {"sd15": SD1, "sd2": SD2, "sdxl": SDXL}
SHAPES = {"sd15": (320, 8), "sd2": (320, 5), "sdxl": (640, 10)}
"""Channels and heads of the finest self-attention layers."""

SOURCES = (
    "rates: bandwidths and peaks of the makers' data sheets, of peaks what such matrices reach in published "
    "measurements; attention as published for FlashAttention 2; launches by ATen's sources, 2.5 µs each"
)

Shape = tuple[int, int]


def record(
    side: int,
    shape: Shape,
    dtype: torch.dtype,
    name: str,
    ratio: float,
    autocast: bool = False,
    **settings: Any,
) -> Recorder:
    """One call of a layer of `side`×`side` tokens with a contender on it, batch 2, once its
    constants are kept.

    `shape` is channels and heads, `settings` are ours.
    """
    channels, heads = shape
    with torch.device("meta"):
        layer = OneLayer(channels, heads).to(dtype).eval().requires_grad_(False)
        image = torch.empty(2, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)

    with _as_cuda(dtype, autocast), attention(layer, "sdp"):
        if name == CORNER:  # It patches transformer blocks, of which this is none.
            with Recorder() as recorder:
                x = image.permute(0, 2, 3, 1).flatten(1, 2)
                merge, unmerge = match_tomesd(x, (side, side), ratio, step=0, use_rand=False)
                unmerge(layer.block.attn1(merge(layer.block.norm1(x))))
            return recorder
        return _recorded(
            layer, name, ratio, {"skip_unprofitable": False, **settings}, lambda: layer(image)
        )


def record_step(
    model: str,
    side: int,
    dtype: torch.dtype,
    kind: str,
    name: str,
    ratio: float,
    autocast: bool = False,
) -> Recorder:
    """A guided step of a whole UNet at a latent of `side`×`side`, with attention of a `kind`; ours
    by its own rule."""
    unet, config = _unet(model, dtype), MODELS[model]
    with torch.device("meta"):
        latent = torch.empty(2, config["in_channels"], side, side, dtype=dtype)
        context = torch.empty(2, CONTEXT_TOKENS, config["context_dim"], dtype=dtype)
        timesteps = torch.empty(2, dtype=torch.long)
    with _as_cuda(dtype, autocast), attention(unet, kind):
        return _recorded(unet, name, ratio, {}, lambda: unet(latent, timesteps, context=context))


@functools.lru_cache(maxsize=1)
def _unet(model: str, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        unet = make_unet(MODELS[model], dtype)
    unet.dtype = dtype  # Of what it hands on.
    return unet


def _recorded(
    unet: nn.Module, name: str, ratio: float, settings: Mapping[str, Any], run: Callable[[], Any]
) -> Recorder:
    how = MergeSettings(**{"schedule": "constant", "full_steps": 1, **settings})
    make_partition.cache_clear()  # Another subject's draws of the same grid would cost nothing here.
    with torch.no_grad(), put_on(unet, name, ratio, how) as running:
        for step in range(STEPS):
            running.begin_step(step, 20)
            with Recorder() as recorder:
                run()
    return recorder


@contextlib.contextmanager
def _as_cuda(dtype: torch.dtype, autocast: bool) -> Iterator[None]:
    """While open, the meta device takes the branches that CUDA takes, and an attention has the
    scale of its heads."""
    _define_fused()

    def known(attention: Any, x: Tensor, *_: Any) -> Heads:
        size = x.shape[-1] // attention.heads
        return Heads(attention.heads, size, padded_size(size), padded_size(size) ** -0.5)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (one.to(dtype) for one in (q, k, v))
        return getattr(torch.ops.tome_estimate, FUSED)(q, k, v)

    with (
        patch.object(token_map, "BAG_DEVICES", {"meta"}),
        patch.object(layer_hooks, "probe_heads", known),
        patch.object(F, "scaled_dot_product_attention", fused),
        _Casts(dtype, autocast),
    ):
        yield


class _Casts(TorchFunctionMode):
    """Products in one dtype; with `autocast` norms and softmax in fp32. The meta device has no
    autocast of its own."""

    def __init__(self, dtype: torch.dtype, autocast: bool) -> None:
        super().__init__()
        self._dtypes = dict.fromkeys(
            (F.linear, F.conv2d, torch.bmm, torch.matmul, torch.einsum), dtype
        )
        if autocast:
            self._dtypes |= dict.fromkeys(
                (F.layer_norm, F.softmax, torch.softmax, Tensor.softmax), torch.float32
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype, kwargs = self._dtypes.get(func), kwargs or {}

        def cast(value: Any) -> Any:
            return (
                value.to(dtype)
                if isinstance(value, Tensor) and value.is_floating_point()
                else value
            )

        if dtype is not None:
            args, kwargs = (
                tuple(map(cast, args)),
                {name: cast(value) for name, value in kwargs.items()},
            )
        return func(*args, **kwargs)


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
    parser.add_argument(
        "--models", choices=MODELS, nargs="+", default=[*MODELS], help="whose layers, or steps"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number,
        nargs="+",
        metavar="SIDE",
        help="sides of a layer's token grids",
    )
    parser.add_argument(
        "--sizes",
        type=picture_size,
        nargs="+",
        metavar="WxH",
        help="whole steps of square pictures",
    )
    parser.add_argument(
        "--ratios", type=merge_ratio, nargs="+", metavar="R", help="shares of the tokens to remove"
    )
    parser.add_argument(
        "--autocast", action="store_true", help="products in --dtype, norms in fp32"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)


COLUMNS: output.Columns = {
    "model": ("model", str),
    "size": ("size", str),
    "contender": ("contender", str),
    "ratio": ("ratio", output.number(4)),
    "launches": ("launches", str),
    "waits": ("waits", str),
    "bytes": ("MB moved", output.number(1, 1e-6)),
    "peak": ("MB more at the peak", output.number(1, 1e-6)),
    **{card: (f"{card}, estimated times faster", output.number(2)) for card in CARDS},
}


def run(args: argparse.Namespace) -> None:
    """Records, prints the table, writes `estimate.csv`."""
    fill_in(args, USUAL, QUICK, TINY)
    rows: list[dict[str, object]] = []
    for model in args.models:
        for size, recorded in _subjects(args, model):
            whole = recorded(UNMERGED, 0.0)
            rows.append(_row(model, size, UNMERGED, None, whole, whole))
            rows += [
                _row(model, size, name, ratio, recorded(name, ratio), whole)
                for ratio in args.ratios
                for name in contenders_at(ratio)
            ]
    machine = output.this_machine(torch.device("meta"), args.dtype, args.command)
    file = args.out / "estimate.csv"
    output.write_csv(file, rows, machine)
    notes = ["every time is an estimate, by a roofline; none was measured", SOURCES]
    output.show(output.table(COLUMNS, rows), machine, notes, [file])


def _subjects(
    args: argparse.Namespace, model: str
) -> Iterator[tuple[str, Callable[[str, float], Recorder]]]:
    """What is recorded, by contender and ratio: layers or, where sizes of pictures are given, whole
    steps."""
    for width, height in args.sizes or ():
        if width != height:
            raise ValueError(f"sizes must be square, got {width}x{height}")
        step = functools.partial(
            record_step, model, width // LATENT_FACTOR, args.torch_dtype, args.attention
        )
        yield f"{width}x{height}", functools.partial(step, autocast=args.autocast)
    for side in () if args.sizes else args.tokens:
        layer = functools.partial(
            record, side, SHAPES[model], args.torch_dtype, autocast=args.autocast
        )
        yield f"{side}x{side} tokens", layer


def contenders_at(ratio: float) -> list[str]:
    """Who can remove this ratio."""
    names = [KEYS, TOKENS, PAPER]
    names += [CORNER] if ratio <= TOMESD_MOST else []
    return names + ([TODO] if ratio in TODO_FACTORS else [])


def _row(
    model: str, size: str, name: str, ratio: float | None, recorder: Recorder, whole: Recorder
) -> dict[str, object]:
    row = {"model": model, "size": size, "contender": name, "ratio": ratio}
    row |= {"launches": recorder.launches, "waits": len(recorder.waits), "bytes": recorder.bytes}
    row |= {"peak": recorder.peak - whole.peak}
    return row | {
        name: whole.seconds(card) / recorder.seconds(card) for name, card in CARDS.items()
    }
