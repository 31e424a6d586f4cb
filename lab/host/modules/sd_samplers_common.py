"""Stands in for `modules.sd_samplers_common`: what all samplers share, and the switch to the refiner."""

from __future__ import annotations

import inspect
from collections import namedtuple

import torch
from modules import sd_models, shared
from modules.shared import opts, state


class InterruptedException(BaseException):
    """Somebody pressed Interrupt or Skip."""


class SamplerData(namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])):
    """A sampler's name and what makes it."""

    def total_steps(self, steps):
        """How often the model is expected to run."""
        return steps * 2 if self.options.get("second_order") else steps


def setup_img2img_steps(p, steps=None):
    """(steps of the whole schedule, index of the first one taken, counted from the end)."""
    strength = min(p.denoising_strength, 0.999)
    if opts.img2img_fix_steps or steps is not None:
        wanted = steps or p.steps
        return (int(wanted / strength) if strength > 0 else 0), wanted - 1
    return p.steps, int(strength * p.steps)


def decode_first_stage(model, x):
    """Latents to pictures in [-1, 1]: by the model's own decoder, or, in pixel space, by value range and size alone."""
    if hasattr(model, "decode_first_stage"):
        return model.decode_first_stage(x)
    if hasattr(model, "to_rgb"):
        return model.to_rgb(x) * 2 - 1
    from modules import processing

    return torch.nn.functional.interpolate(x[:, :3], scale_factor=float(processing.opt_f))


def images_tensor_to_samples(image, approximation=None, model=None):
    """Pictures in [0, 1] to latents: the reverse of `decode_first_stage`."""
    model = model or shared.sd_model
    if hasattr(model, "encode_first_stage"):
        return model.encode_first_stage(image * 2 - 1)
    from modules import images, processing

    if hasattr(model, "from_images"):
        return model.from_images([images.to_image(picture) for picture in image])
    x = torch.nn.functional.avg_pool2d(image * 2 - 1, processing.opt_f)
    return torch.cat([x, x.new_zeros(len(x), processing.opt_C - 3, *x.shape[2:])], dim=1)


def store_latent(decoded):
    """Keeps the picture as it is so far."""
    state.current_latent = decoded


def apply_refiner(cfg_denoiser, sigma=None):
    """Swaps the model for the refiner when it is time; says whether it did."""
    p = cfg_denoiser.p
    if opts.refiner_switch_by_sample_steps or sigma is None:
        done = cfg_denoiser.step / cfg_denoiser.total_steps
        p.extra_generation_params["Refiner switch by sampling steps"] = True
    else:
        sigmas = getattr(cfg_denoiser.inner_model, "sigmas", None)
        timestep = sigma.max().int() if sigmas is None else (sigmas - sigma.max()).abs().argmin()
        done = (999 - timestep) / 1000
    if p.refiner_switch_at is not None and done < p.refiner_switch_at:
        return False
    if p.refiner_checkpoint_info is None or shared.sd_model.sd_checkpoint_info == p.refiner_checkpoint_info:
        return False
    if getattr(p, "enable_hr", False) and not p.is_hr_pass:
        return False
    p.extra_generation_params["Refiner"] = p.refiner_checkpoint_info.short_title
    p.extra_generation_params["Refiner switch at"] = p.refiner_switch_at
    with sd_models.SkipWritingToConfig():
        sd_models.reload_model_weights(info=p.refiner_checkpoint_info)
    p.setup_conds()
    cfg_denoiser.update_inner_model()
    return True


class Sampler:
    """One pass: what it is given, how far it is, and how it ends early."""

    def __init__(self, funcname):
        self.func = self.funcname = funcname
        self.config: SamplerData | None = None
        self.last_latent = self.model_wrap_cfg = self.sampler_extra_args = self.p = self.eta = None
        self.s_min_uncond = 0.0
        self.conditioning_key = "crossattn"

    def callback_state(self, d):
        """After a step: the state's count follows, so it lags while the model runs."""
        state.sampling_step = d["i"]

    def launch_sampling(self, steps, func):
        """Runs the sampler; when interrupted, returns the picture so far."""
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        state.sampling_steps, state.sampling_step = steps, 0
        try:
            return func()
        except InterruptedException:
            return self.last_latent

    def initialize(self, p) -> dict:
        """Takes the pass's settings from `p`; returns extra arguments for the sampler's function."""
        self.p = self.model_wrap_cfg.p = p
        self.model_wrap_cfg.mask, self.model_wrap_cfg.nmask = getattr(p, "mask", None), getattr(p, "nmask", None)
        self.model_wrap_cfg.step = 0
        self.s_min_uncond = p.s_min_uncond or 0.0
        parameters, extra = inspect.signature(self.func).parameters, {}
        if "eta" in parameters:
            extra["eta"] = 1.0 if p.eta is None else p.eta
            if extra["eta"] != 1.0:
                p.extra_generation_params["Eta"] = extra["eta"]
        if "noise_sampler" in parameters:
            extra["noise_sampler"] = p.rng.next
        if "alphas_cumprod" in parameters:
            extra["alphas_cumprod"] = shared.sd_model.alphas_cumprod
        return extra

    def _run(self, p, steps, x, cond, uncond, image_cond, schedule: dict):
        """The part that txt2img and img2img have in common; `schedule` is the sigmas or the timesteps."""
        kwargs = {**schedule, **self.initialize(p)}
        self.sampler_extra_args = {
            "cond": cond,
            "uncond": uncond,
            "image_cond": image_cond,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": self.s_min_uncond,
        }
        model, args = self.model_wrap_cfg, self.sampler_extra_args
        samples = self.launch_sampling(
            steps, lambda: self.func(model, x, extra_args=args, callback=self.callback_state, **kwargs)
        )
        if self.model_wrap_cfg.padded_cond_uncond:
            p.extra_generation_params["Pad conds"] = True
        return samples

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        """From noise of variance 1."""
        raise NotImplementedError

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        """From a picture and noise."""
        raise NotImplementedError
