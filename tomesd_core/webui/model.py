"""The loaded model, looked at without ever making WebUI load one."""

from __future__ import annotations

from modules import sd_models, sd_unet
from torch import nn

from ..unet import Layer, find_layers


def loaded_unet() -> nn.Module | None:
    """The UNet of the model that is loaded, or None. `shared.sd_model` would load one."""
    model = getattr(sd_models.model_data.sd_model, "model", None)
    return getattr(model, "diffusion_model", None)


def loaded_layers() -> list[Layer] | None:
    """The self-attention layers of the loaded UNet, or None where no model is loaded."""
    unet = loaded_unet()
    return None if unet is None else find_layers(unet)


def unet_is_replaced() -> bool:
    """Whether an `sd_unet` option (TensorRT, say) runs in place of the model's own UNet."""
    return getattr(sd_unet, "current_unet", None) is not None


def hypertile_of(attention: nn.Module) -> str | None:
    """Why a layer is left to Hypertile, or None. It takes a layer's width and height off the token count."""
    tiling = getattr(attention, "__webui_hypertile_params", None)
    return "tiled by Hypertile" if tiling is not None and tiling.enabled else None
