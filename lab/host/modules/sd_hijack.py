"""Stands in for what `modules.sd_hijack` does to the UNet's code: odd sizes, and another UNet in its place.

Attention optimisations, embeddings and prompt weights are left out.
"""

from __future__ import annotations

import torch
from ldm.modules.diffusionmodules import openaimodel
from modules import sd_unet


class TorchHijackForUnet:
    """What the UNet's module sees as `th`: torch, but `cat` stretches the first of two tensors to the second's size.

    The bare UNet halves 33 rows to 17 and doubles them to 34, which its skip connections don't fit.
    """

    def __getattr__(self, item):
        return getattr(torch, item)

    def cat(self, tensors, *args, **kwargs):
        """`torch.cat`."""
        if len(tensors) == 2 and tensors[0].shape[-2:] != tensors[1].shape[-2:]:
            first, second = tensors
            tensors = torch.nn.functional.interpolate(first, second.shape[-2:], mode="nearest"), second
        return torch.cat(tensors, *args, **kwargs)


_original_forward = openaimodel.UNetModel.forward


def hijack() -> None:
    """Applies both, once; `undo_hijack` takes them off."""
    openaimodel.th = TorchHijackForUnet()
    openaimodel.UNetModel.forward = sd_unet.create_unet_forward(_original_forward)


def undo_hijack() -> None:
    """Gives the UNet's module back what it had."""
    openaimodel.th = torch
    openaimodel.UNetModel.forward = _original_forward
