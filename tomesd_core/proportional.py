"""Proportional attention: a merged key has the weight of all its tokens (ToMe, ICLR 2023, section
3).

Softmax gives one key in place of s equal tokens 1/s of their weight, unless log s is added to its
logits. Few attention implementations take such a bias, so it travels inside the heads: each is
padded by a few channels, constant in the queries, which carry log s in the keys. Hooks pad the
outputs of the attention's projections and unpad the input of `to_out`, so that whatever computes
the attention in between does it as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .foreign_hooks import Hook
from .reasons import NotMerged, in_a_line, is_out_of_memory

WIDTH = 8
"""Heads are padded to a multiple of this first; attention kernels are fastest there."""

WIDTHS = (64, 96, 128, 192, 256)
"""Sizes of padded heads that are tried where an attention refuses the next multiple of 8: some have
kernels for these alone."""

BIAS_CHANNELS = 2
"""The fewest added channels: with one, the bias would be rounded to the keys' precision."""

QUERY = 2.0
"""The added channels of the queries: the larger it is, the smaller the keys' ones, and the less
they take from an attention that rounds its keys to int8."""

LOGIT = 8.0
"""The logit gap of the probe's two keys."""

PROBE_TOKENS = 16
"""Queries of the probe. PyTorch's attention on MPS is wrong for 8 queries or fewer (pytorch issue
163597)."""

TOLERANCE = 0.012
"""Relative error of a probed scale: probabilities in fp8 are off by up to 6.25 %, which is 0.8 % of
`LOGIT`."""


def padded_size(size: int) -> int:
    """Channels of a head of `size`, padded as little as the bias needs."""
    return math.ceil((size + BIAS_CHANNELS) / WIDTH) * WIDTH


@dataclasses.dataclass(frozen=True)
class Heads:
    """How an attention splits its channels, the size of padded heads, and the scale of their
    logits."""

    count: int
    size: int
    """Channels of a head, before padding."""
    wide: int
    """Channels of a padded head."""
    scale: float = math.nan

    @property
    def padding(self) -> int:
        """Channels added to a head."""
        return self.wide - self.size

    @property
    def gain(self) -> float:
        """Factor on the keys that cancels a scale computed from the padded head size."""
        return (
            math.sqrt(self.wide / self.size) if math.isclose(self.scale, self.wide**-0.5) else 1.0
        )

    def split(self, x: Tensor) -> Tensor:
        """[B, N, count·size] to [B, N, count, size], of padded heads as of others."""
        return x.view(*x.shape[:-1], self.count, -1)

    def pad(self, x: Tensor, channels: Tensor) -> Tensor:
        """[B, N, count·size] to [B, N, count·wide]; `channels`, [B or 1, N or 1, padding or 1],
        goes into each head."""
        added = channels[:, :, None].expand(*x.shape[:2], self.count, self.padding)
        return torch.cat([self.split(x), added], dim=-1).flatten(2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, N, count·wide] to [B, N, count·size]; an x that isn't padded stays as it is."""
        return (
            self.split(x)[..., : self.size].flatten(2)
            if x.shape[-1] == self.count * self.wide
            else x
        )

    def stand_in(self, x: Tensor) -> Tensor:
        """An input of `x`'s shape with the channels of padded heads, in no memory: NaN wherever it
        is read.

        Some attentions take the size of their heads off their input. The hook on `to_q` puts `x`
        back.
        """
        return filled(math.nan, x.dtype, x.device).expand(
            *x.shape[:2], x.shape[2] + self.count * self.padding
        )


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, 1], of `value`."""
    return torch.full((1, 1, 1), value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def bias_channels(heads: Heads, most: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[most + 1, padding]: the added channels of a key that stands for 0 (as 1), 1, 2, … `most`
    tokens.

    Each channel takes its share of what the ones before it left, so that the last one rounds the
    least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rest = torch.arange(most + 1, dtype=wide, device=device).clamp(min=1).log() / (
        heads.scale * QUERY
    )
    channels = []
    for left in range(heads.padding, 0, -1):
        channels.append((rest / left).to(dtype))
        rest = rest - channels[-1].to(wide)
    return torch.stack(channels, dim=1)


class Weighted:
    """One proportional-attention call: how its hooks change the inputs and outputs of its
    projections."""

    def __init__(self, heads: Heads, x: Tensor, counts: Tensor, most: int) -> None:
        """`x`: what `to_q` makes queries of. `counts`: [B, M], how many tokens, up to `most`, each
        key stands for."""
        self.heads = heads
        self._x = weakref.ref(x)
        self._counts, self._most = counts, most

    def input(self, x: Tensor) -> Tensor | None:
        """The input that `to_q` has without padding, in place of its stand-in."""
        return self._x()

    def queries(self, q: Tensor) -> Tensor:
        """Padded with a constant."""
        return self.heads.pad(q, filled(QUERY, q.dtype, q.device))

    def keys(self, k: Tensor) -> Tensor:
        """Padded with the bias."""
        heads, gain = self.heads, self.heads.gain
        table = bias_channels(heads, self._most, k.dtype, k.device)
        return heads.pad(k if gain == 1 else k * gain, table[self._counts])

    def values(self, v: Tensor) -> Tensor:
        """Padded with zeros."""
        return self.heads.pad(v, filled(0.0, v.dtype, v.device))

    def output(self, out: Tensor) -> Tensor:
        """Unpadded, as `to_out` takes it."""
        return self.heads.unpad(out)


class Rest(Weighted):
    """The rest of a call whose output is known already: it takes one query and no memory to speak
    of."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def _zeros(self, x: Tensor, tokens: int) -> Tensor:
        return x.new_zeros(x.shape[0], 1, self.heads.count * self.heads.wide).expand(-1, tokens, -1)

    def queries(self, q: Tensor) -> Tensor:
        """One padded query."""
        return self._zeros(q, 1)

    def keys(self, k: Tensor) -> Tensor:
        """As many padded keys as there are: values may be padded already."""
        return self._zeros(k, k.shape[1])

    def values(self, v: Tensor) -> Tensor:
        """As many padded values as keys."""
        return self._zeros(v, v.shape[1])

    def output(self, out: Tensor) -> Tensor:
        """The first token, unpadded."""
        return super().output(out[:, :1])


class _Probe(Weighted):
    """A call with two made-up keys that differ in the bias alone: its answer tells the scale.

    The first key's weight is 1 / (1 + exp(gap)), with the gap in proportion to the scale, and the
    other's value is 0.
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
        # Once on `to_out`, and once more, unpadded already, on the layer in it.
        if self.answer is None:
            self.answer = out
        return super().output(out)


class Projections:
    """The hooks on one attention's projections; they do nothing but while a call of it is weighted.

    `running` gives the running call, if it is weighted. `failed` is called with the error of a
    hook, and gives what the hooks do for the rest of the call; or it raises.
    """

    def __init__(
        self,
        attention: Any,
        running: Callable[[], Weighted | None],
        failed: Callable[[Any, Exception], Weighted],
    ) -> None:
        self._attention, self._running, self._failed = weakref.ref(attention), running, failed
        self._handles: list[RemovableHandle] = []
        self._hooked: list[weakref.ref[nn.Module]] = []

    @property
    def are_hooked(self) -> bool:
        """False where the attention has other projections now: LoRAs of peft take their place."""
        return [module() for module in self._hooked] == [*self._modules()]

    def _modules(self) -> Iterator[nn.Module]:
        """`to_q`, `to_k`, `to_v` and `to_out`; of this also the linear layer in it, which some call
        alone."""
        attention: Any = self._attention()
        yield from (attention.to_q, attention.to_k, attention.to_v, attention.to_out)
        for module in attention.to_out.children():
            yield module
            if isinstance(module, nn.Linear):
                break

    def register(self) -> Iterator[RemovableHandle]:
        """Puts the hooks on the projections, one after the other, and takes them off former ones."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        to_q, to_k, to_v, *to_out = self._modules()
        self._hooked = [weakref.ref(module) for module in self._modules()]
        # Before the hooks of others, which so see what they would see without us.
        yield self._kept(to_q.register_forward_pre_hook(self._on_input("input"), prepend=True))
        for module, change in ((to_q, "queries"), (to_k, "keys"), (to_v, "values")):
            yield self._kept(module.register_forward_hook(self._on_output(change)))
        for module in to_out:
            yield self._kept(
                module.register_forward_pre_hook(self._on_input("output"), prepend=True)
            )

    def _kept(self, handle: RemovableHandle) -> RemovableHandle:
        self._handles.append(handle)
        return handle

    def _on_input(self, change: str) -> Hook:
        """A pre-hook that passes the module's input through the running call's method `change`."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            changed = self._changed(change, args[0])
            return None if changed is None else (changed, *args[1:])

        return Hook(hook)

    def _on_output(self, change: str) -> Hook:
        """A hook that does so with the module's output."""
        return Hook(lambda module, args, output: self._changed(change, output))

    def _changed(self, change: str, x: Tensor) -> Tensor | None:
        call = self._running()
        if call is None:
            return None
        try:
            changed: Tensor = getattr(call, change)(x)
        except Exception as error:
            changed = getattr(self._failed(self._attention(), error), change)(x)
        return changed


def has_projections(attention: Any) -> bool:
    """Whether `attention` is built of the projections that self-attention has in every UNet that
    can be merged."""
    return isinstance(getattr(attention, "heads", None), int) and all(
        isinstance(getattr(attention, name, None), nn.Module)
        for name in ("to_q", "to_k", "to_v", "to_out")
    )


Running = Callable[[Weighted], contextlib.AbstractContextManager[None]]
"""Makes a call the one that the projections' hooks serve, while it is open."""

_known: dict[tuple[Any, ...], Heads] = {}
"""What was probed in this process, by implementation, device and sizes."""
MOST_KNOWN = 256


def probe_heads(attention: Any, x: Tensor, run: Running, refusals: dict[Hashable, str]) -> Heads:
    """How `attention` splits, takes padded and scales heads; probed once for each implementation.
    `x`: [B, N, C].

    The smallest padding that the attention takes is chosen. Raises `NotMerged` with the attention's
    own words where it takes none, and where it scales logits in no way that attentions do:
    `refusals` keeps these, as long as the caller keeps it. A lack of memory is no answer: it is
    raised.
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
    """Lets every implementation be probed anew: another one may run behind the same function."""
    _known.clear()


def _implementation(attention: Any) -> Iterator[Hashable]:
    """Tells one implementation of attention from another: its function, and the attributes that may
    choose a kernel.

    Other numbers may be counters, with which every call would be probed.
    """
    yield getattr(attention.forward, "__func__", attention.forward)
    for name, value in vars(attention).items():
        if isinstance(value, (bool, str, types.FunctionType)) or name in ("heads", "scale"):
            yield name, value
        elif name == "processor":
            yield name, type(value)


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
    why = (
        f"refuses padded heads: {refusal}"
        if refusal
        else "has no known scale to weight merged keys with"
    )
    raise NotMerged(f"its attention {why} (the method paper needs none)")


def _scale_of(probe: _Probe, own: float | None) -> float | None:
    """The scale that an attention's answer shows; None where it is neither of the two that
    attentions have.

    They multiply logits by a scale of their own, or by one over the root of the size of the heads
    that they see.
    """
    heads, answer = probe.heads, probe.answer
    if answer is None or answer.ndim != 3 or answer.shape[-1] != heads.count * heads.wide:
        return None
    weights = heads.split(answer)[..., 0].flatten().tolist()
    if not all(0 < weight < 1 for weight in weights):
        return None
    shown = [
        math.log(1 / weight - 1) / (LOGIT * math.sqrt(heads.size))
        for weight in (min(weights), max(weights))
    ]
    for scale in (heads.size**-0.5 if own is None else own, heads.wide**-0.5):
        if all(abs(value / scale - 1) < TOLERANCE for value in shown):
            return scale
    return None
