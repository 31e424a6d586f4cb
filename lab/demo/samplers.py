"""Samplers as flat functions over a denoiser, in the manner of crowsonkb/k-diffusion.

The sigma-space functions take `model(x, sigma, **extra_args)`, which returns the denoised picture, and a falling list
of `sigmas` that ends in 0; the timestep-space ones (DDIM, PLMS) take `model(x, t, **extra_args)`, which returns the
predicted noise. `x` is [B, C, H, W]. After each step `callback` gets a dict with `x`, `i` (the step, from 0), `sigma`
and `denoised`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class EpsDenoiser(nn.Module):
    """Turns a noise-predicting model into a sigma-space denoiser (Karras et al. 2022, c_skip = 1, c_out = -sigma).

    `model` has `alphas_cumprod` [T] and `apply_model(x, t, cond)`; this module is called as `(x, sigma, cond=…)`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner_model = model
        alphas = model.alphas_cumprod.float()
        self.sigmas = ((1 - alphas) / alphas).sqrt()
        self.log_sigmas = self.sigmas.log()

    def get_sigmas(self, n: int) -> Tensor:
        """`n` sigmas, evenly spaced in timesteps from the noisiest down, and a final 0: [n + 1]."""
        t = torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)
        return torch.cat([self.t_to_sigma(t), self.sigmas.new_zeros(1)])

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The sigma of a (fractional) timestep, interpolated between logarithms."""
        low = t.floor().long()
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[t.ceil().long()], t - low).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep of a sigma: the inverse of `t_to_sigma`."""
        log_sigma = sigma.log()
        low = (torch.searchsorted(self.log_sigmas, log_sigma, right=True) - 1).clamp(0, len(self.sigmas) - 2)
        start, end = self.log_sigmas[low], self.log_sigmas[low + 1]
        return low + ((log_sigma - start) / (end - start)).clamp(0, 1)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        wide = sigma[:, None, None, None]
        eps = self.inner_model.apply_model(x / (wide**2 + 1).sqrt(), self.sigma_to_t(sigma), cond)
        return x - eps * wide


def _report(callback: Callable | None, x: Tensor, i: int, sigma: Tensor | float, denoised: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


@torch.no_grad()
def sample_euler(model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback=None) -> Tensor:
    """Euler steps (Karras et al. 2022, algorithm 1 without its correction)."""
    extra_args, ones = extra_args or {}, x.new_ones(x.shape[0])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        _report(callback, x, i, sigmas[i], denoised)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


@torch.no_grad()
def sample_euler_ancestral(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback=None,
    eta: float = 1.0,
    noise_sampler=None,
) -> Tensor:
    """Euler steps that go down further than asked and add fresh noise back up to the next sigma."""
    extra_args, ones = extra_args or {}, x.new_ones(x.shape[0])
    noise_sampler = noise_sampler or (lambda: torch.randn_like(x))
    for i in range(len(sigmas) - 1):
        sigma, target = sigmas[i], sigmas[i + 1]
        denoised = model(x, sigma * ones, **extra_args)
        _report(callback, x, i, sigma, denoised)
        sigma_up = torch.minimum(target, eta * (target**2 * (sigma**2 - target**2) / sigma**2).sqrt())
        sigma_down = (target**2 - sigma_up**2).sqrt()
        x = x + (x - denoised) / sigma * (sigma_down - sigma)
        if target > 0:
            x = x + noise_sampler() * sigma_up
    return x


@torch.no_grad()
def sample_heun(model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback=None) -> Tensor:
    """Heun's method: two evaluations a step, one in the last (Karras et al. 2022, algorithm 1)."""
    extra_args, ones = extra_args or {}, x.new_ones(x.shape[0])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        _report(callback, x, i, sigmas[i], denoised)
        slope, dt = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            return x + slope * dt
        ahead = x + slope * dt
        slope_ahead = (ahead - model(ahead, sigmas[i + 1] * ones, **extra_args)) / sigmas[i + 1]
        x = x + (slope + slope_ahead) / 2 * dt
    return x


@torch.no_grad()
def sample_dpmpp_2m(model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback=None) -> Tensor:
    """DPM-Solver++(2M), multistep of second order (Lu et al. 2022)."""
    extra_args, ones, previous = extra_args or {}, x.new_ones(x.shape[0]), None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        _report(callback, x, i, sigmas[i], denoised)
        if sigmas[i + 1] == 0:
            return denoised
        h = sigmas[i].log() - sigmas[i + 1].log()
        target = denoised
        if previous is not None:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            target = denoised + (denoised - previous) / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * target
        previous = denoised
    return x


def _timestep_steps(timesteps: Tensor, alphas_cumprod: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(t, next t, alpha, next alpha) from the noisiest step down; the lowest timestep is only walked to."""
    pairs = [(timesteps[i], timesteps[i - 1]) for i in range(len(timesteps) - 1, 0, -1)]
    return [(t, t_next, alphas_cumprod[t], alphas_cumprod[t_next]) for t, t_next in pairs]


def _ddim_step(x: Tensor, eps: Tensor, alpha: Tensor, alpha_next: Tensor) -> tuple[Tensor, Tensor]:
    """One deterministic DDIM step; returns the next x and the picture predicted at this one."""
    denoised = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    return alpha_next.sqrt() * denoised + (1 - alpha_next).sqrt() * eps, denoised


@torch.no_grad()
def sample_ddim(
    model, x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, extra_args: dict | None = None, callback=None
) -> Tensor:
    """DDIM with eta 0 (Song et al. 2020). `timesteps` rise: [n], of which n - 1 are evaluated."""
    extra_args, ones = extra_args or {}, x.new_ones(x.shape[0])
    for i, (t, _, alpha, alpha_next) in enumerate(_timestep_steps(timesteps, alphas_cumprod)):
        x, denoised = _ddim_step(x, model(x, t * ones, **extra_args), alpha, alpha_next)
        _report(callback, x, i, 0.0, denoised)
    return x


@torch.no_grad()
def sample_plms(
    model, x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, extra_args: dict | None = None, callback=None
) -> Tensor:
    """PLMS (Liu et al. 2022): Adams-Bashforth over the last four noises; the first step takes two evaluations."""
    weights = {1: (1.5, -0.5), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    extra_args, ones, past = extra_args or {}, x.new_ones(x.shape[0]), []
    for i, (t, t_next, alpha, alpha_next) in enumerate(_timestep_steps(timesteps, alphas_cumprod)):
        eps = model(x, t * ones, **extra_args)
        if not past:
            ahead, _ = _ddim_step(x, eps, alpha, alpha_next)
            mixed = (eps + model(ahead, t_next * ones, **extra_args)) / 2
        else:
            mixed = sum(w * e for w, e in zip(weights[len(past)], [eps, *past], strict=True))
        past = [eps, *past][:3]
        x, denoised = _ddim_step(x, mixed, alpha, alpha_next)
        _report(callback, x, i, 0.0, denoised)
    return x
