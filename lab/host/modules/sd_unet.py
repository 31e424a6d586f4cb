"""Stands in for `modules.sd_unet`: something else in the UNet's place, as TensorRT extensions put
it there.

Also what `modules.sd_hijack_unet` does: latents of odd sizes, which the bare UNet refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from ldm.modules.diffusionmodules import openaimodel

current_unet: torch.nn.Module | None = None
"""Runs in place of every UNet, while there is one. WebUI makes it from an option that an extension
lists."""


class _Torch:
    """What the UNet's module sees as `th`: torch, but `cat` stretches the first of two tensors to
    the second's size.

    The bare UNet halves 33 rows to 17 and doubles them to 34, which its skip connections don't fit.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(tensors) == 2 and tensors[0].shape[-2:] != tensors[1].shape[-2:]:
            first, second = tensors
            tensors = (
                torch.nn.functional.interpolate(first, second.shape[-2:], mode="nearest"),
                second,
            )
        return torch.cat(tensors, *args, **kwargs)


_original_forward = openaimodel.UNetModel.forward


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    if current_unet is not None:
        return current_unet.forward(*args, **kwargs)
    return _original_forward(self, *args, **kwargs)


def hijack() -> None:
    """Applies both to the UNet's code; `undo_hijack` takes them off."""
    openaimodel.th, openaimodel.UNetModel.forward = _Torch(), _forward


def undo_hijack() -> None:
    """Gives the UNet's code back what it had."""
    openaimodel.th, openaimodel.UNetModel.forward = torch, _original_forward
