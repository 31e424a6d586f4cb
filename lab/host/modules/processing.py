"""Stands in for `modules.processing`: one generation, with the scripts called in the order of WebUI
1.10.1.

Left out: what is of no concern to merging, as files, styles, variation seeds, extra networks and
upscalers. `opt_f` and `opt_C` (a latent's side in pixels, latent channels) are the model's; WebUI's
are 8 and 4.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from modules import devices, infotext_utils, scripts, sd_models, sd_samplers, shared
from modules.shared import opts, state
from PIL import Image
from torch import Tensor

opt_C = 4
opt_f = 8


class ImageRNG:
    """One generator a picture, so that a picture does not depend on the batch that it is made in."""

    def __init__(self, shape: Any, seeds: list[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def next(self) -> Tensor:
        """The next noise for the whole batch: [B, *shape]."""
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(shared.device)


@dataclass(repr=False)
class StableDiffusionProcessing:
    """What is to be generated, and how far that is."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    sampler_name: str = "Euler"
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    override_settings: dict[str, Any] = field(default_factory=dict)
    refiner_checkpoint: str | None = None
    refiner_switch_at: float = 1.0

    scripts = sampler = mask = nmask = None
    script_args = ()
    is_hr_pass = is_api = False
    iteration = batch_index = 0

    def __post_init__(self) -> None:
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}

    def set_up(self, runner: scripts.ScriptRunner, script_args: Any) -> StableDiffusionProcessing:
        """Gives it a tab's scripts, and calls their `setup`; WebUI does so once both are set."""
        self.scripts, self.script_args = runner, script_args
        self.call("setup")
        return self

    def call(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Calls the scripts, if there are any."""
        if self.scripts is not None:
            getattr(self.scripts, name)(self, *args, **kwargs)

    def comment(self, text: str) -> None:
        """Shows a line under the picture."""
        self.comments[text] = 1

    def init(self) -> None:
        """Once, before the first batch."""

    def sample(self, conditioning: Any, unconditional_conditioning: Tensor) -> Any:
        """All passes of one batch."""
        raise NotImplementedError

    def close(self) -> None:
        """After the generation, also a failed one."""
        self.sampler = self.c = self.uc = None

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        """WebUI's own token merging."""
        return (opts.token_merging_ratio_hr if for_hr else 0) or opts.token_merging_ratio

    def setup_conds(self) -> None:
        """Encodes the batch's prompts: the parts of each, which `AND` joins, and their weights
        (`cat AND dog :0.5`)."""
        model, batch = sd_models.model_data.sd_model, []
        for prompt in [self.prompt] * self.batch_size:
            parts = [
                re.fullmatch(r"(.*?)(?:\s*:\s*([-+]?\d*\.?\d+))?\s*", part, re.S)
                for part in re.split(r"\bAND\b", prompt)
            ]
            encoded = model.encode_prompts([part[1] for part in parts])
            batch.append(
                [(tokens, float(part[2] or 1)) for tokens, part in zip(encoded, parts, strict=True)]
            )
        self.c = SimpleNamespace(batch=batch)
        self.uc = model.encode_prompts([self.negative_prompt] * self.batch_size)


class Processed:
    """What was generated."""

    def __init__(
        self,
        p: StableDiffusionProcessing,
        images_list: list,
        index_of_first_image: int = 0,
        infotexts: Any = (),
    ) -> None:
        self.images, self.index_of_first_image, self.infotexts = (
            images_list,
            index_of_first_image,
            list(infotexts),
        )
        self.comments = "".join(f"{comment}\n" for comment in p.comments)
        self.extra_generation_params = p.extra_generation_params

    def infotext(self, p: StableDiffusionProcessing, index: int) -> str:
        """The infotext of one picture."""
        return create_infotext(p, index)


def fix_seed(p: StableDiffusionProcessing) -> None:
    """Replaces -1 and None by a random seed."""
    p.seed = random.randrange(4294967294) if p.seed in (None, -1) else int(p.seed)


def create_infotext(p: StableDiffusionProcessing, index: int) -> str:
    """A picture's parameters as text. None leaves a key out."""
    own = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "CFG scale": p.cfg_scale,
        "Seed": p.seed + index,
        "Size": f"{p.width}x{p.height}",
        "Model": sd_models.model_data.sd_model.sd_checkpoint_info.model_name,
        "Token merging ratio": p.get_token_merging_ratio() or None,
        **p.extra_generation_params,
    }
    pairs = [
        f"{key}: {infotext_utils.quote(value)}" for key, value in own.items() if value is not None
    ]
    return "\n".join([p.prompt, ", ".join(pairs)])


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as [3, H, W] in [0, 1]."""
    return torch.from_numpy(
        np.array(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
    )


def to_latent(images: list[Image.Image]) -> Tensor:
    """Pictures as the model sees them."""
    return sd_models.model_data.sd_model.from_images(images)


def decode_latent_batch(batch: Tensor) -> Tensor:
    """Latents as pictures in [-1, 1], one after the other."""
    devices.test_for_nans(batch, "unet")
    return (
        torch.cat([sd_models.model_data.sd_model.to_rgb(latent[None]) for latent in batch]).cpu()
        * 2
        - 1
    )


def image_grid(images: list[Image.Image]) -> Image.Image:
    """All pictures side by side; WebUI's has rows."""
    grid = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        grid.paste(image, (i * image.width, 0))
    return grid


def process_images(p: StableDiffusionProcessing) -> Processed:
    """Generates; settings that `p` overrides are put back afterwards, also after a failure."""
    p.call("before_process")
    stored = {key: opts.data[key] for key in p.override_settings}
    try:
        opts.data.update(p.override_settings)
        model = sd_models.reload_model_weights()
        sd_models.apply_token_merging(model, p.get_token_merging_ratio())
        return process_images_inner(p)
    finally:
        sd_models.apply_token_merging(sd_models.model_data.sd_model, 0)
        opts.data.update(stored)


def process_images_inner(p: StableDiffusionProcessing) -> Processed:
    """Generates batch after batch. An exception in a script is reported; one in sampling ends it
    all, with no `postprocess`."""
    fix_seed(p)
    p.sd_model_name = sd_models.model_data.sd_model.sd_checkpoint_info.model_name
    p.call("process")
    infotexts, output_images = [], []
    with torch.no_grad():
        p.init()
        for n in range(p.n_iter):
            p.iteration = n
            state.skipped = False
            if state.interrupted or state.stopping_generation:
                break
            sd_models.reload_model_weights()  # the last batch may have ended with the refiner
            seeds = [p.seed + n * p.batch_size + i for i in range(p.batch_size)]
            p.rng, p.seeds = ImageRNG((opt_C, p.height // opt_f, p.width // opt_f), seeds), seeds
            batch = {
                "batch_number": n,
                "prompts": [p.prompt] * p.batch_size,
                "seeds": seeds,
                "subseeds": seeds,
            }
            p.call("before_process_batch", **batch)
            p.call("process_batch", **batch)
            p.setup_conds()
            if n == 0 and shared.data_path:
                Path(shared.data_path, "params.txt").write_text(
                    create_infotext(p, 0), encoding="utf-8"
                )
            # Whatever other extensions have put in its place.
            samples = p.sample(conditioning=p.c, unconditional_conditioning=p.uc)
            p.call("post_sample", SimpleNamespace(samples=samples))
            # The second pass of hires fix has decoded them.
            decoded = (
                torch.stack(samples) if isinstance(samples, list) else decode_latent_batch(samples)
            )
            pictures = ((decoded.float() + 1) / 2).clamp(0, 1)
            state.nextjob()
            p.call("postprocess_batch", images=pictures, batch_number=n)
            p.call("postprocess_batch_list", SimpleNamespace(images=list(pictures)), batch_number=n)
            for i, picture in enumerate(pictures):
                p.batch_index = i
                image = Image.fromarray(
                    (255.0 * np.moveaxis(picture.numpy(), 0, 2)).astype(np.uint8)
                )
                pp = SimpleNamespace(image=image)
                p.call("postprocess_image", pp)
                infotexts.append(create_infotext(p, n * p.batch_size + i))
                pp.image.info["parameters"] = infotexts[-1]
                output_images.append(pp.image)
    has_grid = len(output_images) > 1 and opts.return_grid
    if has_grid:
        output_images.insert(0, image_grid(output_images))
        infotexts.insert(0, create_infotext(p, 0))
    result = Processed(p, output_images, int(has_grid), infotexts)
    p.call("postprocess", result)
    return result


@dataclass(repr=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """From a prompt alone, in one pass or, with hires fix, in two."""

    enable_hr: bool = False
    denoising_strength: float = 0.75
    hr_scale: float = 2.0
    hr_second_pass_steps: int = 0
    hr_checkpoint_name: str | None = None
    hr_checkpoint_info: str | None = field(default=None, init=False)
    firstpass_image: Image.Image | None = None

    def init(self) -> None:
        """Says what the second pass does."""
        if self.enable_hr:
            self.hr_checkpoint_info = self.hr_checkpoint_name
            parameters = {
                "Denoising strength": self.denoising_strength,
                "Hires upscale": self.hr_scale,
            }
            self.extra_generation_params |= parameters | {
                "Hires checkpoint": self.hr_checkpoint_name
            }

    def sample(self, conditioning: Any, unconditional_conditioning: Tensor) -> Any:
        """The first pass (left out for a given `firstpass_image`, the Upscale button's), and the
        second."""
        self.sampler = sd_samplers.Sampler(self)
        if self.firstpass_image is not None and self.enable_hr:
            samples = to_latent([self.firstpass_image])
        else:
            x = self.rng.next()
            self.call(
                "process_before_every_sampling",
                x=x,
                noise=x,
                c=conditioning,
                uc=unconditional_conditioning,
            )
            samples = self.sampler.sample(self, x, conditioning, unconditional_conditioning)
            if not self.enable_hr:
                return samples
        sd_models.reload_model_weights(self.hr_checkpoint_name)
        return self.sample_hr_pass(samples)

    def sample_hr_pass(self, samples: Tensor) -> Any:
        """The second pass: enlarge, add noise, denoise."""
        if state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = sd_samplers.Sampler(self)
        sides = int(self.height * self.hr_scale) // opt_f, int(self.width * self.hr_scale) // opt_f
        samples = torch.nn.functional.interpolate(
            samples, size=sides, mode="bilinear", antialias=False
        )
        state.nextjob()
        self.rng = ImageRNG(samples.shape[1:], self.seeds)
        noise = self.rng.next()
        self.setup_conds()
        model = sd_models.model_data.sd_model
        sd_models.apply_token_merging(model, self.get_token_merging_ratio(for_hr=True))
        self.call("before_hr")
        self.call("process_before_every_sampling", x=samples, noise=noise, c=self.c, uc=self.uc)
        steps = self.hr_second_pass_steps or self.steps
        samples = self.sampler.sample_img2img(self, samples, noise, self.c, self.uc, steps=steps)
        sd_models.apply_token_merging(sd_models.model_data.sd_model, self.get_token_merging_ratio())
        self.sampler = None
        decoded = decode_latent_batch(samples)
        self.is_hr_pass = False
        return list(decoded)


@dataclass(repr=False)
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """From a picture; with a mask, only a part of it."""

    init_images: list[Image.Image] = field(default_factory=list)
    denoising_strength: float = 0.75
    image_mask: Image.Image | None = None

    def init(self) -> None:
        """Encodes the picture and the mask, stretched to the wanted size."""
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        sized = [image.resize((self.width, self.height)) for image in self.init_images]
        self.init_latent = to_latent(sized * self.batch_size)
        if self.image_mask is not None:
            mask = self.image_mask.convert("L").resize(self.init_latent.shape[:1:-1])
            self.nmask = (
                torch.from_numpy(np.array(mask, dtype=np.float32) / 255).round().to(shared.device)
            )
            self.mask = 1 - self.nmask

    def sample(self, conditioning: Any, unconditional_conditioning: Tensor) -> Tensor:
        """The one pass."""
        self.sampler, x = sd_samplers.Sampler(self), self.rng.next()
        conditionings = {"c": conditioning, "uc": unconditional_conditioning}
        self.call("process_before_every_sampling", x=self.init_latent, noise=x, **conditionings)
        samples = self.sampler.sample_img2img(
            self, self.init_latent, x, conditioning, unconditional_conditioning
        )
        return samples if self.mask is None else samples * self.nmask + self.init_latent * self.mask

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        """WebUI's own token merging."""
        return opts.token_merging_ratio_img2img or opts.token_merging_ratio
