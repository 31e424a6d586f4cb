"""Stands in for `modules.sd_samplers_kdiffusion`: samplers over sigmas. The only schedule is the model's own."""

from __future__ import annotations

from modules import sd_samplers_common, shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser

from lab.demo import samplers

samplers_k_diffusion = [
    ("Euler a", samplers.sample_euler_ancestral, ["k_euler_a", "k_euler_ancestral"], {}),
    ("Euler", samplers.sample_euler, ["k_euler"], {}),
    ("Heun", samplers.sample_heun, ["k_heun"], {"second_order": True}),
    ("DPM++ 2M", samplers.sample_dpmpp_2m, ["k_dpmpp_2m"], {}),
]
samplers_data_k_diffusion = [
    sd_samplers_common.SamplerData(label, lambda model, func=func: KDiffusionSampler(func, model), aliases, options)
    for label, func, aliases, options in samplers_k_diffusion
]


class CFGDenoiserKDiffusion(CFGDenoiser):
    """Guidance over sigmas."""

    @property
    def inner_model(self):
        """The loaded model as a denoiser."""
        if self.model_wrap is None:
            self.model_wrap = samplers.EpsDenoiser(shared.sd_model)
        return self.model_wrap


class KDiffusionSampler(sd_samplers_common.Sampler):
    """A sampler over sigmas."""

    def __init__(self, funcname, sd_model, options=None):
        super().__init__(funcname)
        self.model_wrap_cfg = CFGDenoiserKDiffusion(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_sigmas(self, p, steps):
        """[steps + 1] sigmas, falling to 0."""
        if p.sampler_noise_scheduler_override:
            return p.sampler_noise_scheduler_override(steps)
        return self.model_wrap.get_sigmas(steps)

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        """From noise."""
        sigmas = self.get_sigmas(p, steps or p.steps)
        self.last_latent = x = x * sigmas[0]
        schedule = {"sigmas": sigmas}
        return self._run(p, steps or p.steps, x, conditioning, unconditional_conditioning, image_conditioning, schedule)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        """From a picture: only the schedule's end is walked."""
        steps, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, steps)[steps - t_enc - 1 :]
        self.model_wrap_cfg.init_latent = self.last_latent = x
        noisy, schedule = x + noise * sigmas[0], {"sigmas": sigmas}
        return self._run(p, t_enc + 1, noisy, conditioning, unconditional_conditioning, image_conditioning, schedule)
