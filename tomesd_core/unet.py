"""Find the self-attention layers of a UNet, of ldm, sgm or diffusers, by its structure."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Names:
    """A codebase's names for the inputs of its modules, and for its flag against self-attention."""

    latent: str
    """The UNet's input."""
    hidden: str
    """The input of a transformer (an image) and of its attentions (tokens)."""
    context: str
    mask: str
    never_itself: str


LDM = Names("x", "x", "context", "mask", "disable_self_attn")
DIFFUSERS = Names(
    "sample", "hidden_states", "encoder_hidden_states", "attention_mask", "only_cross_attention"
)

PARTS = ("input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks")
"""The parts of ldm's and diffusers' UNets, in the order in which they run."""


def names_in(unet: nn.Module) -> Names:
    """The names of this UNet's codebase."""
    return DIFFUSERS if hasattr(unet, "down_blocks") else LDM


@dataclasses.dataclass(frozen=True)
class Layer:
    """The self-attention of one transformer block."""

    name: str
    """The block's name in the UNet."""
    transformer: nn.Module
    """The transformer that contains the block; its input [B, C, H, W] gives the grid."""
    block: Any
    """The BasicTransformerBlock."""
    level: int | None
    """The downsample factor by the UNet's structure; None if unknown."""
    names: Names = LDM

    @property
    def channels(self) -> int:
        """Channels of the block's tokens."""
        return int(self.block.norm1.weight.shape[0])

    @property
    def heads(self) -> int:
        """Heads of its attention; 1 if unknown."""
        heads = getattr(self.block.attn1, "heads", None)
        return heads if isinstance(heads, int) and heads > 0 else 1

    @property
    def is_self_attention(self) -> bool:
        """False if the block attends to the context twice."""
        return not getattr(self.block, self.names.never_itself, False)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` compiled this module."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def find_unet(model: object) -> nn.Module:
    """The UNet of `model`: its `.model.diffusion_model`, its `.unet`, or `model` itself.

    Raises `TypeError` if that is not a module, and for a diffusers model without a UNet.
    """
    unet = getattr(getattr(model, "model", None), "diffusion_model", getattr(model, "unet", model))
    kinds = {kind.__name__ for kind in type(unet).__mro__}
    is_other = kinds & {"DiffusionPipeline", "ModelMixin"} and not hasattr(unet, "down_blocks")
    if is_other or not isinstance(unet, nn.Module):
        raise TypeError(
            "model must be a UNet or have one in .model.diffusion_model or .unet, got "
            f"{type(model).__name__}; transformers (SD3, Flux, PixArt) have no UNet"
        )
    return unet


def find_layers(unet: nn.Module) -> list[Layer]:
    """Every self-attention layer, in the order in which they run; empty for SD3."""
    names, level, resized = names_in(unet), 1, set()
    layers: list[Layer] = []
    for path, module in sorted(unet.named_modules(), key=lambda named: _part_of(named[0])):
        parent, kind = path.rpartition(".")[0], type(module).__name__.removesuffix("2D")
        # A ResBlock that resizes (resblock_updown) holds two: one is for its shortcut.
        if kind in ("Downsample", "Upsample") and parent not in resized:
            level = level * 2 if kind == "Downsample" else level // 2
            resized.add(parent)
        elif _is_transformer(module):
            known = level if _part_of(path) < len(PARTS) else None
            for number, block in module.transformer_blocks.named_children():
                name = ".".join(filter(None, (path, "transformer_blocks", number)))
                layers.append(Layer(name, module, block, known, names))
    return layers


def _part_of(path: str) -> int:
    """The place in `PARTS` of the part in which a module is; the number of parts if in none."""
    part = path.partition(".")[0]
    return PARTS.index(part) if part in PARTS else len(PARTS)


def measured_level(
    latent: tuple[int, int], grid: tuple[int, int], expected: int | None = None
) -> int:
    """The level of a layer: the size of the latent over that of its grid, as a power of two.

    Sizes are (rows, columns). Each halving rounds up (65 to 33 to 17), so `expected`, the level by
    the structure, is right if it gives the grid. If not, something resized the image, and the
    nearest power of two is returned.
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


def is_running(unet: nn.Module) -> bool:
    """Whether any thread is inside a call of `unet`, or of a module in it."""
    modules, code = set(map(id, unet.modules())), nn.Module._call_impl.__code__
    for top in sys._current_frames().values():
        frame: types.FrameType | None = top
        while frame is not None:
            if frame.f_code is code and id(frame.f_locals.get("self")) in modules:
                return True
            frame = frame.f_back
    return False
