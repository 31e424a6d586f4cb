"""`tomesd`'s two functions, as a drop-in replacement."""

from __future__ import annotations

import warnings
from typing import TypeVar

from .hooks import attach, detach
from .settings import MergeSettings, SettingsError, max_ratio

Model = TypeVar("Model")


def apply_patch(
    model: Model,
    ratio: float = 0.5,
    max_downsample: int = 1,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
) -> Model:
    """Merge tokens in `model` with `tomesd`'s names, defaults and token counts; return the model.

    `sx` and `sy` are the columns and rows of a cell. As in `tomesd`, destinations are searched in
    the whole image, and a ratio above 1 - 1/(sx·sy) is capped, here with a warning. Differences:
    the random draw depends on the step, not on a generator, and stays on for odd batches; each UNet
    pass counts as a step; a model without attention at `max_downsample` (SDXL at 1) merges at its
    finest level; no class is replaced.

    Raises `SettingsError` (a `ValueError`) for `merge_crossattn` and `merge_mlp`, and `TypeError`
    if there is no UNet.
    """
    for name, value in (("merge_crossattn", merge_crossattn), ("merge_mlp", merge_mlp)):
        if value:
            raise SettingsError(
                f"{name} must be False, got {value!r}: only self-attention is merged, since "
                "merging elsewhere costs quality and gains little (paper, table 3a)"
            )
    remove_patch(model)
    if not merge_attn:
        return model
    partition = "random" if use_rand else "corner"
    highest = max_ratio((sy, sx), partition)
    if ratio > highest:
        warnings.warn(
            f"ratio {ratio:g} is capped to {highest:g}, the most that a {sy}×{sx} stride allows",
            stacklevel=2,
        )
        ratio = highest
    attach(
        model,
        MergeSettings(
            ratio=ratio,
            schedule="constant",
            max_downsample=max_downsample,
            stride=(sy, sx),
            partition=partition,
            window=None,
            method="paper",
            full_steps=1,
            skip_unprofitable=False,
        ),
    )
    return model


def remove_patch(model: Model) -> Model:
    """Remove what `apply_patch` or `attach` put on `model`; return the model."""
    detach(model)
    return model
