"""The effect of settings on a layer: whether it merges, and how many tokens it loses.

Whether merging pays is a fixed rule, never a timing, so that a seed gives the same picture on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from .proportional import WIDTHS, padded_size
from .reasons import NotMerged
from .settings import MergeSettings
from .unet import Layer

LEAST_FEWER = 512
"""On CPUs: the fewest keys per query that merging must save."""

LEAST_PRODUCTS = 2.3e9
PRODUCTS_PER_NUMBER = 1300.0
"""On other devices: the cost of merging, as attention products per layer and per input value."""

PAPER_LEAST_FEWER, PAPER_LEAST_FEWER_ELSEWHERE = 128, 1024
"""`LEAST_FEWER` for the method paper, on CPUs and elsewhere, as in 0.1.0."""

LITTLE_GAIN_TOKENS = 4096
"""On other devices, layers up to this size gain a few percent per step if attention is fast."""


def pairs_left(ratio: float, method: str) -> float:
    """The fraction of query-key pairs left for attention."""
    return 1 - ratio if method == "keys" else (1 - ratio) ** 2


def pays(
    tokens: int, channels: int, heads: int, ratio: float, device_type: str, method: str
) -> bool:
    """Whether merging `ratio` of a layer's tokens saves more time than it takes.

    Attention over N tokens takes N² C operations; matching, merging and weighting take a number
    proportional to N C. On CPUs the rule is the saved fraction of pairs times N: from `LEAST_FEWER`
    on, no layer was slower merged on two CPU cores with SDP attention. On other devices a launch
    costs time at any size, and padded heads may need a larger kernel: by `bench estimate` no layer
    that passes this rule loses on an RTX 4090 or an H200 with FlashAttention (docs/speed.md).
    Slower attention would pay earlier, but the rule doesn't ask which one runs.
    """
    fewer = tokens * (1 - pairs_left(ratio, method))
    if method == "paper":
        return fewer >= (PAPER_LEAST_FEWER if device_type == "cpu" else PAPER_LEAST_FEWER_ELSEWHERE)
    if device_type == "cpu":
        return fewer >= LEAST_FEWER
    # A fused kernel computes a head at the next of `WIDTHS`.
    size = channels // heads
    whole, merged = (
        next((width for width in WIDTHS if one <= width), one) for one in (size, padded_size(size))
    )
    saved = heads * tokens**2 * (whole - pairs_left(ratio, method) * merged)
    return saved >= LEAST_PRODUCTS + PRODUCTS_PER_NUMBER * tokens * channels


def tokens_removed(tokens: int, ratio: float, rounded: bool = False) -> int:
    """How many of `tokens` a ratio removes, rounded down as in `tomesd`.

    `rounded` rounds the number left to the nearest multiple of 16 if that changes it by 3 % at
    most: plain attention was up to 20 % slower for lengths that 8 doesn't divide.
    """
    removed = int(tokens * ratio)
    count = tokens - removed
    if not rounded or not removed or count < 256:
        return removed
    return tokens - min((count + 8) // 16 * 16, tokens)


def coarsest_level(settings: MergeSettings, layers: Sequence[Layer]) -> int:
    """The coarsest level that merges: max downsample, or a coarser UNet's finest level."""
    levels = [layer.level for layer in layers if layer.level and layer.is_self_attention]
    return max(settings.max_downsample, min(levels, default=1))


def check_layer(settings: MergeSettings, level: int | None, tokens: int, coarsest: int) -> None:
    """Raises `NotMerged` if layers of this level and token count never merge."""
    if level is not None and level > coarsest:
        raise NotMerged(f"level {level} is coarser than max downsample {settings.max_downsample}")
    if tokens < settings.min_tokens:
        raise NotMerged(f"{tokens} tokens are below min tokens {settings.min_tokens}")


def tokens_to_remove(
    settings: MergeSettings, tokens: int, channels: int, heads: int, ratio: float, device_type: str
) -> int:
    """How many of a layer's tokens `ratio` removes. Raises `NotMerged` if none."""
    removed = tokens_removed(tokens, ratio, rounded=not settings.exact)
    if not removed:
        raise NotMerged(f"ratio {ratio:.3g} removes no tokens", by_ratio=True)
    if settings.skip_unprofitable and not pays(
        tokens, channels, heads, ratio, device_type, settings.method
    ):
        raise NotMerged(
            f"merging {ratio:.3g} of {tokens} tokens would not save time", by_ratio=True
        )
    return removed
