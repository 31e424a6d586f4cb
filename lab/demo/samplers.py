"""Samplers as functions, after crowsonkb/k-diffusion; `x` is [B, C, H, W].

Samplers over sigmas take a model that returns the denoised picture, and falling `sigmas` that end
in 0. DDIM and PLMS take one that returns the predicted noise, and rising `timesteps` [n], of which
n - 1 are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


class EpsDenoiser(nn.Module):
    """A sigma-space denoiser of a noise-predicting model (Karras et al., c_skip 1, c_out -sigma).

    `model` has `alphas_cumprod` [T] and `apply_model(x, t, cond)`; call this module as `(x, sigma,
    cond=…)`.
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
        """Sigma of a (fractional) timestep, log-interpolated."""
        low = t.floor().long()
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[t.ceil().long()], t - low).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """(Fractional) timestep of a sigma, the inverse of `t_to_sigma`."""
        log_sigma = sigma.log()
        low = torch.searchsorted(self.log_sigmas, log_sigma, right=True) - 1
        low = low.clamp(0, len(self.sigmas) - 2)
        start, end = self.log_sigmas[low], self.log_sigmas[low + 1]
        return low + ((log_sigma - start) / (end - start)).clamp(0, 1)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """Denoise `x`."""
        wide = sigma[:, None, None, None]
        eps = self.inner_model.apply_model(x / (wide**2 + 1).sqrt(), self.sigma_to_t(sigma), cond)
        return x - eps * wide


Evaluate = Callable[..., Tensor]
"""Evaluates the model at (x, sigma or timestep), and the step's number at its first evaluation."""


def sample_euler(model: Evaluate, x: Tensor, sigmas: Tensor) -> Tensor:
    """Euler steps (Karras et al. 2022, algorithm 1 without its correction)."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x = x + (x - model(x, sigma, i)) / sigma * (target - sigma)
    return x


def sample_euler_ancestral(
    model: Evaluate, x: Tensor, sigmas: Tensor, noise_sampler: Callable[[], Tensor]
) -> Tensor:
    """Euler steps below the next sigma, with fresh noise added back up to it."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma, i)
        sigma_up = torch.minimum(target, (target**2 * (sigma**2 - target**2) / sigma**2).sqrt())
        sigma_down = (target**2 - sigma_up**2).sqrt()
        x = x + (x - denoised) / sigma * (sigma_down - sigma)
        if target > 0:
            x = x + noise_sampler() * sigma_up
    return x


def sample_heun(model: Evaluate, x: Tensor, sigmas: Tensor) -> Tensor:
    """Heun's method: two evaluations per step, one in the last (Karras et al., algorithm 1)."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        slope, dt = (x - model(x, sigma, i)) / sigma, target - sigma
        if target == 0:
            return x + slope * dt
        ahead = x + slope * dt
        x = x + (slope + (ahead - model(ahead, target)) / target) / 2 * dt
    return x


def sample_dpmpp_2m(model: Evaluate, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M), a second-order multistep method (Lu et al. 2022)."""
    previous = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma, i)
        if following == 0:
            return denoised
        h, target = sigma.log() - following.log(), denoised
        if previous is not None:
            r = (sigmas[i - 1].log() - sigma.log()) / h
            target = denoised + (denoised - previous) / (2 * r)
        x = following / sigma * x - torch.expm1(-h) * target
        previous = denoised
    return x


def _ddim_step(x: Tensor, eps: Tensor, alpha: Tensor, alpha_next: Tensor) -> Tensor:
    """One deterministic DDIM step with the predicted noise."""
    denoised = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    return alpha_next.sqrt() * denoised + (1 - alpha_next).sqrt() * eps


def sample_ddim(model: Evaluate, x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """DDIM with eta 0 (Song et al. 2020)."""
    for i, (t, following) in enumerate(pairwise(timesteps.flip(0))):
        x = _ddim_step(x, model(x, t, i), alphas_cumprod[t], alphas_cumprod[following])
    return x


def sample_plms(model: Evaluate, x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """PLMS (Liu et al. 2022): Adams-Bashforth over four noises; two evaluations at first."""
    weights = {
        1: (1.5, -0.5),
        2: (23 / 12, -16 / 12, 5 / 12),
        3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    }
    past: list[Tensor] = []
    for i, (t, following) in enumerate(pairwise(timesteps.flip(0))):
        eps, ends = model(x, t, i), (alphas_cumprod[t], alphas_cumprod[following])
        if past:
            mixed = sum(w * e for w, e in zip(weights[len(past)], [eps, *past], strict=True))
        else:
            mixed = (eps + model(_ddim_step(x, eps, *ends), following)) / 2
        past = [eps, *past][:3]
        x = _ddim_step(x, mixed, *ends)
    return x
