"""The samplers on data with a known score: x0 ~ N(0, I), where the exact path is a scaling."""

from __future__ import annotations

import pytest
import torch

from lab.demo import samplers


class GaussianModel:
    """The perfect noise predictor for standard normal data: E[eps | x_t] = sqrt(1 - alpha) x_t."""

    def __init__(self) -> None:
        self.alphas_cumprod = torch.cumprod(
            1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0
        ).float()
        self.calls = 0

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        self.calls += 1
        low, high = self.alphas_cumprod[t.floor().long()], self.alphas_cumprod[t.ceil().long()]
        alpha = torch.lerp(low, high, t - t.floor())
        return (1 - alpha).sqrt()[:, None, None, None] * x


def evaluating(model, indices):
    """The function that samplers evaluate; it notes their steps."""

    def evaluate(x, level, step=None):
        if step is not None:
            indices.append(step)
        return model(x, level * torch.ones(len(x)), None)

    return evaluate


@pytest.mark.parametrize(
    ("sampler", "steps", "calls", "error"),
    [
        (samplers.sample_euler, 200, 200, 0.05),
        (samplers.sample_heun, 50, 99, 0.02),
        (samplers.sample_dpmpp_2m, 50, 50, 0.02),
    ],
)
def test_samplers_end_where_the_exact_path_ends(sampler, steps, calls, error):
    model = GaussianModel()
    denoiser = samplers.EpsDenoiser(model)
    sigmas = denoiser.get_sigmas(steps)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    exact = x / (1 + sigmas[0] ** 2).sqrt()
    indices = []
    end = sampler(evaluating(denoiser, indices), x, sigmas)
    assert (end - exact).abs().max() < error * exact.abs().max()
    assert model.calls == calls
    assert indices == list(range(steps))


def test_ancestral_steps_keep_the_spread_and_draw_noise_in_all_steps_but_the_last():
    denoiser = samplers.EpsDenoiser(GaussianModel())
    sigmas, generator = denoiser.get_sigmas(100), torch.Generator().manual_seed(0)
    draws = []

    def noise():
        draws.append(1)
        return torch.randn(1, 3, 32, 32, generator=generator)

    x = torch.randn(1, 3, 32, 32, generator=generator) * sigmas[0]
    end = samplers.sample_euler_ancestral(evaluating(denoiser, []), x, sigmas, noise)
    assert abs(end.std() - 1) < 0.1
    assert len(draws) == 99


@pytest.mark.parametrize(
    ("sampler", "extra_calls", "error"),
    [(samplers.sample_ddim, 0, 0.05), (samplers.sample_plms, 1, 0.01)],
)
def test_timestep_samplers_keep_standard_normal_data(sampler, extra_calls, error):
    model = GaussianModel()
    timesteps = torch.arange(0, 1000, 20) + 1
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    end = sampler(evaluating(model.apply_model, indices := []), x, timesteps, model.alphas_cumprod)
    assert (end - x).abs().max() < error * x.abs().max()
    assert model.calls == len(timesteps) - 1 + extra_calls
    assert indices == list(range(len(timesteps) - 1))
