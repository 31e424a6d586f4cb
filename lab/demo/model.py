"""A tiny text-to-image model with Stable Diffusion's structure, for the demo and the benchmarks.

The UNet is the original `ldm` one, with self- and cross-attention at three levels, in pixel space
at 32×32. One model was trained on emoji, and one on crops of photographs, at 64×64 too. The text
side is a small vocabulary. `TinyModel` has what `ldm`'s samplers and a host use of a
`LatentDiffusion`: `model.diffusion_model`, `apply_model`, `alphas_cumprod` and the like.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .text import WordEncoder, split_words

WEIGHTS = Path(__file__).parent / "weights"

MODELS = ("emoji", "photos")
"""Trained models by their training pictures; each is a folder in `WEIGHTS`."""

DEFAULT_SHAPE: dict[str, Any] = {
    "image_size": 32,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2, 4],
    "num_head_channels": 32,
    "norm_groups": 8,
    "context_dim": 96,
    "prompt_length": 6,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "pixel_offset": 0.85,
    "pixel_scale": 0.35,
}
"""Shape of the shipped models; a pixel in [0, 1] is `value * pixel_scale + pixel_offset`."""

_UNET_SHAPE = ("image_size", "model_channels", "channel_mult", "num_res_blocks")
_UNET_SHAPE += ("attention_resolutions", "num_head_channels", "context_dim")
_UNET = {"in_channels": 3, "out_channels": 3, "use_spatial_transformer": True}
_UNET |= {"transformer_depth": 1, "use_checkpoint": False, "legacy": False}


class _Diffusion(nn.Module):
    """Holds the UNet where `ldm` and WebUI look for it: `model.diffusion_model`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet

    def forward(self, x: Tensor, t: Tensor, c_crossattn: Sequence[Tensor]) -> Tensor:
        return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn), dim=1))


class TinyModel(nn.Module):
    """A tiny text-to-image model, as `ldm`'s samplers drive it.

    To samplers it predicts the noise (`parameterization == "eps"`), in 1000 steps of ldm's "linear"
    schedule. The UNet predicts the velocity (arXiv 2202.00512), from which `apply_model` computes
    the noise: briefly trained small models then err least in the noisiest steps, which decide
    colours.

    A word's number is its place in `words`; `captions` are those of the training pictures; `shape`
    overrides entries of `DEFAULT_SHAPE`. Raises `ValueError` for an unknown entry.
    """

    parameterization = "eps"

    def __init__(
        self,
        words: Sequence[str],
        captions: Sequence[str] = (),
        shape: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        unknown = set(shape or {}) - set(DEFAULT_SHAPE)
        if unknown:
            raise ValueError(
                f"shape has unknown entries {sorted(unknown)}; known are {sorted(DEFAULT_SHAPE)}"
            )
        self.shape: dict[str, Any] = {**DEFAULT_SHAPE, **(shape or {})}
        self.words = list(words)
        self.captions = list(captions)
        self._number = {word: i + 1 for i, word in enumerate(self.words)}

        # Imported here, since ldm takes a second or more to import.
        from ldm.modules.diffusionmodules.openaimodel import UNetModel
        from ldm.modules.diffusionmodules.util import make_beta_schedule

        unet_shape = {name: self.shape[name] for name in _UNET_SHAPE}
        self.model = _Diffusion(UNetModel(**unet_shape, **_UNET))
        # ldm's 32 groups would hold one channel each and remove its mean, so that colours drift.
        for module in self.model.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = self.shape["norm_groups"]
        self.text = WordEncoder(
            len(self.words), self.shape["prompt_length"], self.shape["context_dim"]
        )

        self.num_timesteps = 1000
        ends = self.shape["beta_start"], self.shape["beta_end"]
        betas = torch.as_tensor(make_beta_schedule("linear", self.num_timesteps, *ends))
        cumprod = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=cumprod.dtype), cumprod[:-1]])
        names = "betas", "alphas_cumprod", "alphas_cumprod_prev"
        for name, values in zip(names, (betas, cumprod, previous), strict=True):
            self.register_buffer(name, values.float(), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.betas.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one picture as the model sees it."""
        return (3, self.shape["image_size"], self.shape["image_size"])

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Predict the noise in noisy pictures `x`; both [B, 3, H, W].

        `t`: step numbers [B] from 0 (nearly clean) to 999 (nearly pure noise), whole or, for
        k-diffusion, fractional. `cond`: context [B, L, context_dim], or as ldm passes it:
        `[context]` or `{"c_crossattn": [context]}`.
        """
        alpha = self._alpha(t).view(-1, 1, 1, 1)
        return alpha.sqrt() * self.velocity(x, t, cond) + (1 - alpha).sqrt() * x

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The UNet's prediction, √ᾱ·noise - √(1-ᾱ)·picture; arguments as in `apply_model`."""
        if isinstance(cond, Mapping):
            cond = cond["c_crossattn"]
        return self.model(x, t, [cond] if isinstance(cond, Tensor) else cond).float()

    def _alpha(self, t: Tensor) -> Tensor:
        """ᾱ at `t` [B]; at fractional steps log σ is interpolated, as in k-diffusion."""
        if not t.is_floating_point():
            return self.alphas_cumprod[t]
        log_sigma = 0.5 * ((1 - self.alphas_cumprod) / self.alphas_cumprod).log()
        low = t.floor().long().clamp(0, self.num_timesteps - 1)
        high = (low + 1).clamp(max=self.num_timesteps - 1)
        return torch.sigmoid(-2 * torch.lerp(log_sigma[low], log_sigma[high], t - low))

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of `prompt` that aren't in the vocabulary, without repeats; encoding skips them."""
        return [word for word in dict.fromkeys(split_words(prompt)) if word not in self._number]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Word numbers, LongTensor [B, L], padded with 0; unknown words and those past L are
        dropped."""
        length, rows = self.shape["prompt_length"], []
        for prompt in prompts:
            numbers = [self._number.get(word) for word in split_words(prompt)]
            known = [number for number in numbers if number is not None][:length]
            rows.append(known + [0] * (length - len(known)))
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Context of `prompts`, [B, L, context_dim]; the empty prompt is the unconditional one."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        return self.text(self.tokenize(prompts))

    def from_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the model's input, [B, 3, H, W]; transparent parts become white."""
        arrays = [torch.from_numpy(np.array(on_white(image))) for image in images]
        rgb = torch.stack(arrays).permute(0, 3, 1, 2).float().div(255).to(self.device)
        return (rgb - self.shape["pixel_offset"]) / self.shape["pixel_scale"]

    def to_images(self, x: Tensor) -> list[Image.Image]:
        """RGB pictures of `x` [B, 3, H, W], clipped; the inverse of `from_images`."""
        rgb = self.to_rgb(x).mul(255).round().byte().permute(0, 2, 3, 1).cpu().contiguous()
        return [Image.fromarray(picture.numpy()) for picture in rgb]

    def to_rgb(self, x: Tensor) -> Tensor:
        """`x` [B, 3, H, W] as RGB in [0, 1], clipped."""
        rgb = x.detach().float() * self.shape["pixel_scale"] + self.shape["pixel_offset"]
        return rgb.clamp(0, 1)

    @classmethod
    def load(cls, name: str = "emoji") -> TinyModel:
        """Load one of the trained `MODELS`."""
        return cls.read(WEIGHTS / name / "tiny.safetensors")

    @classmethod
    def read(cls, path: str | Path) -> TinyModel:
        """Read a model from a `.safetensors` file and its `.json`, in fp32 and eval mode.

        Raises `FileNotFoundError` if one of the two is missing.
        """
        from safetensors.torch import load_file

        path = Path(path)
        for file in (path, path.with_suffix(".json")):
            if not file.is_file():
                raise FileNotFoundError(f"{file.name} is missing from {file.parent}")
        metadata = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        model = cls(metadata["words"], metadata["captions"], metadata["shape"])
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return model.eval().requires_grad_(False)

    def save(self, path: str | Path, **remarks: Any) -> None:
        """Write weights in fp16 to a `.safetensors` file, and their description to a `.json`.

        The description holds shape, words and captions, and `remarks` (JSON values) for people.
        """
        from safetensors.torch import save_file

        half = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(half, path)
        metadata = {"shape": self.shape, **remarks, "words": self.words, "captions": self.captions}
        text = json.dumps(metadata, indent=1, ensure_ascii=False)
        Path(path).with_suffix(".json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def random(
        cls, seed: int = 0, words: Sequence[str] = ("cat", "face", "red", "apple"), **shape: Any
    ) -> TinyModel:
        """Untrained model in eval mode; every layer has an effect. Keeps the global random state.

        ldm initialises output layers to zero, which would hide the effect of attention; here they
        are random.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(words, shape=shape)
            fill_zeros(model)
        return model.eval().requires_grad_(False)


def fill_zeros(model: nn.Module) -> None:
    """Give random values to all-zero weights, such as the last layer of each of ldm's blocks."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB with white in place of transparency."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
