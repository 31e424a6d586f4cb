"""UNets to measure (SD 1.5's shape, a checkpoint's, or a tiny one), and their inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomesd_core.unet import names_in

from ..demo.model import fill_zeros
from .options import Size
from .packages import require

SD1: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "context_dim": 768,
    "transformer_depth": 1,
}
"""Stable Diffusion 1's UNet, as arguments of ldm's `UNetModel`."""

SD2 = SD1 | {"context_dim": 1024, "num_heads": -1, "num_head_channels": 64}
SD2["use_linear_in_transformer"] = True
BY_CONTEXT = {768: SD1, 1024: SD2}

SDXL: dict[str, Any] = {
    **SD2,
    "attention_resolutions": [4, 2],
    "channel_mult": [1, 2, 4],
    "context_dim": 2048,
    "transformer_depth": {640: 2, 1280: 10},
}
"""Stable Diffusion XL's UNet without its size embedding; depths are by channels."""

TINY = SD1 | {
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
}

PREFIX = "model.diffusion_model."

CONTEXT_TOKENS = 77
LATENT_FACTOR = 8
"""Pixels per latent pixel, along one side."""


def build_unet(
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    weights: dict[str, Tensor] | None = None,
) -> nn.Module:
    """ldm's `UNetModel` of this shape, with `weights` or random ones.

    Raises `MissingPackage` without ldm, `ValueError` for weights of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = make_unet(config, dtype)
        if weights is None:
            # Subnormal or zero activations could change the speed.
            fill_zeros(unet)
        else:
            try:
                unet.load_state_dict(weights, strict=True)
            except RuntimeError as error:
                raise ValueError(f"the checkpoint is not of SD 1 or 2's shape: {error}") from error
    return unet.to(device)


def diffusers_unet(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> nn.Module:
    """diffusers' UNet of SD 1.5's shape, or a tiny one, with random weights.

    Raises `MissingPackage` without diffusers.
    """
    shape = {"block_out_channels": (32, 64, 64, 64)} if tiny else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet_class = require("diffusers").UNet2DConditionModel
        unet = unet_class(cross_attention_dim=SD1["context_dim"], **shape)
    return unet.to(device, dtype).eval().requires_grad_(False)


def make_unet(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """ldm's `UNetModel` of this shape, as initialised. Raises `MissingPackage` without ldm."""
    attention = require("ldm.modules.attention")
    module = require("ldm.modules.diffusionmodules.openaimodel")
    depth = config["transformer_depth"]

    class SpatialTransformer(attention.SpatialTransformer):
        def __init__(self, channels: int, *args: Any, **kwargs: Any) -> None:
            kwargs["depth"] = depth[channels] if isinstance(depth, dict) else depth
            # ldm's own takes one context per block.
            kwargs["context_dim"] = [kwargs["context_dim"]] * kwargs["depth"]
            super().__init__(channels, *args, **kwargs)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return super().forward(x, [context] * len(self.transformer_blocks))

    rest = {"image_size": 32, "use_spatial_transformer": True, "use_checkpoint": False}
    # ldm takes xformers' attention if it is installed; measurements start from ldm's own.
    with (
        patch.object(attention, "XFORMERS_IS_AVAILBLE", False),
        patch.object(module, "SpatialTransformer", SpatialTransformer),
    ):
        unet = module.UNetModel(**config, **rest, legacy=False)
    unet = unet.to(dtype).eval().requires_grad_(False)
    for part in unet.modules():
        if type(part).__name__ == "GroupNorm32":
            # It casts its input to fp32, so its weights must be fp32.
            part.float()
    return unet


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the UNet's shape and weights from a Stable Diffusion 1 or 2 checkpoint (`.safetensors`).

    Raises `ValueError` for other files, `MissingPackage` without safetensors.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"checkpoint must be a .safetensors file, got {path}")
    with require("safetensors").safe_open(str(path), framework="pt") as stored:
        names = [name for name in list(stored.keys()) if name.startswith(PREFIX)]
        weights = {name.removeprefix(PREFIX): stored.get_tensor(name) for name in names}
    contexts = [
        weight.shape[1] for name, weight in weights.items() if name.endswith("attn2.to_k.weight")
    ]
    if not contexts or contexts[0] not in BY_CONTEXT or "input_blocks.0.0.weight" not in weights:
        raise ValueError(f"{path.name}: there is no UNet of Stable Diffusion 1 or 2 in {PREFIX}*")
    # Inpainting models have more input channels, for a mask and a picture.
    inputs = weights["input_blocks.0.0.weight"].shape[1]
    return {**BY_CONTEXT[contexts[0]], "in_channels": inputs}, weights


def one_step(unet: nn.Module, config: Mapping[str, Any], size: Size) -> Callable[[], Tensor]:
    """Return a function that runs one pass of classifier-free guidance, batch 2, at `size`."""
    weight = next(unet.parameters())
    width, height = (side // LATENT_FACTOR for side in size)
    generator = torch.Generator().manual_seed(1)
    shapes = (2, config["in_channels"], height, width), (2, CONTEXT_TOKENS, config["context_dim"])
    latent, context = (torch.randn(shape, generator=generator).to(weight) for shape in shapes)
    timesteps = torch.full((2,), 500, device=weight.device)

    def step() -> Tensor:
        with inference(weight):
            return unet(latent, timesteps, **{names_in(unet).context: context})

    return step


class OneLayer(nn.Module):
    """A UNet of one self-attention layer at level 1 and its norm: all that merging looks for."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.input_blocks = nn.Sequential(_Transformer(_Block(channels, heads)))

    @property
    def block(self) -> nn.Module:
        """The block, with `norm1` and `attn1`."""
        return self.input_blocks[0].transformer_blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to tokens, [B, H·W, C], without a copy if they lie in memory as tokens."""
        return self.input_blocks(x)


class _Transformer(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_blocks[0](x.permute(0, 2, 3, 1).flatten(1, 2))


class _Block(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        kind = require("ldm.modules.attention").CrossAttention
        self.attn1 = kind(channels, heads=heads, dim_head=channels // heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn1(self.norm1(x), context=None)


def one_layer(channels: int, heads: int, device: torch.device, dtype: torch.dtype) -> OneLayer:
    """`OneLayer` of ldm's own attention, with random but fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = OneLayer(channels, heads)
    return layer.to(device, dtype).eval().requires_grad_(False)


@contextlib.contextmanager
def inference(weight: Tensor) -> Iterator[None]:
    """While open, models run as in sampling: without gradients; under autocast unless in fp32."""
    narrow = contextlib.nullcontext()
    if weight.dtype != torch.float32:
        narrow = torch.autocast(weight.device.type, weight.dtype)
    with torch.no_grad(), narrow:
        yield


@contextlib.contextmanager
def attention(model: nn.Module, kind: str) -> Iterator[None]:
    """While open, ldm's attention classes run as `kind`: `plain` (ldm's own) or `sdp` (fused).

    The class is patched, as WebUI does; merging treats a patched instance as another extension's. A
    diffusers model gets the processors of this kind.
    """
    if hasattr(model, "set_attn_processor"):
        processors = require("diffusers.models.attention_processor")
        kinds = {"plain": processors.AttnProcessor, "sdp": processors.AttnProcessor2_0}
        model.set_attn_processor(kinds[kind]())
    classes = {
        type(module) for module in model.modules() if type(module).__name__ == "CrossAttention"
    }
    with contextlib.ExitStack() as replacing:
        for attention_class in classes if kind == "sdp" else ():
            replacing.enter_context(patch.object(attention_class, "forward", _fused_attention))
        yield


def _fused_attention(layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    context = x if context is None else context
    q, k, v = (
        projected.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for projected in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    return layer.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
