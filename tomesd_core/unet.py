"""Finds the self-attention layers of a UNet, by structure: those of ldm and sgm, and those of
diffusers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Names:
    """What a codebase calls the inputs of its modules, and the flag of a block that never attends
    to itself."""

    latent: str
    """Of the UNet."""
    image: str
    """Of the transformer."""
    tokens: str
    """Of attention, and its next two."""
    context: str
    mask: str
    never_itself: str


LDM = Names("x", "x", "x", "context", "mask", "disable_self_attn")
_TOKENS = "hidden_states"
DIFFUSERS = Names(
    "sample", _TOKENS, _TOKENS, "encoder_hidden_states", "attention_mask", "only_cross_attention"
)

PARTS = ("input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks")
"""Of ldm's UNet, and of diffusers'; in the order in which they run."""


def names_in(unet: nn.Module) -> Names:
    """The names that this UNet's codebase has."""
    return DIFFUSERS if hasattr(unet, "down_blocks") else LDM


@dataclasses.dataclass(frozen=True)
class Layer:
    """One transformer block's self-attention."""

    name: str
    """The block's name in the UNet."""
    transformer: nn.Module
    """The transformer that the block is in; its input [B, C, H, W] tells the grid."""
    block: Any
    """Its BasicTransformerBlock."""
    level: int | None
    """The downsample factor that the UNet's structure gives this layer; None where that can't be
    read off."""
    names: Names = LDM

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
        """False where the block was built to attend to the context twice."""
        return not getattr(self.block, self.names.never_itself, False)

    @property
    def is_compiled(self) -> bool:
        """Whether `torch.compile` has taken its block or transformer: hooks can't reach into that."""
        return any(map(is_compiled, (self.transformer, self.block, self.block.attn1)))


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` runs this module."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def find_unet(model: object) -> nn.Module:
    """The UNet of `model`: its `.model.diffusion_model`, its `.unet`, or itself.

    Raises `TypeError` for what is no module, and for a diffusers model that has no UNet.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    of_diffusers = kinds & {"DiffusionPipeline", "ModelMixin"}
    unet = getattr(getattr(model, "model", None), "diffusion_model", model)
    if "DiffusionPipeline" in kinds:
        unet = getattr(model, "unet", None)
    if of_diffusers and not hasattr(unet, "down_blocks"):
        raise TypeError(
            f"{type(model).__name__} has no UNet: transformers (SD3, Flux, PixArt) can't be merged"
        )
    if not isinstance(unet, nn.Module):
        raise TypeError(
            f"model must be a UNet module or have .model.diffusion_model, got {type(model).__name__}"
        )
    return unet


def find_layers(unet: nn.Module) -> list[Layer]:
    """Every self-attention layer, in the order of the UNet's modules; empty where there are none
    (SD3, say)."""
    levels, names = dict(_levels(unet)), names_in(unet)
    return [
        Layer(
            f"{name}.transformer_blocks.{number}" if name else f"transformer_blocks.{number}",
            module,
            block,
            levels.get(module),
            names,
        )
        for name, module in unet.named_modules()
        if _is_transformer(module)
        for number, block in enumerate(module.transformer_blocks)
    ]


def finest_level(layers: Sequence[Layer]) -> int | None:
    """The finest level at which the structure has self-attention; None where it can't be read off."""
    return min(
        (layer.level for layer in layers if layer.level is not None and layer.is_self_attention),
        default=None,
    )


def measured_level(
    latent: tuple[int, int], grid: tuple[int, int], expected: int | None = None
) -> int:
    """The level of a layer: the latent's size over its grid's, both (rows, columns), as a power of
    two.

    Every halving rounds up (65 to 33 to 17): `expected`, the level by the structure, is right where
    that gives the grid; else something was resized on the way, and the nearest power of two is.
    """
    if expected and all(
        math.ceil(whole / expected) == part for whole, part in zip(latent, grid, strict=True)
    ):
        return expected
    quotient = math.sqrt(latent[0] * latent[1] / (grid[0] * grid[1]))
    return int(2 ** max(0, round(math.log2(quotient))))


def _is_transformer(module: nn.Module) -> bool:
    blocks = getattr(module, "transformer_blocks", None)
    return isinstance(blocks, nn.ModuleList) and all(
        hasattr(block, "norm1") and isinstance(getattr(block, "attn1", None), nn.Module)
        for block in blocks
    )


def _levels(unet: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Each transformer with its downsample factor, on the way through the UNet."""
    level = 1
    for module in (stage for name in PARTS for stage in _stages(getattr(unet, name, None))):
        if _is_transformer(module):
            yield module, level
        elif _contains(module, "Downsample"):
            level *= 2
        elif _contains(module, "Upsample"):
            level //= 2


def _stages(module: nn.Module | None) -> Iterator[nn.Module]:
    """The transformers in `module`, and what lies between them."""
    if (
        module is not None
        and not _is_transformer(module)
        and any(map(_is_transformer, module.modules()))
    ):
        for child in module.children():
            yield from _stages(child)
    elif isinstance(module, (nn.ModuleList, nn.Sequential)):
        yield from module
    elif module is not None:
        yield module


def _contains(module: nn.Module, kind: str) -> bool:
    # Also inside a ResBlock, which may do the resizing itself (resblock_updown).
    return any(type(inner).__name__ in (kind, f"{kind}2D") for inner in module.modules())
