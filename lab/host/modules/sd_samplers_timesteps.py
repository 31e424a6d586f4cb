"""Stands in for `modules.sd_samplers_timesteps`: samplers over timesteps."""

from __future__ import annotations

import torch
from modules import sd_samplers_common, shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser

from lab.demo import samplers

samplers_timesteps = [("DDIM", samplers.sample_ddim, ["ddim"], {}), ("PLMS", samplers.sample_plms, ["plms"], {})]
samplers_data_timesteps = [
    sd_samplers_common.SamplerData(label, lambda model, func=func: CompVisSampler(func, model), aliases, options)
    for label, func, aliases, options in samplers_timesteps
]


class CompVisTimestepsDenoiser(torch.nn.Module):
    """The model itself: timesteps in, noise out."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inner_model = model

    def forward(self, input, timesteps, **kwargs):
        """Predicts the noise."""
        return self.inner_model.apply_model(input, timesteps, **kwargs)


class CFGDenoiserTimesteps(CFGDenoiser):
    """Guidance over timesteps; `sigma` is a timestep here, as in WebUI."""

    def __init__(self, sampler):
        super().__init__(sampler)
        self.alphas = shared.sd_model.alphas_cumprod
        self.mask_before_denoising = True

    def get_pred_x0(self, x_in, x_out, sigma):
        """The picture that follows from the predicted noise."""
        alpha = self.alphas[sigma.long()][:, None, None, None]
        return (x_in - (1 - alpha).sqrt() * x_out) / alpha.sqrt()

    @property
    def inner_model(self):
        """The loaded model."""
        if self.model_wrap is None:
            self.model_wrap = CompVisTimestepsDenoiser(shared.sd_model)
        return self.model_wrap


class CompVisSampler(sd_samplers_common.Sampler):
    """A sampler over timesteps."""

    def __init__(self, funcname, sd_model):
        super().__init__(funcname)
        self.model_wrap_cfg = CFGDenoiserTimesteps(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_timesteps(self, p, steps):
        """Rising timesteps. There can be more than `steps` of them: 1000 need not divide."""
        timesteps = torch.arange(0, 1000, max(1000 // steps, 1), device=shared.sd_model.alphas_cumprod.device)
        return (timesteps + 1).clamp(0, 999)

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        """From noise."""
        steps = steps or p.steps
        schedule = {"timesteps": self.get_timesteps(p, steps)}
        self.last_latent = x
        return self._run(p, steps, x, conditioning, unconditional_conditioning, image_conditioning, schedule)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        """From a picture: only the schedule's end is walked."""
        steps, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
        timesteps = self.get_timesteps(p, steps)
        alpha = shared.sd_model.alphas_cumprod[timesteps[t_enc]]
        self.model_wrap_cfg.init_latent = self.last_latent = x
        noisy, schedule = x * alpha.sqrt() + noise * (1 - alpha).sqrt(), {"timesteps": timesteps[:t_enc]}
        return self._run(p, t_enc + 1, noisy, conditioning, unconditional_conditioning, image_conditioning, schedule)
