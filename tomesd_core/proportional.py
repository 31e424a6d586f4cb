"""Proportional attention: a merged key has the weight of all its tokens (ToMe, ICLR 2023, section 3).

Softmax gives one key in place of s equal tokens 1/s of their weight, unless log s is added to its logits. Few attention
implementations take such a bias, so it travels inside the heads: each is padded by a few channels, which are 1 in the
queries and carry log s in the keys. Hooks pad the outputs of the attention's projections and unpad the input of
`to_out`, so that whatever computes the attention in between does it as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .foreign_hooks import Hook
from .reasons import is_out_of_memory

WIDTH = 8
"""Heads are padded to a multiple of this; attention kernels are fastest there."""

BIAS_CHANNELS = 2
"""Channels that carry the bias: the second has the rounding error of the first in the keys' precision."""

LOGIT = 4.0
"""Target logit gap of the two probe tokens in `probe_heads`."""

TOLERANCE = 0.03
"""Relative error of a probed softmax weight that half precision may cause."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """How an attention splits its channels, and the scale of the logits of padded heads."""

    count: int
    size: int
    """Channels of a head, before padding."""
    scale: float = math.nan

    @property
    def wide(self) -> int:
        """Channels of a padded head."""
        return math.ceil((self.size + BIAS_CHANNELS) / WIDTH) * WIDTH

    @property
    def added(self) -> int:
        """Channels added to all heads together."""
        return self.count * (self.wide - self.size)

    @property
    def gain(self) -> float:
        """Factor on the keys that cancels a scale computed from the padded head size."""
        return math.sqrt(self.wide / self.size) if math.isclose(self.scale, self.wide**-0.5) else 1.0

    def split(self, x: Tensor) -> Tensor:
        """[B, N, count·size] to [B, N, count, size], of padded heads as of others."""
        return x.view(*x.shape[:-1], self.count, -1)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[B, N, count·size] to [B, N, count·wide], `value` in the added channels."""
        return F.pad(self.split(x), (0, self.wide - self.size), value=value).flatten(2)

    def pad_input(self, x: Tensor) -> Tensor:
        """[B, N, C] with as many more channels as the heads get: some attentions divide its channels by their heads."""
        return F.pad(x, (0, self.added))

    def unpad(self, x: Tensor) -> Tensor:
        """[B, N, count·wide] to [B, N, count·size]; an x that isn't padded stays as it is."""
        return self.split(x)[..., : self.size].flatten(2) if x.shape[-1] == self.count * self.wide else x


class Weighted:
    """One proportional-attention call: how its hooks change the inputs and outputs of its projections."""

    def __init__(self, heads: Heads, counts: Tensor) -> None:
        """`counts`: [B, M], how many tokens each of the call's keys stands for."""
        self.heads = heads
        self._bias = counts.float().log() / heads.scale

    def unpad_input(self, x: Tensor) -> Tensor:
        """Without the channels of `pad_input`: the input that `to_q` has without merging."""
        return x[..., : x.shape[-1] - self.heads.added]

    def queries(self, q: Tensor) -> Tensor:
        """Padded with ones."""
        return self.heads.pad(q, 1.0)

    def keys(self, k: Tensor) -> Tensor:
        """Padded with the bias."""
        size, gain = self.heads.size, self.heads.gain
        wide = self.heads.pad(k if gain == 1 else k * gain)
        by_head = self.heads.split(wide)
        high = self._bias.to(k.dtype)
        by_head[..., size] = high[..., None]
        by_head[..., size + 1] = (self._bias - high.float()).to(k.dtype)[..., None]
        return wide

    def values(self, v: Tensor) -> Tensor:
        """Padded with zeros."""
        return self.heads.pad(v)

    def output(self, out: Tensor) -> Tensor:
        """Unpadded, as `to_out` takes it."""
        return self.heads.unpad(out)


class Rest(Weighted):
    """The rest of a call whose output is known already: it takes one query and no memory to speak of."""

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
    """A call on two made-up tokens that differ in the bias alone: its answer tells the scale."""

    def __init__(self, count: int, channels: int) -> None:
        self.heads = Heads(count, channels // count)
        self._bias = torch.tensor([[0.0, LOGIT * math.sqrt(self.heads.size)]])
        self.answer: Tensor | None = None

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(torch.zeros_like(q))

    def keys(self, k: Tensor) -> Tensor:
        self._bias = self._bias.to(k.device)
        return super().keys(torch.zeros_like(k))

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

    `running` gives the running call, if it is weighted. `failed` is called with the error of a hook, and gives what the
    hooks do for the rest of the call; or it raises.
    """

    def __init__(
        self, attention: Any, running: Callable[[], Weighted | None], failed: Callable[[Any, Exception], Weighted]
    ) -> None:
        self._attention, self._running, self._failed = weakref.ref(attention), running, failed

    def register(self) -> Iterator[RemovableHandle]:
        """Puts the hooks on the projections, one after the other."""
        attention = self._attention()
        # Before the hooks of others, which so see what they would see without us.
        yield attention.to_q.register_forward_pre_hook(self._on_input("unpad_input"), prepend=True)
        for name, change in (("to_q", "queries"), ("to_k", "keys"), ("to_v", "values")):
            yield getattr(attention, name).register_forward_hook(self._on_output(change))
        for module in (attention.to_out, *attention.to_out.children()):
            # Some call the Sequential, some the linear layer in it.
            yield module.register_forward_pre_hook(self._on_input("output"), prepend=True)
            if isinstance(module, nn.Linear):
                break

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
    """Whether `attention` is built of the projections that self-attention has in every UNet that can be merged."""
    return isinstance(getattr(attention, "heads", None), int) and all(
        isinstance(getattr(attention, name, None), nn.Module) for name in ("to_q", "to_k", "to_v", "to_out")
    )


@torch.no_grad()
def probe_heads(
    attention: Any, y: Tensor, run: Callable[[Weighted], contextlib.AbstractContextManager[None]]
) -> Heads | None:
    """How `attention` splits and scales; None where it does neither of the two things that attentions do.

    They multiply logits by a scale of their own, or by one over the root of the size of the heads that they see. Which
    one is read off two tokens' softmax: off the smaller weight, since near one half bf16 couldn't tell them apart. `y`
    is an input of the attention's, [B, N, C]; `run` makes a call the one that the projections' hooks serve.

    A lack of memory is no answer: it is raised.
    """
    probe = _Probe(attention.heads, y.shape[-1])
    heads, tokens = probe.heads, y[:1, :2]
    try:
        with run(probe):
            attention.forward(heads.pad_input(tokens), context=tokens)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    answer = probe.answer
    if answer is None or answer.shape != (1, 2, heads.count * heads.wide):
        return None
    weights = heads.split(answer)[..., 0].float()
    own = getattr(attention, "scale", None)
    scales = [float(own) if isinstance(own, (int, float)) else heads.size**-0.5, heads.wide**-0.5]
    wrong = {
        scale: (weights * (1 + math.exp(LOGIT * math.sqrt(heads.size) * scale)) - 1).abs().max().item()
        for scale in scales
    }
    scale = min(wrong, key=wrong.__getitem__)
    return dataclasses.replace(heads, scale=scale) if wrong[scale] < TOLERANCE else None
