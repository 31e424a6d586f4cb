"""Stands in for `modules.processing`: one generation, with WebUI 1.10.1's order of script calls.

Files, styles, variation seeds, extra networks and upscalers, which don't concern merging, are
missing. `opt_f` (pixels per latent pixel) and `opt_C` (latent channels) are the model's; WebUI's
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
from modules.rng import ImageRNG
from modules.shared import opts, state
from PIL import Image
from torch import Tensor

opt_C = 4
opt_f = 8


@dataclass(repr=False)
class StableDiffusionProcessing:
    """A generation's settings and state."""

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
        """Set a tab's scripts and call their `setup`; WebUI does so once both are set."""
        self.scripts, self.script_args = runner, script_args
        self.call("setup")
        return self

    def call(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of the scripts, if there are any."""
        if self.scripts is not None:
            getattr(self.scripts, name)(self, *args, **kwargs)

    def comment(self, text: str) -> None:
        """Add a line under the picture."""
        self.comments[text] = 1

    def init(self) -> None:
        """Prepare; called once, before the first batch."""

    def sample(self, conditioning: Any, unconditional_conditioning: Tensor) -> Any:
        """Sample all passes of one batch."""
        raise NotImplementedError

    def close(self) -> None:
        """Clean up, after a failed generation too."""
        self.sampler = self.c = self.uc = None

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        """WebUI's own token merging."""
        return (opts.token_merging_ratio_hr if for_hr else 0) or opts.token_merging_ratio

    def setup_conds(self) -> None:
        """Encode the prompt's parts, joined by `AND`, with their weights (`cat AND dog :0.5`)."""
        model = sd_models.model_data.sd_model
        weighted = re.compile(r"(.*?)(?:\s*:\s*([-+]?\d*\.?\d+))?\s*", re.S)
        parts = [weighted.fullmatch(part) for part in re.split(r"\bAND\b", self.prompt)]
        encoded = model.encode_prompts([part[1] for part in parts])
        weights = [float(part[2] or 1) for part in parts]
        rows = list(zip(encoded, weights, strict=True))
        self.c = SimpleNamespace(batch=[rows] * self.batch_size)
        self.uc = model.encode_prompts([self.negative_prompt] * self.batch_size)


class Processed:
    """The result of a generation."""

    def __init__(
        self,
        p: StableDiffusionProcessing,
        images_list: list,
        index_of_first_image: int = 0,
        infotexts: Any = (),
    ) -> None:
        self.images, self.index_of_first_image = images_list, index_of_first_image
        self.infotexts = list(infotexts)
        self.comments = "".join(f"{comment}\n" for comment in p.comments)
        self.extra_generation_params = p.extra_generation_params

    def infotext(self, p: StableDiffusionProcessing, index: int) -> str:
        """Infotext of one picture."""
        return create_infotext(p, index)


def fix_seed(p: StableDiffusionProcessing) -> None:
    """Replace -1 and None by a random seed."""
    p.seed = random.randrange(4294967294) if p.seed in (None, -1) else int(p.seed)


def create_infotext(p: StableDiffusionProcessing, index: int) -> str:
    """Format a picture's parameters as text, without those that are None."""
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


def to_latent(images: list[Image.Image]) -> Tensor:
    """Encode pictures as latents."""
    return sd_models.model_data.sd_model.from_images(images)


def decode_latent_batch(batch: Tensor) -> Tensor:
    """Decode latents one after the other as pictures in [-1, 1]."""
    devices.test_for_nans(batch, "unet")
    model = sd_models.model_data.sd_model
    return torch.cat([model.to_rgb(latent[None]) for latent in batch]).cpu() * 2 - 1


def image_grid(images: list[Image.Image]) -> Image.Image:
    """Join all pictures side by side; WebUI's grid has rows."""
    grid = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        grid.paste(image, (i * image.width, 0))
    return grid


def process_images(p: StableDiffusionProcessing) -> Processed:
    """Generate; restore the settings that `p` overrides, after a failure too."""
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
    """Generate all batches; exceptions of scripts are reported, one in sampling ends everything."""
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
            prompts = [p.prompt] * p.batch_size
            batch = {"batch_number": n, "prompts": prompts, "seeds": seeds, "subseeds": seeds}
            p.call("before_process_batch", **batch)
            p.call("process_batch", **batch)
            p.setup_conds()
            if n == 0 and shared.data_path:
                file = Path(shared.data_path, "params.txt")
                file.write_text(create_infotext(p, 0), encoding="utf-8")
            # Other extensions may have replaced `p.sample`.
            samples = p.sample(conditioning=p.c, unconditional_conditioning=p.uc)
            p.call("post_sample", SimpleNamespace(samples=samples))
            # Hires fix returns decoded pictures.
            is_decoded = isinstance(samples, list)
            decoded = torch.stack(samples) if is_decoded else decode_latent_batch(samples)
            pictures = ((decoded.float() + 1) / 2).clamp(0, 1)
            state.nextjob()
            p.call("postprocess_batch", images=pictures, batch_number=n)
            p.call("postprocess_batch_list", SimpleNamespace(images=list(pictures)), batch_number=n)
            for i, picture in enumerate(pictures):
                p.batch_index = i
                pixels = (255.0 * np.moveaxis(picture.numpy(), 0, 2)).astype(np.uint8)
                pp = SimpleNamespace(image=Image.fromarray(pixels))
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
    """Text to image, in one pass or, with hires fix, in two."""

    enable_hr: bool = False
    denoising_strength: float = 0.75
    hr_scale: float = 2.0
    hr_second_pass_steps: int = 0
    hr_checkpoint_name: str | None = None
    hr_checkpoint_info: str | None = field(default=None, init=False)
    firstpass_image: Image.Image | None = None

    def init(self) -> None:
        """Add the parameters of the second pass."""
        if self.enable_hr:
            self.hr_checkpoint_info = self.hr_checkpoint_name
            self.extra_generation_params |= {
                "Denoising strength": self.denoising_strength,
                "Hires upscale": self.hr_scale,
                "Hires checkpoint": self.hr_checkpoint_name,
            }

    def sample(self, conditioning: Any, unconditional_conditioning: Tensor) -> Any:
        """Sample the first pass, or encode `firstpass_image` (Upscale button), and the second."""
        self.sampler = sd_samplers.Sampler(self)
        if self.firstpass_image is not None and self.enable_hr:
            samples = to_latent([self.firstpass_image])
        else:
            x = self.rng.next()
            conditionings = {"c": conditioning, "uc": unconditional_conditioning}
            self.call("process_before_every_sampling", x=x, noise=x, **conditionings)
            samples = self.sampler.sample(self, x, conditioning, unconditional_conditioning)
            if not self.enable_hr:
                return samples
        sd_models.reload_model_weights(self.hr_checkpoint_name)
        return self.sample_hr_pass(samples)

    def sample_hr_pass(self, samples: Tensor) -> Any:
        """Sample the second pass: enlarge, add noise, denoise."""
        if state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = sd_samplers.Sampler(self)
        sides = int(self.height * self.hr_scale) // opt_f, int(self.width * self.hr_scale) // opt_f
        samples = torch.nn.functional.interpolate(samples, size=sides, mode="bilinear")
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
    """Image to image; with a mask, only a part of it."""

    init_images: list[Image.Image] = field(default_factory=list)
    denoising_strength: float = 0.75
    image_mask: Image.Image | None = None

    def init(self) -> None:
        """Encode the picture and the mask at the requested size."""
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        sized = [image.resize((self.width, self.height)) for image in self.init_images]
        self.init_latent = to_latent(sized * self.batch_size)
        if self.image_mask is not None:
            mask = self.image_mask.convert("L").resize(self.init_latent.shape[:1:-1])
            pixels = np.array(mask, dtype=np.float32) / 255
            self.nmask = torch.from_numpy(pixels).round().to(shared.device)
            self.mask = 1 - self.nmask

    def sample(self, conditioning: Any, unconditional_conditioning: Tensor) -> Tensor:
        """Sample the only pass."""
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
