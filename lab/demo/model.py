"""A tiny text-to-image model with all of Stable Diffusion's structure: the demo's and the
benchmarks' trained models.

The UNet is the original ``ldm`` one, with self- and cross-attention at three levels, in pixel space
at 32×32: one was trained on emoji, and one on crops of photographs, at 64×64 too. The text side is
a small vocabulary of the training pictures' own words. `TinyModel` offers what the ``ldm`` samplers
and a host ask of a ``LatentDiffusion``: ``model.diffusion_model``, ``apply_model``,
``alphas_cumprod`` and the like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"

MODELS = ("emoji", "photos")
"""The trained models, by what they were trained on: each is a folder in `WEIGHTS`."""

#: The shape of the shipped models; `TinyModel` takes a mapping of this form.
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
    # A pixel in [0, 1] is `value * pixel_scale + pixel_offset`: centres the pictures, which are
    # mostly white.
    "pixel_offset": 0.85,
    "pixel_scale": 0.35,
}


def split_words(prompt: str) -> list[str]:
    """The words of ``prompt``, in lower case, without punctuation; ``"T-Rex!"`` is ``["t",
    "rex"]``."""
    return re.findall(r"[^\W_]+", prompt.lower())


class _Diffusion(nn.Module):
    """Holds the UNet where ``ldm`` and WebUI look for it: ``model.diffusion_model``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet

    def forward(self, x: Tensor, t: Tensor, c_crossattn: Sequence[Tensor]) -> Tensor:
        return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn), dim=1))


class WordEncoder(nn.Module):
    """Turns word numbers into the UNet's context.

    Learnt word and position embeddings, then one small MLP that shows every position the mean of
    all of them: "red apple" and "red heart" should differ in what "red" says, too.
    """

    def __init__(self, words: int, length: int, dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(
            words + 1, dim
        )  # number 0 is the padding, and alone it is the empty prompt
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.mix = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids``: LongTensor [B, L]. Returns the context, [B, L, dim]."""
        h = self.word(ids)
        # The mean over words alone, so that a caption's length does not dilute it; of the padding
        # where it is empty.
        weight = (ids > 0).to(h.dtype).unsqueeze(-1)
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, torch.ones_like(weight))
        mean = (h * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        h = h + self.position
        return self.norm(h + self.mix(torch.cat([h, mean.expand_as(h)], dim=-1)))


class TinyModel(nn.Module):
    """A trained (or random) tiny text-to-image model, in the form that ``ldm``'s samplers drive.

    To the samplers it predicts the noise (``parameterization == "eps"``), in 1000 steps of ldm's
    "linear" schedule. The UNet itself predicts the velocity (arXiv 2202.00512), from which
    `apply_model` takes the noise: a small model that was trained briefly errs least that way in the
    noisiest steps, which settle a picture's colours.

    A word's place in ``words`` is its number; ``captions`` are the training pictures', for choosing
    prompts; ``shape`` holds entries that differ from `DEFAULT_SHAPE`. Raises `ValueError` for an
    unknown one.
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

        # Imported here: ldm takes a second or more, and this module's names are wanted without it,
        # too.
        from ldm.modules.diffusionmodules.openaimodel import UNetModel
        from ldm.modules.diffusionmodules.util import make_beta_schedule

        same = (
            "image_size",
            "model_channels",
            "channel_mult",
            "num_res_blocks",
            "attention_resolutions",
        )
        same += ("num_head_channels", "context_dim")
        sizes = {name: self.shape[name] for name in same} | {"in_channels": 3, "out_channels": 3}
        rest = {
            "use_spatial_transformer": True,
            "transformer_depth": 1,
            "use_checkpoint": False,
            "legacy": False,
        }
        self.model = _Diffusion(UNetModel(**sizes, **rest))
        # ldm's 32 groups would here hold one channel each, and so wipe out every channel's mean:
        # colours would drift.
        for module in self.model.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = self.shape["norm_groups"]
        self.text = WordEncoder(
            len(self.words), self.shape["prompt_length"], self.shape["context_dim"]
        )

        self.num_timesteps = 1000
        betas = torch.as_tensor(
            make_beta_schedule(
                "linear", self.num_timesteps, self.shape["beta_start"], self.shape["beta_end"]
            )
        )
        cumprod = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=cumprod.dtype), cumprod[:-1]])
        for name, values in (
            ("betas", betas),
            ("alphas_cumprod", cumprod),
            ("alphas_cumprod_prev", previous),
        ):
            self.register_buffer(name, values.float(), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.betas.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one picture as the model sees it."""
        return (3, self.shape["image_size"], self.shape["image_size"])

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The predicted noise in ``x``, noisy pictures; both [B, 3, H, W].

        ``t``: step numbers [B], 0 (nearly clean) to 999 (nearly pure noise), whole or, for
        k-diffusion, between. ``cond``: context [B, L, context_dim], or as ldm passes it:
        ``[context]`` or ``{"c_crossattn": [context]}``.
        """
        alpha = self._alpha(t).view(-1, 1, 1, 1)
        return alpha.sqrt() * self.velocity(x, t, cond) + (1 - alpha).sqrt() * x

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """What the UNet predicts, √ᾱ·noise - √(1-ᾱ)·picture; arguments and result as for
        `apply_model`."""
        if isinstance(cond, Mapping):
            cond = cond["c_crossattn"]
        return self.model(x, t, [cond] if isinstance(cond, Tensor) else cond).float()

    def _alpha(self, t: Tensor) -> Tensor:
        """ᾱ at ``t`` [B]; between two steps as in k-diffusion, whose samplers ask for such: log σ
        is interpolated."""
        if not t.is_floating_point():
            return self.alphas_cumprod[t]
        log_sigma = 0.5 * ((1 - self.alphas_cumprod) / self.alphas_cumprod).log()
        low = t.floor().long().clamp(0, self.num_timesteps - 1)
        high = (low + 1).clamp(max=self.num_timesteps - 1)
        return torch.sigmoid(-2 * torch.lerp(log_sigma[low], log_sigma[high], t - low))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of ``prompt`` that the model was never shown, once each, in order;
        `encode_prompts` skips them."""
        return [word for word in dict.fromkeys(split_words(prompt)) if word not in self._number]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Word numbers, LongTensor [B, L], 0 for none; unknown words, and known ones past L, are
        skipped."""
        length = self.shape["prompt_length"]
        rows = [
            [self._number[w] for w in split_words(p) if w in self._number][:length] for p in prompts
        ]
        return torch.tensor(
            [row + [0] * (length - len(row)) for row in rows], dtype=torch.long, device=self.device
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Context for ``prompts``, [B, L, context_dim]; the empty prompt is the learnt
        unconditional one.

        Unknown words are left out, never guessed: ask `unknown_words` and tell the user.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        return self.text(self.tokenize(prompts))

    def from_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the model sees them, [B, 3, H, W]; transparent parts become white. The
        inverse of `to_images`."""
        rgb = rgb_tensor(images).to(self.device)
        return (rgb - self.shape["pixel_offset"]) / self.shape["pixel_scale"]

    def to_images(self, x: Tensor) -> list[Image.Image]:
        """RGB pictures of ``x`` [B, 3, H, W]; values outside the range of pixels are clipped."""
        rgb = self.to_rgb(x).mul(255).round().byte().permute(0, 2, 3, 1).cpu().contiguous()
        return [Image.fromarray(picture.numpy()) for picture in rgb]

    def to_rgb(self, x: Tensor) -> Tensor:
        """``x`` [B, 3, H, W] as RGB in [0, 1], clipped."""
        return (x.detach().float() * self.shape["pixel_scale"] + self.shape["pixel_offset"]).clamp(
            0, 1
        )

    @classmethod
    def load(cls, name: str = "emoji") -> TinyModel:
        """One of the trained `MODELS`, as from `read`."""
        return cls.read(WEIGHTS / name / "tiny.safetensors")

    @classmethod
    def read(cls, path: str | Path) -> TinyModel:
        """The model in ``path``, a ``.safetensors`` file with its ``.json`` beside it, in fp32 and
        in eval mode.

        Raises `FileNotFoundError` where one of the two is missing.
        """
        path = Path(path)
        weights, metadata = (
            _read(path),
            json.loads(_existing(path.with_suffix(".json")).read_text(encoding="utf-8")),
        )
        model = cls(metadata["words"], metadata["captions"], metadata["shape"])
        model.load_state_dict(weights)
        return model.eval().requires_grad_(False)

    def save(self, path: str | Path, **remarks: Any) -> None:
        """Writes the weights in fp16 to ``path`` (``.safetensors``), and the ``.json`` that
        describes them beside it.

        That holds shape, words and captions; ``remarks`` (JSON values) are added to it, for people.
        """
        _write(self, path)
        metadata = {"shape": self.shape, **remarks, "words": self.words, "captions": self.captions}
        text = json.dumps(metadata, indent=1, ensure_ascii=False)
        Path(path).with_suffix(".json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def random(
        cls, seed: int = 0, words: Sequence[str] = ("cat", "face", "red", "apple"), **shape: Any
    ) -> TinyModel:
        """An untrained model in eval mode, whose every layer has an effect; global random state is
        left as it was.

        ``shape`` as for `TinyModel`. ldm starts output layers at zero, which would hide whatever
        attention does; here they are random as well.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(words, shape=shape)
            fill_zeros(model)
        return model.eval().requires_grad_(False)


def fill_zeros(model: nn.Module) -> None:
    """Gives random values to what is all zeros, as ldm's UNet has the last layer of each block at
    first."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def on_white(image: Image.Image) -> Image.Image:
    """``image`` as RGB, its transparent parts white."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing from {path.parent}")
    return path


def _read(path: Path) -> dict[str, Tensor]:
    """Weights in fp32."""
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(_existing(path)).items()}


def _write(model: nn.Module, path: str | Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def rgb_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as RGB in [0, 1], [B, 3, H, W]; transparent parts become white."""
    pixels = [on_white(image) for image in images]
    stacked = [
        torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3)
        for p in pixels
    ]
    return torch.stack(stacked).permute(0, 3, 1, 2).float().div(255)
