"""Stands in for `modules.processing`: one generation, with the scripts called in the order of WebUI 1.10.1.

Left out: saving to disk, styles, variation seeds, extra networks, face restoration, inpainting "only masked", and
upscalers other than the latent ones. `opt_f` and `opt_C` (a latent's side in pixels, latent channels) are the model's;
WebUI's are 8 and 4.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from typing import Any

import modules.shared as shared
import numpy as np
import torch
from modules import (
    devices,
    errors,
    images,
    infotext_utils,
    paths,
    prompt_parser,
    rng,
    scripts,
    sd_models,
    sd_samplers,
    sd_samplers_common,
    sd_unet,
)
from modules.sd_samplers_common import decode_first_stage, images_tensor_to_samples
from modules.shared import opts, state
from PIL import Image, ImageFilter, ImageOps

opt_C = 4
opt_f = 8
default_side = 512  # the host's own: what the page's size sliders start with


@dataclass(repr=False)
class StableDiffusionProcessing:
    """What is to be generated, and how far that is."""

    sd_model: object = None
    outpath_samples: str = None
    outpath_grids: str = None
    prompt: str = ""
    negative_prompt: str = ""
    styles: list[str] = None
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0
    sampler_name: str = None
    scheduler: str = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    extra_generation_params: dict[str, Any] = None
    eta: float = None
    denoising_strength: float = None
    s_min_uncond: float = None
    override_settings: dict[str, Any] = None
    override_settings_restore_afterwards: bool = True
    refiner_checkpoint: str = None
    refiner_switch_at: float = None
    token_merging_ratio = 0
    token_merging_ratio_hr = 0
    disable_extra_networks: bool = False
    firstpass_image: Image.Image = None

    scripts_value: scripts.ScriptRunner = field(default=None, init=False)
    script_args_value: list = field(default=None, init=False)
    scripts_setup_complete: bool = field(default=False, init=False)
    sampler: sd_samplers_common.Sampler = field(default=None, init=False)
    is_hr_pass: bool = field(default=False, init=False)
    is_api: bool = field(default=False, init=False)
    iteration: int = field(default=0, init=False)
    user: str = field(default=None, init=False)

    def __post_init__(self):
        self.comments = {}
        self.styles = self.styles or []
        self.extra_generation_params = self.extra_generation_params or {}
        self.override_settings = self.override_settings or {}
        self.script_args = self.script_args or {}
        self.sampler_noise_scheduler_override = self.refiner_checkpoint_info = None
        self.c = self.uc = self.rng = self.mask = self.nmask = None
        self.sd_model_name = self.sd_model_hash = None

    @property
    def sd_model(self):  # noqa: F811  (a field for `__init__`, a property ever after, as in WebUI)
        """The loaded model, whatever was passed in."""
        return shared.sd_model

    @sd_model.setter
    def sd_model(self, value):
        pass

    @property
    def scripts(self):
        """The tab's scripts. Once both these and their arguments are set, `setup` is called, once."""
        return self.scripts_value

    @scripts.setter
    def scripts(self, value):
        self.scripts_value = value
        self._setup_scripts_if_complete()

    @property
    def script_args(self):
        """All scripts' arguments."""
        return self.script_args_value

    @script_args.setter
    def script_args(self, value):
        self.script_args_value = value
        self._setup_scripts_if_complete()

    def _setup_scripts_if_complete(self):
        if self.scripts_value and self.script_args_value and not self.scripts_setup_complete:
            self.setup_scripts()

    def setup_scripts(self):
        """Calls the scripts' `setup`."""
        self.scripts_setup_complete = True
        self.scripts.setup_scrips(self, is_ui=not self.is_api)

    def comment(self, text):
        """Shows a line under the picture."""
        self.comments[text] = 1

    def init(self, all_prompts, all_seeds, all_subseeds):
        """Once, before the first batch."""

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        """All passes of one batch."""
        raise NotImplementedError

    def close(self):
        """After the generation, also a failed one."""
        self.sampler = self.c = self.uc = None

    def get_token_merging_ratio(self, for_hr=False):
        """WebUI's own token merging."""
        first = self.token_merging_ratio or opts.token_merging_ratio
        return self.token_merging_ratio_hr or opts.token_merging_ratio_hr or first if for_hr else first

    def _for_all(self, prompt, count=None):
        return prompt if isinstance(prompt, list) else (count or self.batch_size * self.n_iter) * [prompt]

    def setup_prompts(self):
        """One prompt and one negative prompt for each picture."""
        count = len(self.negative_prompt) if isinstance(self.negative_prompt, list) else None
        self.all_prompts = self._for_all(self.prompt, count)
        self.all_negative_prompts = self._for_all(self.negative_prompt, len(self.all_prompts))
        self.main_prompt, self.main_negative_prompt = self.all_prompts[0], self.all_negative_prompts[0]

    def setup_conds(self):
        """Encodes the batch's prompts."""
        unknown = getattr(self.sd_model, "unknown_words", None)
        for prompt in dict.fromkeys([*self.prompts, *self.negative_prompts] if unknown else []):
            for word in unknown(prompt):
                self.comment(f"The model does not know the word {word!r}.")
        self.uc = prompt_parser.get_learned_conditioning(self.sd_model, self.negative_prompts, self.steps)
        self.c = prompt_parser.get_multicond_learned_conditioning(self.sd_model, self.prompts, self.steps)

    def get_conds(self):
        """The current pass's encoded prompts."""
        return self.c, self.uc

    def parse_extra_network_prompts(self):
        """Takes extra networks out of the prompts; there are none here."""


class Processed:
    """What was generated."""

    def __init__(self, p, images_list, seed=-1, info="", subseed=None, all_prompts=None, all_negative_prompts=None,
                 all_seeds=None, all_subseeds=None, index_of_first_image=0, infotexts=None, comments=""):  # fmt: skip
        self.images, self.info, self.index_of_first_image = images_list, info, index_of_first_image
        self.comments = "".join(f"{comment}\n" for comment in p.comments)
        self.extra_generation_params, self.styles = p.extra_generation_params, p.styles
        self.job_timestamp = state.job_timestamp
        for name in [
            "width",
            "height",
            "sampler_name",
            "cfg_scale",
            "steps",
            "batch_size",
            "sd_model_name",
            "sd_model_hash",
        ]:
            setattr(self, name, getattr(p, name))
        self.denoising_strength = p.denoising_strength
        self.prompt = p.prompt[0] if isinstance(p.prompt, list) else p.prompt
        self.negative_prompt = p.negative_prompt[0] if isinstance(p.negative_prompt, list) else p.negative_prompt
        self.seed = int(seed[0] if isinstance(seed, list) else seed) if seed is not None else -1
        self.subseed = subseed if subseed is not None else -1
        self.all_prompts = all_prompts or getattr(p, "all_prompts", None) or [self.prompt]
        self.all_negative_prompts = all_negative_prompts or getattr(p, "all_negative_prompts", None) or [""]
        self.all_seeds = all_seeds or getattr(p, "all_seeds", None) or [self.seed]
        self.all_subseeds = all_subseeds or getattr(p, "all_subseeds", None) or [self.subseed]
        self.infotexts = infotexts or [info] * len(images_list)

    def js(self):
        """As JSON, for the page and the API."""
        shown = {name: value for name, value in vars(self).items() if name not in ("images", "info", "comments")}
        return json.dumps(shown, default=lambda o: None)

    def infotext(self, p, index):
        """The infotext of one picture."""
        iteration, position = divmod(index, self.batch_size)
        return create_infotext(p, self.all_prompts, self.all_seeds, self.all_subseeds, [], iteration, position)


def get_fixed_seed(seed):
    """A seed; a random one for -1, None or what is no number."""
    try:
        seed = -1 if seed in ("", None) else seed if isinstance(seed, list) else int(seed)
    except ValueError:
        seed = -1
    return random.randrange(4294967294) if seed == -1 else seed


def fix_seed(p):
    """Replaces -1 by a random seed."""
    p.seed, p.subseed = get_fixed_seed(p.seed), get_fixed_seed(p.subseed)


def create_infotext(p, all_prompts, all_seeds, all_subseeds, comments=None, iteration=0, position_in_batch=0,
                    use_main_prompt=False, index=None, all_negative_prompts=None):  # fmt: skip
    """A picture's parameters as text. A value in `p.extra_generation_params` may be a list (one value a picture) or a
    function of this function's variables; None leaves the key out."""
    index = 0 if use_main_prompt else position_in_batch + iteration * p.batch_size if index is None else index
    if all_negative_prompts is None:
        all_negative_prompts = p.all_negative_prompts
    prompt_text = p.main_prompt if use_main_prompt else all_prompts[index]
    negative_prompt = p.main_negative_prompt if use_main_prompt else all_negative_prompts[index]
    enable_hr = getattr(p, "enable_hr", False)
    generation_params = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "CFG scale": p.cfg_scale,
        "Seed": p.all_seeds[0] if use_main_prompt else all_seeds[index],
        "Size": f"{p.width}x{p.height}",
        "Model hash": p.sd_model_hash,
        "Model": p.sd_model_name,
        "Denoising strength": p.extra_generation_params.get("Denoising strength"),
        "Token merging ratio": p.get_token_merging_ratio() or None,
        "Token merging ratio hr": (p.get_token_merging_ratio(for_hr=True) or None) if enable_hr else None,
        **p.extra_generation_params,
    }
    for key, value in generation_params.items():
        try:
            if isinstance(value, list):
                generation_params[key] = value[index]
            elif callable(value):
                generation_params[key] = value(**locals())
        except Exception:
            errors.report(f'Error creating infotext for key "{key}"', exc_info=True)
            generation_params[key] = None
    written = {key: value for key, value in generation_params.items() if value is not None}
    text = ", ".join(key if key == value else f"{key}: {infotext_utils.quote(value)}" for key, value in written.items())
    return "\n".join([prompt_text, *([f"Negative prompt: {negative_prompt}"] if negative_prompt else []), text]).strip()


def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    """Decodes one latent after the other."""
    if check_for_nans:
        devices.test_for_nans(batch, "unet")
    return [decode_first_stage(model, latent[None])[0].to(target_device or latent.device) for latent in batch]


def process_images(p: StableDiffusionProcessing) -> Processed:
    """Generates; settings that `p` overrides are put back afterwards, also after a failure."""
    if p.scripts is not None:
        p.scripts.before_process(p)
    stored = {key: opts.data[key] for key in p.override_settings if key in opts.data}
    try:
        if sd_models.checkpoint_aliases.get(p.override_settings.get("sd_model_checkpoint")) is None:
            p.override_settings.pop("sd_model_checkpoint", None)
            sd_models.reload_model_weights()
        for key, value in p.override_settings.items():
            opts.set(key, value, is_api=True, run_callbacks=False)
            if key == "sd_model_checkpoint":
                sd_models.reload_model_weights()
        sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio())
        sd_samplers.fix_p_invalid_sampler_and_scheduler(p)
        result = process_images_inner(p)
    finally:
        sd_models.apply_token_merging(p.sd_model, 0)
        if p.override_settings_restore_afterwards:
            for key, value in stored.items():
                setattr(opts, key, value)
    return result


def process_images_inner(p: StableDiffusionProcessing) -> Processed:
    """Generates batch after batch. An exception in a script is reported; one in sampling ends it all, with no
    `postprocess`."""
    seed, subseed = get_fixed_seed(p.seed), get_fixed_seed(p.subseed)
    if p.refiner_checkpoint not in (None, "", "None", "none"):
        p.refiner_checkpoint_info = sd_models.get_closet_checkpoint_match(p.refiner_checkpoint)
        if p.refiner_checkpoint_info is None:
            raise Exception(f"Could not find checkpoint with name {p.refiner_checkpoint}")
    p.sd_model_name = p.sd_model.sd_checkpoint_info.name_for_extra
    p.sd_model_hash = p.sd_model.sd_model_hash
    p.s_min_uncond = opts.s_min_uncond if p.s_min_uncond is None else p.s_min_uncond
    p.setup_prompts()
    p.all_seeds = seed if isinstance(seed, list) else [seed + i for i in range(len(p.all_prompts))]
    p.all_subseeds = subseed if isinstance(subseed, list) else [subseed + i for i in range(len(p.all_prompts))]
    if p.scripts is not None:
        p.scripts.process(p)

    infotexts, output_images = [], []
    with torch.no_grad():
        p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
        sd_unet.apply_unet()
        if state.job_count == -1:
            state.job_count = p.n_iter
        for n in range(p.n_iter):
            p.iteration = n
            state.skipped = False
            if state.interrupted or state.stopping_generation:
                break
            sd_models.reload_model_weights()  # the last batch may have ended with the refiner
            now = slice(n * p.batch_size, (n + 1) * p.batch_size)
            p.prompts, p.negative_prompts = p.all_prompts[now], p.all_negative_prompts[now]
            p.seeds, p.subseeds = p.all_seeds[now], p.all_subseeds[now]
            p.rng = rng.ImageRNG((opt_C, p.height // opt_f, p.width // opt_f), p.seeds)
            batch = {"batch_number": n, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.subseeds}
            if p.scripts is not None:
                p.scripts.before_process_batch(p, **batch)
            if len(p.prompts) == 0:
                break
            p.parse_extra_network_prompts()
            if p.scripts is not None:
                p.scripts.process_batch(p, **batch)
            p.setup_conds()
            if n == 0:
                with open(os.path.join(paths.data_path, "params.txt"), "w", encoding="utf8") as file:
                    file.write(Processed(p, []).infotext(p, 0))
            if p.n_iter > 1:
                state.job = f"Batch {n + 1} out of {p.n_iter}"
            samples = p.sample(
                conditioning=p.c,
                unconditional_conditioning=p.uc,
                seeds=p.seeds,
                subseeds=p.subseeds,
                subseed_strength=p.subseed_strength,
                prompts=p.prompts,
            )
            if p.scripts is not None:
                ps = scripts.PostSampleArgs(samples)
                p.scripts.post_sample(p, ps)
                samples = ps.samples
            if isinstance(samples, list):  # the second pass of hires fix has decoded them
                decoded = samples
            else:
                decoded = decode_latent_batch(p.sd_model, samples, devices.cpu, check_for_nans=True)
            pictures = ((torch.stack(decoded).float() + 1) / 2).clamp(0, 1)
            del samples, decoded
            state.nextjob()
            if p.scripts is not None:
                p.scripts.postprocess_batch(p, pictures, batch_number=n)
                p.prompts, p.negative_prompts = p.all_prompts[now], p.all_negative_prompts[now]
                batch_list = scripts.PostprocessBatchListArgs(list(pictures))
                p.scripts.postprocess_batch_list(p, batch_list, batch_number=n)
                pictures = batch_list.images

            for i, picture in enumerate(pictures):
                p.batch_index = i
                image = images.to_image(picture)
                if p.scripts is not None:
                    for method in (p.scripts.postprocess_image, p.scripts.postprocess_image_after_composite):
                        pp = scripts.PostprocessImageArgs(image)
                        method(p, pp)
                        image = pp.image
                negative = p.negative_prompts
                text = create_infotext(p, p.prompts, p.seeds, p.subseeds, index=i, all_negative_prompts=negative)
                infotexts.append(text)
                image.info["parameters"] = text
                output_images.append(image)

        if not infotexts:
            infotexts.append(Processed(p, []).infotext(p, 0))
        has_grid = len(output_images) > 1 and opts.return_grid and not p.do_not_save_grid
        if has_grid:
            text = create_infotext(p, p.prompts, p.seeds, p.subseeds, use_main_prompt=True)
            output_images.insert(0, images.image_grid(output_images, p.batch_size))
            output_images[0].info["parameters"] = text
            infotexts.insert(0, text)

    seeds = {"seed": p.all_seeds[0], "subseed": p.all_subseeds[0]}
    result = Processed(
        p, output_images, **seeds, info=infotexts[0], index_of_first_image=int(has_grid), infotexts=infotexts
    )
    if p.scripts is not None:
        p.scripts.postprocess(p, result)
    return result


@dataclass(repr=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """From a prompt alone, in one pass or, with hires fix, in two."""

    enable_hr: bool = False
    denoising_strength: float = 0.75
    hr_scale: float = 2.0
    hr_upscaler: str = None
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str = None
    hr_sampler_name: str = None
    hr_scheduler: str = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    force_task_id: str = None

    def __post_init__(self):
        super().__post_init__()
        self.hr_checkpoint_info = self.hr_c = self.hr_uc = self.latent_scale_mode = None
        self.hr_upscale_to_x = self.hr_upscale_to_y = 0

    def calculate_target_resolution(self):
        """The second pass's size. A given size is reached by stretching; WebUI would crop."""
        if self.hr_resize_x == 0 and self.hr_resize_y == 0:
            self.extra_generation_params["Hires upscale"] = self.hr_scale
            self.hr_upscale_to_x = int(self.width * self.hr_scale)
            self.hr_upscale_to_y = int(self.height * self.hr_scale)
        else:
            self.extra_generation_params["Hires resize"] = f"{self.hr_resize_x}x{self.hr_resize_y}"
            self.hr_upscale_to_x = self.hr_resize_x or self.hr_resize_y * self.width // self.height
            self.hr_upscale_to_y = self.hr_resize_y or self.hr_resize_x * self.height // self.width

    def init(self, all_prompts, all_seeds, all_subseeds):
        """Prepares the second pass."""
        if not self.enable_hr:
            return
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        if self.hr_checkpoint_name and self.hr_checkpoint_name != "Use same checkpoint":
            self.hr_checkpoint_info = sd_models.get_closet_checkpoint_match(self.hr_checkpoint_name)
            if self.hr_checkpoint_info is None:
                raise Exception(f"Could not find checkpoint with name {self.hr_checkpoint_name}")
            self.extra_generation_params["Hires checkpoint"] = self.hr_checkpoint_info.short_title
        if self.hr_sampler_name is not None and self.hr_sampler_name != self.sampler_name:
            self.extra_generation_params["Hires sampler"] = self.hr_sampler_name

        def get_hr_prompt(p, index, prompt_text, **kwargs):
            return None if p.all_hr_prompts[index] == prompt_text else p.all_hr_prompts[index]

        def get_hr_negative_prompt(p, index, negative_prompt, **kwargs):
            return None if p.all_hr_negative_prompts[index] == negative_prompt else p.all_hr_negative_prompts[index]

        self.extra_generation_params["Hires prompt"] = get_hr_prompt
        self.extra_generation_params["Hires negative prompt"] = get_hr_negative_prompt
        self.latent_scale_mode = shared.latent_upscale_modes.get(self.hr_upscaler or shared.latent_upscale_default_mode)
        if self.latent_scale_mode is None:
            raise Exception(f"could not find upscaler named {self.hr_upscaler}")
        self.calculate_target_resolution()
        if not state.processing_has_refined_job_count:
            state.job_count = (self.n_iter if state.job_count == -1 else state.job_count) * 2
            state.processing_has_refined_job_count = True
        if self.hr_second_pass_steps:
            self.extra_generation_params["Hires steps"] = self.hr_second_pass_steps
        if self.hr_upscaler is not None:
            self.extra_generation_params["Hires upscaler"] = self.hr_upscaler

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        """The first pass (left out for a given `firstpass_image`), and the second."""
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        if self.firstpass_image is not None and self.enable_hr:
            samples = images_tensor_to_samples(images.to_tensor(self.firstpass_image)[None].to(devices.device))
        else:
            x = self.rng.next()
            if self.scripts is not None:
                self.scripts.process_before_every_sampling(
                    p=self, x=x, noise=x, c=conditioning, uc=unconditional_conditioning
                )
            samples = self.sampler.sample(
                self, x, conditioning, unconditional_conditioning, image_conditioning=x.new_zeros(len(x), 5, 1, 1)
            )
            if not self.enable_hr:
                return samples
        with sd_models.SkipWritingToConfig():
            sd_models.reload_model_weights(info=self.hr_checkpoint_info)
        return self.sample_hr_pass(samples, None, seeds, subseeds, subseed_strength, prompts)

    def sample_hr_pass(self, samples, decoded_samples, seeds, subseeds, subseed_strength, prompts):
        """The second pass: enlarge, add noise, denoise."""
        if state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = sd_samplers.create_sampler(self.hr_sampler_name or self.sampler_name, self.sd_model)
        size = self.hr_upscale_to_y // opt_f, self.hr_upscale_to_x // opt_f
        samples = torch.nn.functional.interpolate(
            samples, size=size, mode=self.latent_scale_mode["mode"], antialias=self.latent_scale_mode["antialias"]
        )
        state.nextjob()
        self.rng = rng.ImageRNG(samples.shape[1:], self.seeds)
        noise = self.rng.next()
        self.calculate_hr_conds()
        sd_models.apply_token_merging(self.sd_model, self.get_token_merging_ratio(for_hr=True))
        if self.scripts is not None:
            self.scripts.before_hr(self)
            self.scripts.process_before_every_sampling(p=self, x=samples, noise=noise, c=self.hr_c, uc=self.hr_uc)
        steps = self.hr_second_pass_steps or self.steps
        samples = self.sampler.sample_img2img(
            self,
            samples,
            noise,
            self.hr_c,
            self.hr_uc,
            steps=steps,
            image_conditioning=samples.new_zeros(len(samples), 5, 1, 1),
        )
        sd_models.apply_token_merging(self.sd_model, self.get_token_merging_ratio())
        self.sampler = None
        decoded = decode_latent_batch(self.sd_model, samples, devices.cpu, check_for_nans=True)
        self.is_hr_pass = False
        return decoded

    def close(self):
        """After the generation, also a failed one."""
        super().close()
        self.hr_c = self.hr_uc = None

    def setup_prompts(self):
        """The second pass's prompts too; left empty, they are the first pass's."""
        super().setup_prompts()
        if self.enable_hr:
            self.hr_prompt = self.hr_prompt or self.prompt
            self.hr_negative_prompt = self.hr_negative_prompt or self.negative_prompt
            self.all_hr_prompts = self._for_all(self.hr_prompt)
            self.all_hr_negative_prompts = self._for_all(self.hr_negative_prompt)

    def calculate_hr_conds(self):
        """Encodes the second pass's prompts."""
        if self.hr_c is None:
            self.hr_uc = prompt_parser.get_learned_conditioning(self.sd_model, self.hr_negative_prompts, self.steps)
            self.hr_c = prompt_parser.get_multicond_learned_conditioning(self.sd_model, self.hr_prompts, self.steps)

    def setup_conds(self):
        """Encodes the current pass's prompts: the refiner calls this in the middle of either."""
        if self.is_hr_pass:
            self.hr_c = None
            self.calculate_hr_conds()
            return
        super().setup_conds()
        self.hr_c = self.hr_uc = None

    def get_conds(self):
        """The current pass's encoded prompts."""
        return (self.hr_c, self.hr_uc) if self.is_hr_pass else super().get_conds()

    def parse_extra_network_prompts(self):
        """Picks the batch's part of the second pass's prompts."""
        super().parse_extra_network_prompts()
        if self.enable_hr:
            now = slice(self.iteration * self.batch_size, (self.iteration + 1) * self.batch_size)
            self.hr_prompts, self.hr_negative_prompts = self.all_hr_prompts[now], self.all_hr_negative_prompts[now]


@dataclass(repr=False)
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """From a picture; with a mask, only a part of it."""

    init_images: list = None
    resize_mode: int = 0
    denoising_strength: float = 0.75
    image_cfg_scale: float = None
    mask: Any = None
    mask_blur: int = 4
    inpainting_mask_invert: int = 0
    initial_noise_multiplier: float = None
    force_task_id: str = None

    def __post_init__(self):
        image_mask = self.mask
        super().__post_init__()
        self.image_mask, self.init_latent = image_mask, None

    def init(self, all_prompts, all_seeds, all_subseeds):
        """Encodes the picture and the mask, stretched to the wanted size."""
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        pictures = [images.to_tensor(image.resize((self.width, self.height))) for image in self.init_images]
        if len(pictures) == 1:
            pictures = pictures * self.batch_size
        elif len(pictures) <= self.batch_size:
            self.batch_size = len(pictures)
        else:
            raise RuntimeError(f"bad number of images passed: {len(pictures)}; expecting {self.batch_size} or less")
        self.init_latent = images_tensor_to_samples(torch.stack(pictures).to(devices.device))
        if self.image_mask is not None:
            mask = self.image_mask.convert("L")
            mask = ImageOps.invert(mask) if self.inpainting_mask_invert else mask
            mask = mask.filter(ImageFilter.GaussianBlur(self.mask_blur)).resize(self.init_latent.shape[:1:-1])
            self.nmask = torch.from_numpy(np.array(mask, dtype=np.float32) / 255).round().to(devices.device)
            self.mask = 1 - self.nmask

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        """The one pass."""
        x = self.rng.next()
        if self.scripts is not None:
            self.scripts.process_before_every_sampling(
                p=self, x=self.init_latent, noise=x, c=conditioning, uc=unconditional_conditioning
            )
        samples = self.sampler.sample_img2img(
            self,
            self.init_latent,
            x,
            conditioning,
            unconditional_conditioning,
            image_conditioning=x.new_zeros(len(x), 5, 1, 1),
        )
        if self.mask is not None:
            blended = samples * self.nmask + self.init_latent * self.mask
            if self.scripts is not None:
                mba = scripts.MaskBlendArgs(samples, self.nmask, self.init_latent, self.mask, blended)
                self.scripts.on_mask_blend(self, mba)
                blended = mba.blended_latent
            samples = blended
        return samples

    def get_token_merging_ratio(self, for_hr=False):
        """WebUI's own token merging."""
        overridden = "token_merging_ratio" in self.override_settings and opts.token_merging_ratio
        return self.token_merging_ratio or overridden or opts.token_merging_ratio_img2img or opts.token_merging_ratio
