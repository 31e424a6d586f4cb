"""Proportional attention: a merged key counts as often as the tokens that it stands for (ToMe, ICLR 2023, section 3).

Softmax gives one key that stands for s equal tokens 1/s of what the s had together, unless log s is added to its
similarities. Few attentions take such a bias, so it travels inside of the heads: each is widened by a few channels,
which are 1 in the queries and carry log s in the keys. Hooks on the attention's projections widen what they give, and
narrow what reaches `to_out`, so that whatever computes the attention in between does it as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .hook import Hook

WIDTH = 8
"""Widened heads have a multiple of so many channels, which attention kernels like."""

BIAS_CHANNELS = 2
"""Channels that carry the bias: the second has what rounding to the keys' precision takes from the first."""

LOGIT = 4.0
"""About how far apart the similarities of the two tokens lie that tell an attention's scale."""

TOLERANCE = 0.03
"""How far, relative to it, a weight in half precision may lie from what a scale gives."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """How an attention splits its channels, and what it multiplies the similarities of widened heads by."""

    count: int
    size: int
    """Channels of a head, before it is widened."""
    scale: float = math.nan

    @property
    def wide(self) -> int:
        """Channels of a widened head."""
        return math.ceil((self.size + BIAS_CHANNELS) / WIDTH) * WIDTH

    @property
    def added(self) -> int:
        """Channels that are added to all heads together."""
        return self.count * (self.wide - self.size)

    @property
    def gain(self) -> float:
        """What keys are multiplied by where the scale is taken off the size of the widened heads: to undo that."""
        return math.sqrt(self.wide / self.size) if math.isclose(self.scale, self.wide**-0.5) else 1.0

    def split(self, x: Tensor) -> Tensor:
        """[B, N, count·size] to [B, N, count, size], of widened heads as of others."""
        return x.view(*x.shape[:-1], self.count, -1)

    def widen(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[B, N, count·size] to [B, N, count·wide], `value` in the channels that are added."""
        return F.pad(self.split(x), (0, self.wide - self.size), value=value).flatten(2)

    def widen_input(self, x: Tensor) -> Tensor:
        """[B, N, C] with as many channels more as the heads get: some attentions divide its channels by their heads."""
        return F.pad(x, (0, self.added))

    def narrow(self, x: Tensor) -> Tensor:
        """[B, N, count·wide] to [B, N, count·size]; what is narrow already stays."""
        return self.split(x)[..., : self.size].flatten(2) if x.shape[-1] == self.count * self.wide else x


class Weighed:
    """A call of attention whose keys count: what is done with what its projections take and give."""

    def __init__(self, heads: Heads, counts: Tensor) -> None:
        """`counts`: [B, M], how many tokens each of the call's keys stands for."""
        self.heads = heads
        self._bias = counts.float().log() / heads.scale

    def narrow_input(self, x: Tensor) -> Tensor:
        """Without what `widen_input` adds: `to_q` takes what it would take without us."""
        return x[..., : x.shape[-1] - self.heads.added]

    def queries(self, q: Tensor) -> Tensor:
        """Widened by ones."""
        return self.heads.widen(q, 1.0)

    def keys(self, k: Tensor) -> Tensor:
        """Widened by the bias."""
        size, gain = self.heads.size, self.heads.gain
        wide = self.heads.widen(k if gain == 1 else k * gain)
        by_head = self.heads.split(wide)
        high = self._bias.to(k.dtype)
        by_head[..., size] = high[..., None]
        by_head[..., size + 1] = (self._bias - high.float()).to(k.dtype)[..., None]
        return wide

    def values(self, v: Tensor) -> Tensor:
        """Widened by zeros."""
        return self.heads.widen(v)

    def output(self, out: Tensor) -> Tensor:
        """Narrowed, as `to_out` takes it."""
        return self.heads.narrow(out)


class _Question(Weighed):
    """A call on two made-up tokens, of which only the bias tells them apart: its answer tells the scale."""

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
        # Once on `to_out`, and once more, narrow already, on the layer in it.
        if self.answer is None:
            self.answer = out
        return super().output(out)


class Projections:
    """The hooks on one attention's projections; they do nothing but while a call of it is weighed.

    `running` gives the call that is running, if it is weighed.
    """

    def __init__(self, attention: Any, running: Callable[[], Weighed | None]) -> None:
        self._running = running
        # Before those of others, which so see what they would see without us.
        self.handles: list[RemovableHandle] = [
            attention.to_q.register_forward_pre_hook(self._on_input("narrow_input"), prepend=True),
            attention.to_q.register_forward_hook(self._on_output("queries")),
            attention.to_k.register_forward_hook(self._on_output("keys")),
            attention.to_v.register_forward_hook(self._on_output("values")),
        ]
        for module in (attention.to_out, *attention.to_out.children()):
            # Some call the Sequential, some the linear layer in it.
            self.handles.append(module.register_forward_pre_hook(self._on_input("output"), prepend=True))
            if isinstance(module, nn.Linear):
                break

    def _on_input(self, change: str) -> Hook:
        """A hook that does with what a module takes what the running call's method of that name says."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            call = self._running()
            return None if call is None else (getattr(call, change)(args[0]), *args[1:])

        return Hook(hook)

    def _on_output(self, change: str) -> Hook:
        """The same with what a module gives."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            call = self._running()
            return None if call is None else getattr(call, change)(output)

        return Hook(hook)


def can_be_weighed(attention: Any) -> bool:
    """Whether `attention` is built of the projections that weighing needs."""
    return isinstance(getattr(attention, "heads", None), int) and all(
        isinstance(getattr(attention, name, None), nn.Module) for name in ("to_q", "to_k", "to_v", "to_out")
    )


@torch.no_grad()
def ask_heads(
    attention: Any, y: Tensor, run: Callable[[Weighed], contextlib.AbstractContextManager[None]]
) -> Heads | None:
    """How `attention` splits and scales; None where it does neither of the two things that attentions do.

    They multiply similarities by a scale of their own, or by one over the root of the size of the heads that they
    see. Which one is read off two tokens' softmax: off the smaller weight, since near one half bf16 couldn't tell them
    apart. `y` is an input of the attention's, [B, N, C]; `run` makes a call of it be the one that is weighed.
    """
    question = _Question(attention.heads, y.shape[-1])
    heads, tokens = question.heads, y[:1, :2]
    try:
        with run(question):
            attention.forward(heads.widen_input(tokens), context=tokens)
    except Exception:
        return None
    answer = question.answer
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
