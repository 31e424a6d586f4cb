"""Guided sampling of a tiny model: ldm's PLMS and DDIM, and DPM++ 2M as in WebUI."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..demo.model import TinyModel
from ..demo.samplers import EpsDenoiser, sample_dpmpp_2m
from .packages import require

BeginStep = Callable[[int], None]
"""Called with a step's number, from 0, before its first evaluation, and once at the end."""


class Guidance(NamedTuple):
    """Classifier-free guidance of a batch: contexts [B, L, D], and the scale."""

    context: Tensor
    empty: Tensor
    scale: float


Sampler = Callable[[TinyModel, Tensor, Guidance, int, BeginStep], Tensor]
"""(model, noise [B, C, H, W], guidance, steps, begin_step) to pictures [B, C, H, W]."""


def _by_ldm(module: str, name: str) -> Sampler:
    def sample(
        model: TinyModel, noise: Tensor, guidance: Guidance, steps: int, begin_step: BeginStep
    ) -> Tensor:
        sampler = getattr(require(module), name)(model)
        begin_step(0)
        # It prints, and draws a progress bar for each run.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            x, _ = sampler.sample(
                S=steps,
                batch_size=len(noise),
                shape=tuple(noise.shape[1:]),
                conditioning=guidance.context,
                unconditional_conditioning=guidance.empty,
                unconditional_guidance_scale=guidance.scale,
                x_T=noise,
                callback=lambda step: begin_step(step + 1),
                verbose=False,
            )
        return x

    return sample


def _dpmpp_2m(
    model: TinyModel, noise: Tensor, guidance: Guidance, steps: int, begin_step: BeginStep
) -> Tensor:
    context, empty, scale = guidance
    denoiser, both = EpsDenoiser(model), torch.cat([empty, context])

    def guided(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        begin_step(step)
        without, with_prompt = denoiser(torch.cat([x, x]), sigma.expand(2 * len(x)), both).chunk(2)
        return without + scale * (with_prompt - without)

    sigmas = denoiser.get_sigmas(steps)
    return sample_dpmpp_2m(guided, noise * sigmas[0], sigmas)


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "PLMS": _by_ldm("ldm.models.diffusion.plms", "PLMSSampler"),
        "DDIM": _by_ldm("ldm.models.diffusion.ddim", "DDIMSampler"),
        "DPM++ 2M": _dpmpp_2m,
    }
)
