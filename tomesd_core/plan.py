"""What settings mean for a layer: whether it merges, and how many tokens it loses. For the hooks and the preview.

Where merging pays is a fixed rule, never a timing, so that a seed gives the same picture on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from .reasons import NotMerged
from .settings import MergeSettings
from .unet import Layer, finest_level

LEAST_GAIN = {"keys": 512.0, "tokens": 512.0, "paper": 256.0}
OTHER_LEAST_GAIN = 1024.0
"""How many tokens fewer each token must attend to: by method on CPUs, and on other devices. See `pays`."""

LEAST_SIZE = 2**15
"""Tokens times channels under which the hooks' own time is not small against the attention's."""


def pairs_left(ratio: float, method: str) -> float:
    """The share of query-key pairs that attention still computes."""
    return 1 - ratio if method == "keys" else (1 - ratio) ** 2


def pays(tokens: int, channels: int, ratio: float, device_type: str, method: str) -> bool:
    """Whether merging `ratio` of a layer's `tokens` of `channels` saves more time than it takes.

    Attention over N tokens takes N² C operations; matching, merging and weighting take a number that grows with N C. So
    what decides is N times the share of the pairs that are saved: the tokens that each token need not attend to. From
    `LEAST_GAIN` on no layer was slower merged on two CPU cores with SDP attention (`docs/speed.md`). A slower attention
    pays earlier, but which one runs isn't asked. The threshold of other devices is an estimate: their attention is
    faster, and starting a kernel costs them more.
    """
    gain = tokens * (1 - pairs_left(ratio, method))
    least_gain = LEAST_GAIN[method] if device_type == "cpu" else OTHER_LEAST_GAIN
    return gain >= least_gain and tokens * channels >= LEAST_SIZE


def tokens_removed(tokens: int, ratio: float, rounded: bool = False) -> int:
    """How many of `tokens` a ratio removes: rounded down, as `tomesd` counts them.

    `rounded` takes the number left to the nearest multiple of 16 where that changes it by 3 % at most: plain attention
    was measured up to 20 % slower over lengths that 8 doesn't divide.
    """
    removed = int(tokens * ratio)
    count = tokens - removed
    if not rounded or not removed or count < 256:
        return removed
    return tokens - min((count + 8) // 16 * 16, tokens)


def coarsest_level(settings: MergeSettings, layers: Sequence[Layer]) -> int:
    """The level up to which layers merge: max downsample, or, in a UNet that has no attention there, its finest."""
    return max(settings.max_downsample, finest_level(layers) or 1)


def check_layer(settings: MergeSettings, level: int | None, tokens: int, coarsest: int) -> None:
    """Raises `NotMerged` where a layer of this level and token count never merges."""
    if level is not None and level > coarsest:
        raise NotMerged(f"level {level} is above max downsample {settings.max_downsample}")
    if tokens < settings.min_tokens:
        raise NotMerged(f"{tokens} tokens are under min tokens {settings.min_tokens}")


def tokens_to_remove(settings: MergeSettings, tokens: int, channels: int, ratio: float, device_type: str) -> int:
    """How many of a layer's tokens a ratio removes. Raises `NotMerged` where it removes none."""
    removed = tokens_removed(tokens, ratio, rounded=not settings.exact)
    if not removed:
        raise NotMerged(f"at ratio {ratio:g} there is nothing to remove", by_ratio=True)
    if settings.skip_unprofitable and not pays(tokens, channels, ratio, device_type, settings.method):
        raise NotMerged(f"merging {ratio:g} of {tokens} tokens would not save time", by_ratio=True)
    return removed
