"""Finds the self-attention layers of an ldm or sgm UNet, by structure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Layer:
    """One transformer block's self-attention."""

    name: str
    """The block's name in the UNet."""
    transformer: nn.Module
    """The SpatialTransformer that the block is in; its input [B, C, H, W] tells the grid."""
    block: Any
    """Its BasicTransformerBlock."""
    level: int | None
    """The downsample factor that the UNet's structure gives this layer; None where that can't be read off."""

    @property
    def channels(self) -> int:
        """How many channels the block's tokens have."""
        return int(self.block.norm1.weight.shape[0])

    @property
    def heads(self) -> int:
        """How many heads its attention has; 1 where that is unknown."""
        heads = getattr(self.block.attn1, "heads", None)
        return heads if isinstance(heads, int) and heads > 0 else 1

    @property
    def is_self_attention(self) -> bool:
        """False where the block was built to attend to the context twice (`disable_self_attn`)."""
        return not getattr(self.block, "disable_self_attn", False)


def find_unet(model: object) -> nn.Module:
    """The UNet of `model`: its `.model.diffusion_model`, or itself.

    Raises `TypeError` for what is no module, and for a diffusers model, whose blocks are called in another way.
    """
    if any(kind.__name__ in ("DiffusionPipeline", "ModelMixin") for kind in type(model).__mro__):
        raise TypeError(f"{type(model).__name__} is a diffusers model: only ldm and sgm (CompVis) UNets can be merged")
    unet = getattr(getattr(model, "model", None), "diffusion_model", model)
    if not isinstance(unet, nn.Module):
        raise TypeError(f"model must be a UNet module or have .model.diffusion_model, got {type(model).__name__}")
    return unet


def find_layers(unet: nn.Module) -> list[Layer]:
    """Every self-attention layer, in the order of the UNet's modules; empty where there are none (SD3, say)."""
    levels = dict(_levels(unet))
    return [
        Layer(
            f"{name}.transformer_blocks.{number}" if name else f"transformer_blocks.{number}",
            module,
            block,
            levels.get(module),
        )
        for name, module in unet.named_modules()
        if _is_transformer(module)
        for number, block in enumerate(module.transformer_blocks)
    ]


def finest_level(layers: Sequence[Layer]) -> int | None:
    """The finest level at which the structure has self-attention; None where it can't be read off."""
    return min((layer.level for layer in layers if layer.level is not None and layer.is_self_attention), default=None)


def measured_level(latent: tuple[int, int], grid: tuple[int, int], expected: int | None = None) -> int:
    """The level of a layer: the latent's size over its grid's, both (rows, columns), as a power of two.

    Every halving rounds up (65 to 33 to 17): `expected`, the level by the structure, is right where that gives the
    grid; else something was resized on the way, and the nearest power of two is.
    """
    if expected and all(math.ceil(whole / expected) == part for whole, part in zip(latent, grid, strict=True)):
        return expected
    quotient = math.sqrt(latent[0] * latent[1] / (grid[0] * grid[1]))
    return int(2 ** max(0, round(math.log2(quotient))))


def _is_transformer(module: nn.Module) -> bool:
    blocks = getattr(module, "transformer_blocks", None)
    return isinstance(blocks, nn.ModuleList) and all(
        hasattr(block, "norm1") and isinstance(getattr(block, "attn1", None), nn.Module) for block in blocks
    )


def _levels(unet: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Each SpatialTransformer with its downsample factor, on the way through the UNet."""
    level = 1
    for part in ("input_blocks", "middle_block", "output_blocks"):
        for stage in getattr(unet, part, None) or ():
            for module in stage if isinstance(stage, nn.Sequential) else (stage,):
                if _is_transformer(module):
                    yield module, level
                elif _contains(module, "Downsample"):
                    level *= 2
                elif _contains(module, "Upsample"):
                    level //= 2


def _contains(module: nn.Module, kind: str) -> bool:
    # Also inside a ResBlock, which may do the resizing itself (resblock_updown).
    return any(type(inner).__name__ == kind for inner in module.modules())
