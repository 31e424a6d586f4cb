"""What settings mean for a layer: whether it merges, and how many tokens it loses. For the hooks
and the preview.

Where merging pays is a fixed rule, never a timing, so that a seed gives the same picture on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from .proportional import WIDTHS, padded_size
from .reasons import NotMerged
from .settings import MergeSettings
from .unet import Layer, finest_level

LEAST_FEWER = 512
"""On CPUs: how many tokens fewer each token must attend to."""

LEAST_PRODUCTS = 2.3e9
PRODUCTS_PER_NUMBER = 1300.0
"""On other devices: how many products of an attention kernel the launches of merging cost, and how
many each number of its input costs."""

PAPER_LEAST_FEWER, PAPER_LEAST_FEWER_ELSEWHERE = 128, 1024
"""`LEAST_FEWER` of the method paper, on CPUs and on other devices: version 0.1.0's, so that seeds
give its pictures."""

LITTLE_GAIN_TOKENS = 4096
"""On other devices a step gains a few percent where no merged layer has more tokens, and attention
is fast."""


def pairs_left(ratio: float, method: str) -> float:
    """The share of query-key pairs that attention still computes."""
    return 1 - ratio if method == "keys" else (1 - ratio) ** 2


def pays(
    tokens: int, channels: int, heads: int, ratio: float, device_type: str, method: str
) -> bool:
    """Whether merging `ratio` of a layer's `tokens` of `channels` saves more time than it takes.

    Attention over N tokens takes N² C operations; matching, merging and weighting take a number
    that grows with N C. So on CPUs N times the share of saved pairs decides: from `LEAST_FEWER` on
    no layer was slower merged on two CPU cores with SDP attention. On other devices a launch costs
    time at any size, and a padded head may need a larger kernel: by `bench estimate` no layer that
    merges there loses on an RTX 4090 or an H200 with FlashAttention (`docs/speed.md`). A slower
    attention pays earlier, but the rule doesn't ask which one runs.
    """
    fewer = tokens * (1 - pairs_left(ratio, method))
    if method == "paper":
        return fewer >= (PAPER_LEAST_FEWER if device_type == "cpu" else PAPER_LEAST_FEWER_ELSEWHERE)
    if device_type == "cpu":
        return fewer >= LEAST_FEWER
    return products_saved(tokens, channels, heads, ratio, method) >= (
        LEAST_PRODUCTS + PRODUCTS_PER_NUMBER * tokens * channels
    )


def products_saved(tokens: int, channels: int, heads: int, ratio: float, method: str) -> float:
    """Products of queries with keys that a fused kernel saves: it computes a head at the next of
    `WIDTHS`."""
    size = channels // heads
    whole, merged = (
        next((width for width in WIDTHS if one <= width), one) for one in (size, padded_size(size))
    )
    return heads * tokens**2 * (whole - pairs_left(ratio, method) * merged)


def tokens_removed(tokens: int, ratio: float, rounded: bool = False) -> int:
    """How many of `tokens` a ratio removes: rounded down, as `tomesd` counts them.

    `rounded` takes the number left to the nearest multiple of 16 where that changes it by 3 % at
    most: plain attention was measured up to 20 % slower over lengths that 8 doesn't divide.
    """
    removed = int(tokens * ratio)
    count = tokens - removed
    if not rounded or not removed or count < 256:
        return removed
    return tokens - min((count + 8) // 16 * 16, tokens)


def coarsest_level(settings: MergeSettings, layers: Sequence[Layer]) -> int:
    """The level up to which layers merge: max downsample, or, in a UNet that has no attention
    there, its finest."""
    return max(settings.max_downsample, finest_level(layers) or 1)


def check_layer(settings: MergeSettings, level: int | None, tokens: int, coarsest: int) -> None:
    """Raises `NotMerged` where a layer of this level and token count never merges."""
    if level is not None and level > coarsest:
        raise NotMerged(f"level {level} is above max downsample {settings.max_downsample}")
    if tokens < settings.min_tokens:
        raise NotMerged(f"{tokens} tokens are under min tokens {settings.min_tokens}")


def tokens_to_remove(
    settings: MergeSettings, tokens: int, channels: int, heads: int, ratio: float, device_type: str
) -> int:
    """How many of a layer's tokens a ratio removes. Raises `NotMerged` where it removes none."""
    removed = tokens_removed(tokens, ratio, rounded=not settings.exact)
    if not removed:
        raise NotMerged(f"at ratio {ratio:g} there is nothing to remove", by_ratio=True)
    if settings.skip_unprofitable and not pays(
        tokens, channels, heads, ratio, device_type, settings.method
    ):
        raise NotMerged(f"merging {ratio:g} of {tokens} tokens would not save time", by_ratio=True)
    return removed
