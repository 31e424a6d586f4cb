"""Stands in for `modules.sd_samplers_cfg_denoiser`: classifier-free guidance around the model.

InstructPix2Pix, inpainting models and prompts as dicts (SDXL) are left out.
"""

from __future__ import annotations

import torch
from modules import prompt_parser, scripts, sd_samplers_common, shared
from modules.script_callbacks import (
    AfterCFGCallbackParams,
    CFGDenoisedParams,
    CFGDenoiserParams,
    cfg_after_cfg_callback,
    cfg_denoised_callback,
    cfg_denoiser_callback,
)
from modules.shared import opts, state


class CFGDenoiser(torch.nn.Module):
    """What a sampler calls: both halves of guidance, the refiner switch, the mask, and the callbacks."""

    def __init__(self, sampler):
        super().__init__()
        self.sampler = sampler
        self.model_wrap = self.p = self.mask = self.nmask = self.init_latent = None
        self.steps = self.total_steps = self.image_cfg_scale = None
        self.step = 0
        self.padded_cond_uncond = self.mask_before_denoising = False

    @property
    def inner_model(self):
        """The model in the sampler's terms: sigmas or timesteps."""
        raise NotImplementedError

    def combine_denoised(self, x_out, conds_list, uncond, cond_scale):
        """Goes from the unprompted result along the way to the prompted ones."""
        base = x_out[-uncond.shape[0] :]
        pairs = enumerate(conds_list)
        return torch.stack(
            [base[i] + sum(w * cond_scale * (x_out[k] - base[i]) for k, w in conds) for i, conds in pairs]
        )

    def get_pred_x0(self, x_in, x_out, sigma):
        """The picture predicted at this step."""
        return x_out

    def update_inner_model(self):
        """After the model was swapped."""
        self.model_wrap = None
        c, uc = self.p.get_conds()
        self.sampler.sampler_extra_args["cond"], self.sampler.sampler_extra_args["uncond"] = c, uc

    def pad_cond_uncond(self, cond, uncond):
        """Fills the shorter half up with the empty prompt."""
        empty = shared.sd_model.cond_stage_model_empty_prompt
        repeats = (cond.shape[1] - uncond.shape[1]) // empty.shape[1]
        self.padded_cond_uncond = repeats != 0
        padding = empty.repeat(1, abs(repeats), 1)
        if repeats < 0:
            cond = torch.cat([cond, padding.expand(cond.shape[0], -1, -1)], dim=1)
        elif repeats > 0:
            uncond = torch.cat([uncond, padding.expand(uncond.shape[0], -1, -1)], dim=1)
        return cond, uncond

    def _blend(self, latent, sigma):
        """What is not masked stays the original."""
        blended = latent * self.nmask + self.init_latent * self.mask
        if self.p.scripts is None:
            return blended
        args = scripts.MaskBlendArgs(
            latent, self.nmask, self.init_latent, self.mask, blended, denoiser=self, sigma=sigma
        )
        self.p.scripts.on_mask_blend(self.p, args)
        return args.blended_latent

    def _drops_uncond(self, sigma, s_min_uncond) -> bool:
        """Whether this step runs the prompted half alone ("Skip early CFG", NGMS)."""
        if opts.skip_early_cond and self.step / self.total_steps <= opts.skip_early_cond:
            self.p.extra_generation_params["Skip Early CFG"] = opts.skip_early_cond
            return True
        if (self.step % 2 or opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond:
            self.p.extra_generation_params["NGMS"] = s_min_uncond
            return True
        return False

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        """Runs the model once, or as many times as the halves of guidance need."""
        if state.interrupted or state.skipped:
            raise sd_samplers_common.InterruptedException
        if sd_samplers_common.apply_refiner(self, sigma):
            cond, uncond = self.sampler.sampler_extra_args["cond"], self.sampler.sampler_extra_args["uncond"]

        conds_list, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.mask_before_denoising and self.mask is not None:
            x = self._blend(x, sigma)

        repeats = torch.tensor([len(conds) for conds in conds_list], device=x.device)
        x_in, sigma_in, image_cond_in = (
            torch.cat([t.repeat_interleave(repeats, 0), t]) for t in (x, sigma, image_cond)
        )
        params = CFGDenoiserParams(
            x_in, image_cond_in, sigma_in, state.sampling_step, state.sampling_steps, tensor, uncond, self
        )
        cfg_denoiser_callback(params)
        x_in, sigma_in, tensor, uncond = params.x, params.sigma, params.text_cond, params.text_uncond

        n = len(conds_list)
        drop_uncond = self._drops_uncond(sigma, s_min_uncond)
        if drop_uncond:
            x_in, sigma_in = x_in[:-n], sigma_in[:-n]
        self.padded_cond_uncond = False
        if opts.pad_cond_uncond and tensor.shape[1] != uncond.shape[1]:
            tensor, uncond = self.pad_cond_uncond(tensor, uncond)

        parts = [tensor] if drop_uncond else [tensor, uncond]
        if len(parts) == 1 or tensor.shape[1] == uncond.shape[1]:
            prompts = torch.cat(parts)
            size = len(prompts) if opts.batch_cond_uncond else n
            chunks = list(prompts.split(size))
        else:  # prompts of two lengths can't be one batch
            chunks = [*tensor.split(n * 2 if opts.batch_cond_uncond else n), uncond]
        x_out, start = [], 0
        for chunk in chunks:
            end = start + len(chunk)
            x_out.append(self.inner_model(x_in[start:end], sigma_in[start:end], cond=chunk))
            start = end
        x_out = torch.cat(x_out)

        firsts = [conds[0][0] for conds in conds_list]
        if drop_uncond:
            x_out = torch.cat([x_out, x_out[firsts]])
        params = CFGDenoisedParams(x_out, state.sampling_step, state.sampling_steps, self.inner_model)
        cfg_denoised_callback(params)
        denoised = self.combine_denoised(x_out, conds_list, uncond, 1.0 if drop_uncond else cond_scale)
        if not self.mask_before_denoising and self.mask is not None:
            denoised = self._blend(denoised, sigma)
        self.sampler.last_latent = self.get_pred_x0(x_in[firsts], x_out[firsts], sigma)
        sd_samplers_common.store_latent(self.get_pred_x0(x_in[firsts], denoised, sigma))
        after = AfterCFGCallbackParams(denoised, state.sampling_step, state.sampling_steps)
        cfg_after_cfg_callback(after)
        self.step += 1
        return after.x
