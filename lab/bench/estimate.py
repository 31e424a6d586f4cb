"""Estimate what a self-attention layer, or a whole guided step, costs on a GPU, without one.

Reports launches, waits, bytes, memory, and times faster than unmerged; with --sizes, of whole steps
of square pictures. Every time is an estimate by the roofline model of `roofline`.
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
from .contenders import KEYS, PAPER, TOKENS, UNMERGED, attach
from .models import CONTEXT_TOKENS, LATENT_FACTOR, SD1, SD2, SDXL, OneLayer, attention, make_unet
from .options import SHARED, add_options, fill_in
from .peers import CORNER, TODO, TODO_FACTORS, TOMESD_MOST, match_tomesd
from .roofline import CARDS, FUSED, Recorder

USUAL = {"tokens": [64, 128], "ratios": [0.5, 0.75, 0.84, 0.9375], "attention": "sdp"}
QUICK = {"tokens": [64], "ratios": [0.75]}
STEPS = 3
"""Steps of merging, of which the last is recorded: constants are cached by then."""

MODELS: Mapping[str, dict[str, Any]] = {"sd15": SD1, "sd2": SD2, "sdxl": SDXL}
SHAPES = {"sd15": (320, 8), "sd2": (320, 5), "sdxl": (640, 10)}
"""Channels and heads of the finest self-attention layers."""

SOURCES = (
    "rates: bandwidths and peaks from data sheets, peaks reduced to what such matrices reach in "
    "published measurements; attention as published for FlashAttention 2; launches from ATen's "
    "sources, 2.5 µs each"
)


def record(
    side: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    name: str,
    ratio: float,
    autocast: bool = False,
    **settings: Any,
) -> Recorder:
    """Record a call of a layer of `side`×`side` tokens with a contender, batch 2, in steady state.

    `shape` is (channels, heads); `settings` are the extension's.
    """
    channels, heads = shape
    with torch.device("meta"):
        layer = OneLayer(channels, heads).to(dtype).eval().requires_grad_(False)
        image = torch.empty(2, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)

    with _as_cuda(dtype, autocast), attention(layer, "sdp"):
        if name != CORNER:
            settings = {"skip_unprofitable": False, **settings}
            return _record(layer, name, ratio, settings, lambda: layer(image))
        # tomesd patches transformer blocks, which this layer isn't.
        with Recorder() as recorder:
            x = image.permute(0, 2, 3, 1).flatten(1, 2)
            merge, unmerge = match_tomesd(x, (side, side), ratio, step=0, use_rand=False)
            unmerge(layer.block.attn1(merge(layer.block.norm1(x))))
        return recorder


def record_step(
    model: str,
    side: int,
    dtype: torch.dtype,
    kind: str,
    name: str,
    ratio: float,
    autocast: bool = False,
) -> Recorder:
    """Record a guided step of a whole UNet at a latent of `side`×`side`, by the rule for layers."""
    unet, config = _unet(model, dtype), MODELS[model]
    with torch.device("meta"):
        latent = torch.empty(2, config["in_channels"], side, side, dtype=dtype)
        context = torch.empty(2, CONTEXT_TOKENS, config["context_dim"], dtype=dtype)
        timesteps = torch.empty(2, dtype=torch.long)
    with _as_cuda(dtype, autocast), attention(unet, kind):
        return _record(unet, name, ratio, {}, lambda: unet(latent, timesteps, context=context))


@functools.lru_cache(maxsize=1)
def _unet(model: str, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        unet = make_unet(MODELS[model], dtype)
    unet.dtype = dtype  # ldm casts to it.
    return unet


def _record(
    unet: nn.Module, name: str, ratio: float, settings: Mapping[str, Any], run: Callable[[], Any]
) -> Recorder:
    how = MergeSettings(**{"schedule": "constant", "full_steps": 1, **settings})
    steps = 1 if name == UNMERGED else STEPS
    recorder = Recorder()
    # A partition cached by an earlier record would cost nothing here.
    make_partition.cache_clear()
    with torch.no_grad(), attach(unet, name, ratio, how) as attached:
        for step in range(steps):
            attached.begin_step(step, 20)
            with recorder if step == steps - 1 else contextlib.nullcontext():
                run()
    return recorder


@contextlib.contextmanager
def _as_cuda(dtype: torch.dtype, autocast: bool) -> Iterator[None]:
    """While open, the meta device takes CUDA's code paths, and attention has its heads' scale."""
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
    """As CUDA's autocast: products in `dtype`, with `autocast` norms and softmax in fp32."""

    def __init__(self, dtype: torch.dtype, autocast: bool) -> None:
        super().__init__()
        products = F.linear, F.conv2d, torch.bmm, torch.matmul, torch.einsum
        self._dtypes = dict.fromkeys(products, dtype)
        if autocast:
            wide = F.layer_norm, F.softmax, torch.softmax, Tensor.softmax
            self._dtypes |= dict.fromkeys(wide, torch.float32)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype, kwargs = self._dtypes.get(func), kwargs or {}

        def cast(value: Any) -> Any:
            is_real = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_real else value

        if dtype is not None:
            args = tuple(map(cast, args))
            kwargs = {name: cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


@functools.cache
def _define_fused() -> torch.library.Library:
    """Define the operation; the returned library keeps it alive."""
    library = torch.library.Library("tome_estimate", "DEF")
    library.define(f"{FUSED}(Tensor q, Tensor k, Tensor v) -> Tensor")
    # FlashAttention's memory layout of the output.
    shape = lambda q, k, v: q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # noqa: E731
    library.impl(FUSED, shape, "Meta")
    return library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench estimate`."""
    add_options(parser, *SHARED, "tokens", "ratios", "sizes")
    parser.set_defaults(dtype="float16", tiny=False)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=[*MODELS])
    parser.add_argument("--autocast", action="store_true", help="norms in fp32")


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
    """Record, print the table, and write `estimate.csv`."""
    fill_in(args, USUAL, QUICK, {})
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
    """Yield sizes and their record functions of contender and ratio: layers, or whole steps."""
    dtype, how = args.torch_dtype, {"autocast": args.autocast}
    for width, height in args.sizes or ():
        if width != height:
            raise ValueError(f"sizes must be square, got {width}x{height}")
        what = model, width // LATENT_FACTOR, dtype, args.attention
        yield f"{width}x{height}", functools.partial(record_step, *what, **how)
    for side in () if args.sizes else args.tokens:
        layer = functools.partial(record, side, SHAPES[model], dtype, **how)
        yield f"{side}x{side} tokens", layer


def contenders_at(ratio: float) -> list[str]:
    """Contenders that can remove this ratio."""
    names = [KEYS, TOKENS, PAPER]
    names += [CORNER] if ratio <= TOMESD_MOST else []
    return names + ([TODO] if ratio in TODO_FACTORS else [])


def _row(
    model: str, size: str, name: str, ratio: float | None, recorder: Recorder, whole: Recorder
) -> dict[str, object]:
    row = {"model": model, "size": size, "contender": name, "ratio": ratio}
    row |= {"launches": recorder.launches, "waits": len(recorder.waits), "bytes": recorder.bytes}
    row |= {"peak": recorder.peak - whole.peak}
    gains = {name: whole.seconds(card) / recorder.seconds(card) for name, card in CARDS.items()}
    return row | gains
