"""Find the self-attention layers of a UNet, of ldm, sgm or diffusers, by its structure."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Names:
    """A codebase's names for the inputs of its modules, and for its flag against self-attention."""

    latent: str
    """The UNet's input."""
    image: str
    """The transformer's input."""
    tokens: str
    """The attention's inputs, in this order: tokens, context, mask."""
    context: str
    mask: str
    never_itself: str


LDM = Names("x", "x", "x", "context", "mask", "disable_self_attn")
_TOKENS = "hidden_states"
DIFFUSERS = Names(
    "sample", _TOKENS, _TOKENS, "encoder_hidden_states", "attention_mask", "only_cross_attention"
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

    @property
    def is_compiled(self) -> bool:
        """Whether `torch.compile` compiled the block or its transformer."""
        return any(map(is_compiled, (self.transformer, self.block, self.block.attn1)))


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` compiled this module."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def find_unet(model: object) -> nn.Module:
    """The UNet of `model`: its `.model.diffusion_model`, its `.unet`, or `model` itself.

    Raises `TypeError` if that is not a module, and for a diffusers model without a UNet.
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
        kind = type(model).__name__
        raise TypeError(f"model must be a UNet module or have .model.diffusion_model, got {kind}")
    return unet


def find_layers(unet: nn.Module) -> list[Layer]:
    """Every self-attention layer, in the order of the UNet's modules; empty for SD3."""
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
    """The finest level with self-attention by the UNet's structure; None if unknown."""
    return min(
        (layer.level for layer in layers if layer.level is not None and layer.is_self_attention),
        default=None,
    )


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


def _levels(unet: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Each transformer with its downsample factor, in the order in which they run."""
    level = 1
    for module in (stage for name in PARTS for stage in _stages(getattr(unet, name, None))):
        if _is_transformer(module):
            yield module, level
        elif _contains(module, "Downsample"):
            level *= 2
        elif _contains(module, "Upsample"):
            level //= 2


def _stages(module: nn.Module | None) -> Iterator[nn.Module]:
    """The transformers in `module` and the modules between them."""
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
    # Also inside a ResBlock, which may resize by itself (resblock_updown).
    return any(type(inner).__name__ in (kind, f"{kind}2D") for inner in module.modules())


def is_running(unet: nn.Module) -> bool:
    """Whether any thread is inside a call of `unet`, or of a module in it."""
    modules = set(map(id, unet.modules()))
    return any(id(module) in modules for module in _running_modules())


def _running_modules() -> Iterator[object]:
    """The modules whose calls are on the stack of any thread."""
    code = nn.Module._call_impl.__code__
    for top in sys._current_frames().values():
        frame: types.FrameType | None = top
        while frame is not None:
            if frame.f_code is code:
                yield frame.f_locals.get("self")
            frame = frame.f_back
