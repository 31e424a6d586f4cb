"""Proportional attention: weight a merged key by its number of tokens (ToMe, ICLR 2023, section 3).

ToMe's code adds `size.log()` to the logits (`attn + size.log()[:, None, None, :, 0]`), so that one
key gets the softmax weight of the tokens it represents. Few attention implementations accept such a
bias, so it travels inside the heads: hooks pad each head by a few channels, constant in the queries
and proportional to log(size) in the keys, and unpad the input of `to_out`. The attention in between
runs unchanged, whichever it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .foreign_hooks import Hook

WIDTH = 8
"""Heads are padded to a multiple of this first; attention kernels are fastest there."""

WIDTHS = (64, 96, 128, 192, 256)
"""Other padded head sizes to try, since some attentions have kernels for these sizes only."""

BIAS_CHANNELS = 2
"""The fewest added channels: a single one would round the bias to the keys' precision."""

QUERY = 2.0
"""Value of the queries' added channels; a larger one costs int8-quantized keys less precision."""


def padded_size(size: int) -> int:
    """Channels of a head of `size` with the least padding that holds the bias."""
    return math.ceil((size + BIAS_CHANNELS) / WIDTH) * WIDTH


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of an attention: count, size, padded size, and the scale of their logits."""

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

    def split(self, x: Tensor) -> Tensor:
        """[B, N, count·size] to [B, N, count, size]; also for padded heads."""
        return x.view(*x.shape[:-1], self.count, -1)

    def pad(self, x: Tensor, channels: Tensor) -> Tensor:
        """Append `channels` to each head: [B, N, count·size] to [B, N, count·wide].

        `channels` is [B or 1, N or 1, padding or 1].
        """
        added = channels[:, :, None].expand(*x.shape[:2], self.count, self.padding)
        return torch.cat([self.split(x), added], dim=-1).flatten(2)

    def stand_in(self, x: Tensor) -> Tensor:
        """An input with the channels of padded heads, for attentions that read the size off it.

        It takes no memory and is NaN everywhere; the hook on `to_q` puts `x` back.
        """
        channels = x.shape[2] + self.count * self.padding
        return filled(math.nan, x.dtype, x.device).expand(*x.shape[:2], channels)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cached tensor of shape [1, 1, 1]."""
    return torch.full((1, 1, 1), value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def bias_channels(heads: Heads, most: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[most + 1, padding]: added channels of a key that represents 0 (as 1), 1, … `most` tokens.

    Each channel takes its share of what the channels before it left, so the last one rounds least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    counts = torch.arange(most + 1, dtype=wide, device=device).clamp(min=1)
    rest = counts.log() / (heads.scale * QUERY)
    channels = []
    for left in range(heads.padding, 0, -1):
        channels.append((rest / left).to(dtype))
        rest = rest - channels[-1].to(wide)
    return torch.stack(channels, dim=1)


class Weighted:
    """One proportional-attention call: the changes to its projections' inputs and outputs."""

    def __init__(self, heads: Heads, x: Tensor, counts: Tensor, most: int) -> None:
        """`x` is the input of `to_q`; `counts`, [B, M], the tokens of each key, at most `most`."""
        self.heads = heads
        self._x = weakref.ref(x)
        self._counts, self._most = counts, most

    def input(self, x: Tensor) -> Tensor | None:
        """The input of `to_q`, in place of its stand-in."""
        return self._x()

    def queries(self, q: Tensor) -> Tensor:
        """Pad with a constant."""
        return self.heads.pad(q, filled(QUERY, q.dtype, q.device))

    def keys(self, k: Tensor) -> Tensor:
        """Pad with the bias, and cancel a scale computed from the padded head size."""
        heads = self.heads
        if math.isclose(heads.scale, heads.wide**-0.5):
            k = k * math.sqrt(heads.wide / heads.size)
        table = bias_channels(heads, self._most, k.dtype, k.device)
        return heads.pad(k, table[self._counts])

    def values(self, v: Tensor) -> Tensor:
        """Pad with zeros."""
        return self.heads.pad(v, filled(0.0, v.dtype, v.device))

    def output(self, out: Tensor) -> Tensor:
        """Unpad; an unpadded one is returned as is."""
        heads = self.heads
        is_padded = out.shape[-1] == heads.count * heads.wide
        return heads.split(out)[..., : heads.size].flatten(2) if is_padded else out


class Rest(Weighted):
    """The rest of a call whose output is already known: one query and hardly any memory."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def input(self, x: Tensor) -> Tensor:
        """One token of the stand-in, without its padding."""
        return x[:, :1, : self.heads.count * self.heads.size]

    def queries(self, q: Tensor) -> Tensor:
        """One padded query."""
        return self.keys(q[:, :1])

    def keys(self, k: Tensor) -> Tensor:
        """Zeros in the shape of padded keys: the values may be padded already."""
        channels = self.heads.count * self.heads.wide
        return k.new_zeros(k.shape[0], 1, channels).expand(-1, k.shape[1], -1)

    def values(self, v: Tensor) -> Tensor:
        """Zeros in the shape of padded values."""
        return self.keys(v)

    def output(self, out: Tensor) -> Tensor:
        """The first token, unpadded."""
        return super().output(out[:, :1])


class Projections:
    """The hooks on one attention's projections, inactive unless a weighted call is running.

    `running` returns the running call if it is weighted. `failed` is called with the error of a
    hook, and returns the behaviour for the rest of the call, or raises.
    """

    def __init__(
        self,
        attention: Any,
        running: Callable[[], Weighted | None],
        failed: Callable[[Any, Exception], Weighted],
    ) -> None:
        self._attention = weakref.ref(attention)
        self._running, self._failed = running, failed
        self.handles = contextlib.ExitStack()
        """The registered hooks."""
        self._hooked: list[weakref.ref[nn.Module]] = []

    @property
    def are_hooked(self) -> bool:
        """False if the projections were replaced since, by peft's LoRA layers for example."""
        return [module() for module in self._hooked] == [*self._modules()]

    def _modules(self) -> Iterator[nn.Module]:
        """The projections; of `to_out` also its linear layer, which some code calls directly."""
        attention: Any = self._attention()
        yield from (attention.to_q, attention.to_k, attention.to_v, attention.to_out)
        for module in attention.to_out.children():
            yield module
            if isinstance(module, nn.Linear):
                break

    def register(self) -> None:
        """Hook the projections; unhook replaced ones."""
        self.handles.close()
        keep = self.handles.enter_context
        to_q, to_k, to_v, *to_out = self._modules()
        self._hooked = [weakref.ref(module) for module in self._modules()]
        # Before other hooks, so that these see the same tensors as without merging.
        keep(to_q.register_forward_pre_hook(self._hook("input"), prepend=True))
        for module, change in ((to_q, "queries"), (to_k, "keys"), (to_v, "values")):
            keep(module.register_forward_hook(self._hook(change)))
        for module in to_out:
            keep(module.register_forward_pre_hook(self._hook("output"), prepend=True))

    def _hook(self, change: str) -> Hook:
        """A hook that passes the output, or a pre-hook the input, through `Weighted`'s `change`."""

        def hook(module: nn.Module, args: tuple[Any, ...], *output: Tensor) -> Any:
            call = self._running()
            if call is None:
                return None
            x = (output or args)[0]
            try:
                changed = getattr(call, change)(x)
            except Exception as error:
                changed = getattr(self._failed(self._attention(), error), change)(x)
            return changed if output or changed is None else (changed, *args[1:])

        return Hook(hook)


def has_projections(attention: Any) -> bool:
    """Whether `attention` has `heads` and projections, as in ldm, sgm and diffusers."""
    return isinstance(getattr(attention, "heads", None), int) and all(
        isinstance(getattr(attention, name, None), nn.Module)
        for name in ("to_q", "to_k", "to_v", "to_out")
    )
