"""What settings mean for a layer: whether it merges, and how many tokens it loses. For the hooks and the preview."""

from __future__ import annotations

from collections.abc import Sequence

from .profit import pays, tokens_removed
from .settings import MergeSettings
from .unet import Layer, finest_level


def coarsest_level(settings: MergeSettings, layers: Sequence[Layer]) -> int:
    """The level up to which layers merge: max downsample, or, in a UNet that has no attention there, its finest."""
    return max(settings.max_downsample, finest_level(layers) or 1)


def why_left_out(settings: MergeSettings, level: int | None, tokens: int, coarsest: int) -> str | None:
    """Why a layer of this level and token count never merges, or None."""
    if level is not None and level > coarsest:
        return f"level {level} is above max downsample {settings.max_downsample}"
    if tokens < settings.min_tokens:
        return f"{tokens} tokens are under min tokens {settings.min_tokens}"
    return None


def removed_or_why_not(
    settings: MergeSettings, tokens: int, channels: int, ratio: float, device_type: str
) -> int | str:
    """How many of a layer's tokens a ratio removes, or why it removes none."""
    removed = tokens_removed(tokens, ratio, rounded=not settings.exact)
    if not removed:
        return f"at ratio {ratio:g} there is nothing to remove"
    if settings.skip_unprofitable and not pays(tokens, channels, ratio, device_type, settings.method):
        return f"merging {ratio:g} of {tokens} tokens would not save time"
    return removed
