"""Stands in for `modules.sd_unet`: something else in the UNet's place, as TensorRT extensions put it there."""

from __future__ import annotations

import torch
from modules import script_callbacks, shared

unet_options: list[SdUnetOption] = []
current_unet_option: SdUnetOption | None = None
current_unet: SdUnet | None = None


class SdUnetOption:
    """What may stand in for the UNet: the checkpoint's name that it is for, and its own."""

    model_name = label = None

    def create_unet(self):
        """Makes the `SdUnet`."""
        raise NotImplementedError


class SdUnet(torch.nn.Module):
    """Stands in for the UNet while it is active."""

    def forward(self, x, timesteps, context, *args, **kwargs):
        """Predicts the noise."""
        raise NotImplementedError

    def activate(self):
        """Called when it takes over."""

    def deactivate(self):
        """Called when it hands back."""


def list_unets() -> None:
    """Asks the extensions for their UNets."""
    unet_options[:] = script_callbacks.list_unets_callback()


def get_unet_option(option=None):
    """The option that the settings choose, None for the model's own UNet."""
    option = option or shared.opts.sd_unet
    if option == "Automatic":
        name = shared.sd_model.sd_checkpoint_info.model_name
        return next((o for o in unet_options if o.model_name == name), None)
    return next((o for o in unet_options if o.label == option), None)


def apply_unet(option=None) -> None:
    """Puts the chosen option in the UNet's place, or takes it out."""
    global current_unet, current_unet_option
    chosen = get_unet_option(option)
    if chosen is current_unet_option:
        return
    if current_unet is not None:
        current_unet.deactivate()
    current_unet_option, current_unet = chosen, None
    if chosen is not None:
        current_unet = chosen.create_unet()
        current_unet.option = chosen
        current_unet.activate()


def create_unet_forward(original_forward):
    """A `UNetModel.forward` that hands over to the active `SdUnet`, if there is one."""

    def UNetModel_forward(self, x, timesteps=None, context=None, *args, **kwargs):
        if current_unet is not None:
            return current_unet.forward(x, timesteps, context, *args, **kwargs)
        return original_forward(self, x, timesteps, context, *args, **kwargs)

    return UNetModel_forward
