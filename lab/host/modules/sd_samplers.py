"""Stands in for `modules.sd_samplers*`: guidance, the refiner switch, and the list of samplers.

The samplers are those of `lab.demo.samplers`. InstructPix2Pix, inpainting models, prompts of two
lengths and steps without the unprompted half are missing.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from itertools import islice
from typing import Any

import torch
from modules import script_callbacks, sd_models, shared
from modules.sd_samplers_common import InterruptedException
from modules.shared import opts, state
from torch import Tensor

from lab.demo import samplers


class CFGDenoiser(torch.nn.Module):
    """Denoiser of a sampler: both halves of guidance, refiner switch, mask, and callbacks."""

    def __init__(self, p: Any, sampler: Sampler) -> None:
        super().__init__()
        self.p, self.sampler = p, sampler
        self.step = self.total_steps = 0
        self.mask, self.nmask, self.init_latent = p.mask, p.nmask, None
        self.update_inner_model()

    def update_inner_model(self) -> None:
        """Take the loaded model, over sigmas or timesteps."""
        model = sd_models.model_data.sd_model
        is_over_timesteps = self.sampler.config.is_over_timesteps
        self.inner_model = model.apply_model if is_over_timesteps else samplers.EpsDenoiser(model)

    def apply_refiner(self, sigma: Tensor) -> None:
        """Swap the model for the refiner at its step."""
        sigmas = getattr(self.inner_model, "sigmas", None)
        timestep = sigma.max().int() if sigmas is None else (sigmas - sigma.max()).abs().argmin()
        p, name = self.p, sd_models.model_data.sd_model.sd_checkpoint_info.model_name
        if p.refiner_checkpoint in (None, name) or (999 - timestep) / 1000 < p.refiner_switch_at:
            return
        if getattr(p, "enable_hr", False) and not p.is_hr_pass:
            return
        p.extra_generation_params["Refiner"] = p.refiner_checkpoint
        p.extra_generation_params["Refiner switch at"] = p.refiner_switch_at
        sd_models.reload_model_weights(p.refiner_checkpoint)
        p.setup_conds()
        self.sampler.sampler_extra_args.update(cond=p.c, uncond=p.uc)
        self.update_inner_model()

    def forward(
        self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float
    ) -> Tensor:
        """Run the model once, or for each half of guidance."""
        if state.interrupted or state.skipped:
            raise InterruptedException
        self.apply_refiner(sigma)
        cond, uncond = (self.sampler.sampler_extra_args[name] for name in ("cond", "uncond"))
        is_over_timesteps = self.sampler.config.is_over_timesteps
        if is_over_timesteps and self.mask is not None:
            x = x * self.nmask + self.init_latent * self.mask

        # A prompt has one row, or with `AND` several.
        repeats = torch.tensor([len(parts) for parts in cond.batch], device=x.device)
        x_in, sigma_in = (torch.cat([t.repeat_interleave(repeats, 0), t]) for t in (x, sigma))
        text = torch.stack([tokens for parts in cond.batch for tokens, _ in parts])
        weights = [weight for parts in cond.batch for _, weight in parts]
        params = script_callbacks.CFGDenoiserParams(
            x=x_in,
            sigma=sigma_in,
            sampling_step=state.sampling_step,
            text_cond=text,
            text_uncond=uncond,
            denoiser=self,
        )
        script_callbacks.cfg_denoiser_callback(params)
        size = len(x_in) if opts.batch_cond_uncond else len(x)
        parts = (part.split(size) for part in (params.x, params.sigma, torch.cat([text, uncond])))
        x_out = torch.cat([self.inner_model(*part) for part in zip(*parts, strict=True)])
        script_callbacks.cfg_denoised_callback(params)

        rows, guided = zip(x_out, weights, strict=False), []
        for plain, own in zip(x_out[-len(x) :], cond.batch, strict=True):
            parts = islice(rows, len(own))
            guided.append(plain + sum(part * cond_scale * (row - plain) for row, part in parts))
        denoised = torch.stack(guided)
        if not is_over_timesteps and self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = denoised
        if is_over_timesteps:
            alpha = sd_models.model_data.sd_model.alphas_cumprod[sigma.long()][:, None, None, None]
            self.sampler.last_latent = (x - (1 - alpha).sqrt() * denoised) / alpha.sqrt()
        self.step += 1
        return denoised


SamplerData = namedtuple(
    "SamplerData", ["function", "is_over_timesteps", "options"], defaults=(False, {})
)

all_samplers_map = {
    "Euler": SamplerData(samplers.sample_euler),
    "Euler a": SamplerData(samplers.sample_euler_ancestral),
    "Heun": SamplerData(samplers.sample_heun, options={"second_order": True}),
    "DPM++ 2M": SamplerData(samplers.sample_dpmpp_2m),
    "DDIM": SamplerData(samplers.sample_ddim, is_over_timesteps=True),
    "PLMS": SamplerData(samplers.sample_plms, is_over_timesteps=True),
}


class Sampler:
    """One pass: its inputs, its state, and its early end."""

    def __init__(self, p: Any) -> None:
        self.config = all_samplers_map[p.sampler_name]
        self.sampler_extra_args: dict[str, Any] = {}
        self.last_latent: Tensor | None = None
        self.model_wrap_cfg = CFGDenoiser(p, self)

    def _schedule(self, steps: int) -> Tensor:
        """Falling sigmas and a final 0, or rising timesteps: more than `steps` unless it divides
        1000."""
        if self.config.is_over_timesteps:
            timesteps = torch.arange(0, 1000, max(1000 // steps, 1), device=shared.device) + 1
            return timesteps.clamp(0, 999)
        return self.model_wrap_cfg.inner_model.get_sigmas(steps)

    def sample(self, p: Any, x: Tensor, cond: Any, uncond: Tensor) -> Tensor:
        """Sample from noise of variance 1."""
        schedule = self._schedule(p.steps)
        noise = x if self.config.is_over_timesteps else x * schedule[0]
        return self._run(p, p.steps, noise, cond, uncond, schedule)

    def sample_img2img(
        self, p: Any, x: Tensor, noise: Tensor, cond: Any, uncond: Tensor, steps: int | None = None
    ) -> Tensor:
        """Sample from a picture over the schedule's end, in `steps` steps if given."""
        strength = min(p.denoising_strength, 0.999)
        last = steps - 1 if steps else int(strength * p.steps)
        steps = int(steps / strength) if steps else p.steps
        self.model_wrap_cfg.init_latent, schedule = x, self._schedule(steps)
        if self.config.is_over_timesteps:
            alpha = sd_models.model_data.sd_model.alphas_cumprod[schedule[last]]
            noisy, schedule = x * alpha.sqrt() + noise * (1 - alpha).sqrt(), schedule[:last]
        else:
            schedule = schedule[steps - last - 1 :]
            noisy = x + noise * schedule[0]
        return self._run(p, last + 1, noisy, cond, uncond, schedule)

    def _run(
        self, p: Any, steps: int, x: Tensor, cond: Any, uncond: Tensor, schedule: Tensor
    ) -> Tensor:
        """Run the sampler; if interrupted, return the last latent."""
        function, denoiser = self.config.function, self.model_wrap_cfg
        denoiser.total_steps = steps * 2 if self.config.options.get("second_order") else steps
        state.sampling_steps, state.sampling_step = steps, 0
        options = {"sigmas": schedule, "timesteps": schedule, "noise_sampler": p.rng.next}
        options["alphas_cumprod"] = sd_models.model_data.sd_model.alphas_cumprod
        names = inspect.signature(function).parameters.keys() & options.keys()
        accepted = {name: options[name] for name in names}
        self.sampler_extra_args = {"cond": cond, "uncond": uncond, "cond_scale": p.cfg_scale}
        self.last_latent = x

        def evaluate(x: Tensor, level: Tensor, step: int | None = None) -> Tensor:
            denoised = denoiser(x, level * x.new_ones(len(x)), **self.sampler_extra_args)
            if step is not None:
                state.sampling_step = step  # after the model ran: it lags
            return denoised

        try:
            return function(evaluate, x, **accepted)
        except InterruptedException:
            return self.last_latent
