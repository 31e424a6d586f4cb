"""Small UNets and pipelines of diffusers with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tomesd_core as tome

warnings.filterwarnings("ignore", category=FutureWarning)
diffusers = pytest.importorskip("diffusers", reason="nox -s diffusers_pins installs it")

CONTEXT = 24
SHAPES = {
    "sd15": {"attention_head_dim": 4},
    "sd2": {"attention_head_dim": [4, 8], "use_linear_projection": True},
    "sdxl": {
        "attention_head_dim": [4, 8],
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + CONTEXT,
    },
    "inpainting": {"attention_head_dim": 4, "in_channels": 9},
}


@pytest.fixture
def settings() -> Callable[..., tome.MergeSettings]:
    """Make settings that merge small layers too, by default at one ratio."""

    def make(method: str = "keys", ratio: float = 0.5, **values: Any) -> tome.MergeSettings:
        values = {"schedule": "constant", "full_steps": 1, **values}
        return tome.MergeSettings(method=method, ratio=ratio, skip_unprofitable=False, **values)

    return make


@pytest.fixture
def make_unet() -> Callable[..., Any]:
    """Make the UNet of a model family."""

    def make(shape: str = "sd15", **changes: Any) -> Any:
        config = {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": CONTEXT,
            "norm_num_groups": 8,
        }
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**{**config, **SHAPES[shape], **changes})
        return unet.eval().requires_grad_(False)

    return make


@pytest.fixture
def run() -> Callable[..., Tensor]:
    """Run one pass with batch 2; with `equal` all tokens of the latent are equal."""

    def run(
        unet: Any, size: tuple[int, int] = (32, 32), equal: bool = False, **conditions: Any
    ) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(2, unet.config.in_channels, *size, generator=generator)
        if equal:
            latent = latent.mean((2, 3), keepdim=True).expand_as(latent)
        context = torch.randn(2, 7, CONTEXT, generator=generator)
        conditions |= {"text_embeds": context[:, 0], "time_ids": torch.zeros(2, 6)}
        with torch.no_grad():
            return unet(latent, torch.tensor(5), context, added_cond_kwargs=conditions).sample

    return run


@pytest.fixture
def make_pipeline(make_unet: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pipeline around such a UNet, for prompt embeddings."""

    def make(kind: str = "StableDiffusionPipeline", shape: str = "sd15") -> Any:
        parts: dict[str, Any] = {}
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=100, clip_sample=False, steps_offset=1
        )
        unet = make_unet(shape)
        if "ControlNet" in kind:
            parts["controlnet"] = diffusers.ControlNetModel.from_unet(
                unet, conditioning_embedding_out_channels=(8, 8)
            )
        absent = ["text_encoder", "tokenizer"]
        if "XL" in kind:
            absent += ["text_encoder_2", "tokenizer_2"]
        else:
            absent += ["safety_checker", "feature_extractor"]
        pipeline = getattr(diffusers, kind)(
            vae=vae, unet=unet, scheduler=scheduler, **parts, **dict.fromkeys(absent)
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def picture() -> Callable[..., Tensor]:
    """Make the picture of a fixed seed."""

    def picture(pipeline: Any, **inputs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        embeds = torch.randn(2, 7, CONTEXT, generator=generator)
        given = {
            "prompt_embeds": embeds[:1],
            "negative_prompt_embeds": embeds[1:],
            "num_inference_steps": 4,
            "output_type": "pt",
            "generator": generator,
            **inputs,
        }
        if "XL" in type(pipeline).__name__:
            given |= {
                "pooled_prompt_embeds": embeds[:1, 0],
                "negative_pooled_prompt_embeds": embeds[1:, 0],
            }
        return pipeline(**given).images

    return picture
