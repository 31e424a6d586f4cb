"""Stands in for `modules.sd_unet`: a UNet's replacement, as TensorRT extensions make one.

Also for `modules.sd_hijack_unet`: latents of odd sizes, which the bare UNet refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from ldm.modules.diffusionmodules import openaimodel

current_unet: torch.nn.Module | None = None
"""Runs in place of every UNet if set; WebUI makes it from an extension's option."""


class _Torch:
    """`th` of the UNet's module: torch, but `cat` resizes the first of two tensors to the second.

    The bare UNet halves 33 rows to 17 and doubles them to 34, which its skip connections don't fit.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(tensors) == 2 and tensors[0].shape[-2:] != tensors[1].shape[-2:]:
            size = tensors[1].shape[-2:]
            tensors = torch.nn.functional.interpolate(tensors[0], size, mode="nearest"), tensors[1]
        return torch.cat(tensors, *args, **kwargs)


_original_forward = openaimodel.UNetModel.forward


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    if current_unet is not None:
        return current_unet.forward(*args, **kwargs)
    return _original_forward(self, *args, **kwargs)


def hijack() -> None:
    """Patch ldm's UNet; `undo_hijack` restores it."""
    openaimodel.th, openaimodel.UNetModel.forward = _Torch(), _forward


def undo_hijack() -> None:
    """Restore ldm's UNet."""
    openaimodel.th, openaimodel.UNetModel.forward = torch, _original_forward
