"""The preview: a chart of the ratio over the steps, and one line on what will be merged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from modules import devices, processing

from ..plan import LITTLE_GAIN_TOKENS, check_layer, coarsest_level, tokens_to_remove
from ..reasons import NO_LAYERS, NotMerged
from ..settings import HIGHEST_RATIO, PASSES, MergeSettings, progress_of
from ..unet import Layer
from . import host

WIDTH, HEIGHT = 120, 28


def title(settings: MergeSettings | None) -> str:
    """The panel's title: the current settings in a few words."""
    if settings is None:
        return "ToMe"
    ratios = [f"{settings.ratio_at(progress):.0%}".replace("%", " %") for progress in (0.0, 1.0)]
    shown = " → ".join(dict.fromkeys(ratios))
    return f"ToMe: {shown} of {_merged(settings)}, level {settings.max_downsample}"


def _merged(settings: MergeSettings) -> str:
    """The kind of tokens that are merged, in a word."""
    return "keys" if settings.method == "keys" else "tokens"


def of_loaded_model(settings: MergeSettings, width: Any, height: Any, has_hires_pass: bool) -> str:
    """`describe` the loaded model for a size in pixels, in a tab with or without hires fix."""
    if settings.apply_to == "hires pass" and not has_hires_pass:
        return "nothing would be merged: this tab has no hires pass"
    latent = int(height) // processing.opt_f, int(width) // processing.opt_f
    return describe(settings, host.loaded_layers(), latent, devices.device.type)


def describe(
    settings: MergeSettings,
    layers: Sequence[Layer] | None,
    latent: tuple[int, int],
    device_type: str,
) -> str:
    """One line: how many layers will merge how many tokens. `latent` is (rows, columns)."""
    if layers is None:
        return "loaded at the first picture" if host.loads_later() else "no model loaded"
    if not layers:
        return NO_LAYERS
    coarsest = coarsest_level(settings, layers)
    each = [_expect(settings, layer, latent, coarsest, device_type) for layer in layers]
    changes = Counter(f"{tokens} → {left}" for tokens, left, _ in each if left)
    if not changes:
        _, _, reason = max(each)
        line = f"0 of {len(layers)} self-attention layers: nothing would be merged"
        return f"{line}: {reason}" if reason else line
    what = _merged(settings)
    merged = ", ".join(
        f"{change} {what} each" if len(changes) == 1 else f"{count}× {change} {what}"
        for change, count in changes.items()
    )
    line = f"{sum(changes.values())} of {len(layers)} self-attention layers, {merged}"
    if coarsest > settings.max_downsample:
        line += f"; level {coarsest} is this model's finest"
    if settings.apply_to != PASSES[0]:
        line += f", {settings.apply_to} only"
    most_tokens = max(tokens for tokens, left, _ in each if left)
    if device_type != "cpu" and most_tokens <= LITTLE_GAIN_TOKENS:
        line += "; little to gain at this size with fast attention"
    return line


def _expect(
    settings: MergeSettings, layer: Layer, latent: tuple[int, int], coarsest: int, device_type: str
) -> tuple[int, str, str]:
    """A layer's tokens, how many are left, as text, and the reason if it won't merge."""
    tokens = math.prod(math.ceil(side / (layer.level or 1)) for side in latent)
    if not layer.is_self_attention:
        return tokens, "", ""
    left, reason = [], ""
    for ratio in (settings.ratio_at(0.0), settings.ratio_at(1.0)):
        removed = 0
        try:
            check_layer(settings, layer.level, tokens, coarsest)
            removed = tokens_to_remove(
                settings, tokens, layer.channels, layer.heads, ratio, device_type
            )
        except NotMerged as error:
            reason = str(error)
        left.append(tokens - removed)
    is_merged = set(left) != {tokens}
    return tokens, " to ".join(map(str, dict.fromkeys(left))) if is_merged else "", reason


def chart(settings: MergeSettings, steps: int) -> str:
    """An SVG of the ratio over the steps, one bar per step, in the theme's text colour."""
    ratios = [settings.ratio_at(progress_of(step, steps)) for step in range(steps)]
    width = WIDTH / steps
    bars = "".join(
        f'<rect x="{number * width:.2f}" y="{HEIGHT - HEIGHT * ratio / HIGHEST_RATIO:.2f}" '
        f'width="{max(width * 0.85, 0.5):.2f}" height="{HEIGHT * ratio / HIGHEST_RATIO:.2f}"/>'
        for number, ratio in enumerate(ratios)
    )
    label = f"ratio over {steps} steps: {ratios[0]:.2f} to {ratios[-1]:.2f}"
    return (
        f'<svg class="tome-chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"<title>{label}</title>{bars}</svg>"
    )
