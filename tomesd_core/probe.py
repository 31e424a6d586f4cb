"""Which padded heads an attention accepts, and how it scales their logits.

Both are read off its answer to two made-up keys, so no implementation needs to be known by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from .proportional import QUERY, WIDTHS, Heads, Weighted, padded_size
from .reasons import NotMerged, in_a_line, is_out_of_memory

LOGIT = 8.0
"""The logit gap of the probe's two keys."""

PROBE_TOKENS = 16
"""Queries of the probe. PyTorch's attention on MPS needs more than 8 (pytorch issue 163597)."""

TOLERANCE = 0.012
"""Relative error of a probed scale. Fp8 probabilities, off by up to 6.25 %, shift it by 0.8 %."""

Running = Callable[[Weighted], contextlib.AbstractContextManager[None]]
"""Makes a call the one that the projections' hooks serve, while it is open."""

_known: dict[tuple[Any, ...], Heads] = {}
"""Answers of this process, by implementation, device and sizes."""
MOST_KNOWN = 256


def probe_heads(attention: Any, x: Tensor, run: Running, refusals: dict[Hashable, str]) -> Heads:
    """Probe the heads of `attention` with the least padding that it accepts. `x`: [B, N, C].

    Each implementation is probed once. Raises `NotMerged` with the attention's own error if it
    accepts no padding, and if its scale is unknown; `refusals` keeps these reasons for the caller.
    Running out of memory is no answer: the error is raised.
    """
    key = *_implementation(attention), x.shape[-1], x.dtype, x.device.type
    if key in _known:
        return _known[key]
    if key in refusals:
        raise NotMerged(refusals[key])
    try:
        heads = _probed(attention, x, run)
    except NotMerged as reason:
        refusals[key] = str(reason)
        raise
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known[key] = heads
    return heads


def forget_heads() -> None:
    """Probe every implementation again: another one may run behind the same function."""
    _known.clear()


def _implementation(attention: Any) -> Iterator[Hashable]:
    """Identify an implementation: its function, and the attributes that may choose a kernel.

    Other numbers are skipped: a counter among them would cause a probe at every call.
    """
    yield getattr(attention.forward, "__func__", attention.forward)
    for name, value in vars(attention).items():
        if isinstance(value, (bool, str, types.FunctionType)) or name in ("heads", "scale"):
            yield name, value
        elif name == "processor":
            yield name, type(value)


class _Probe(Weighted):
    """A call with two made-up keys that differ in the bias only, so its answer shows the scale.

    The first key's weight is 1 / (1 + exp(gap)), where the gap is proportional to the scale, and
    only the first key has a value other than 0.
    """

    def __init__(self, heads: Heads, x: Tensor) -> None:
        self.heads = heads
        self._x = weakref.ref(x)
        self.answer: Tensor | None = None

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(torch.zeros_like(q))

    def keys(self, k: Tensor) -> Tensor:
        bias = k.new_zeros(1, 2, 1)
        bias[:, 1] = LOGIT * math.sqrt(self.heads.size) / (QUERY * self.heads.padding)
        return self.heads.pad(torch.zeros_like(k), bias)

    def values(self, v: Tensor) -> Tensor:
        made_up = torch.zeros_like(v)
        made_up[:, 0] = 1
        return super().values(made_up)

    def output(self, out: Tensor) -> Tensor:
        # Called for `to_out`, and again, already unpadded, for its linear layer.
        if self.answer is None:
            self.answer = out
        return super().output(out)


@torch.no_grad()
def _probed(attention: Any, x: Tensor, run: Running) -> Heads:
    own = getattr(attention, "scale", None)
    own = float(own) if isinstance(own, (int, float)) else None
    count, size = attention.heads, x.shape[-1] // attention.heads
    least = padded_size(size)
    refusal = None
    for wide in (least, *(width for width in WIDTHS if width > least)):
        heads = Heads(count, size, wide)
        tokens = x[:1, :PROBE_TOKENS]
        probe = _Probe(heads, tokens)
        try:
            with run(probe):
                attention.forward(heads.stand_in(tokens), tokens[:, :2])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            refusal = refusal or in_a_line(error)
            continue
        if scale := _scale_of(probe, own):
            return dataclasses.replace(heads, scale=scale)
    why = f"refuses padded heads: {refusal}" if refusal else "has an unknown logit scale"
    raise NotMerged(f"its attention {why} (only the method paper merges it)")


def _scale_of(probe: _Probe, own: float | None) -> float | None:
    """The scale that the probe's answer shows, or None if no attention scales like that.

    Attentions multiply logits by their module's scale or by 1/sqrt of the head size they see.
    """
    heads, answer = probe.heads, probe.answer
    if answer is None or answer.ndim != 3 or answer.shape[-1] != heads.count * heads.wide:
        return None
    weights = heads.split(answer)[..., 0].flatten().tolist()
    if not all(0 < weight < 1 for weight in weights):
        return None
    gap = LOGIT * math.sqrt(heads.size)
    shown = [math.log(1 / weight - 1) / gap for weight in (min(weights), max(weights))]
    for scale in (heads.size**-0.5 if own is None else own, heads.wide**-0.5):
        if all(abs(value / scale - 1) < TOLERANCE for value in shown):
            return scale
    return None
