"""How long sampling takes, from its first step on, and how many times faster that was than the same unmerged."""

from __future__ import annotations

import time
import weakref
from pathlib import Path
from typing import Any

import torch
from modules import devices, shared

from . import generation, host
from .log import harmless

ALIKE = (
    *("sd_model_name", "width", "height", "batch_size", "sampler_name", "scheduler", "steps", "cfg_scale"),
    *("enable_hr", "hr_scale", "hr_upscale_to_x", "hr_upscale_to_y", "hr_second_pass_steps", "hr_sampler_name"),
    *("hr_checkpoint_name", "denoising_strength", "refiner_checkpoint", "refiner_switch_at"),
)
"""The fields of `p` that two batches share whose times are compared, beside the options and what `_others` gives."""

_fastest: dict[tuple[Any, ...], float] = {}
"""Seconds of the fastest unmerged batch by its kind: a model's first one is slow."""
_armed: Any = None
"""A weak reference to the `p` whose sampling is about to begin."""
_clock: tuple[Any, tuple[Any, ...], float] | None = None
"""A weak reference to the `p` that is sampled, its kind, and when its first step began."""


def now() -> float:
    """Seconds on a clock, once the device has done what it was given."""
    synchronize = getattr(getattr(torch, devices.device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize()
    return time.perf_counter()


def arm(p: Any) -> None:
    """Lets the clock start at the first step of p's coming batch."""
    global _armed, _clock
    _armed, _clock = weakref.ref(p), None


def begin() -> None:
    """A step is about to run."""
    global _armed
    armed, _armed = _armed, None
    if armed is not None:
        harmless("timing", _start)(armed)


def _start(armed: Any) -> None:
    global _clock
    if (p := armed()) is not None:
        alike = (getattr(p, name, None) for name in ALIKE)
        own = type(p).__name__, getattr(p, "firstpass_image", None) is None
        # Texts of any length: an image may be among what others are given.
        kind = (*own, *alike, hash(repr(shared.opts.data)), hash(repr(_others(p))))
        _clock = armed, kind, time.perf_counter()


def _others(p: Any) -> list[Any]:
    """What other extensions' scripts are asked for; what the host's own are asked for stands on `p` too."""
    return [
        p.script_args[script.args_from : script.args_to]
        for script in getattr(p.scripts, "alwayson_scripts", ())
        if not getattr(script, "setup_for_ui_only", False)
        and Path(str(script.filename)).resolve() != host.EXTENSION / "scripts" / "tome.py"
    ]


def note_unmerged(p: Any) -> None:
    """The sampling of p has ended, and nothing but ours, which has told it, could have merged in it."""
    if (measurement := _stopped(p)) and not generation.built_in_is_on(p):
        kind, seconds = measurement
        _fastest[kind] = min(seconds, _fastest.get(kind, seconds))


def told(p: Any) -> str:
    """What to add to the summary of p's merged sampling, which has ended; nothing where it was cut short."""
    measurement = _stopped(p)
    if measurement is None:
        return ""
    kind, seconds = measurement
    if kind not in _fastest:
        return f"; sampled in {seconds:.1f} s"
    times = _fastest[kind] / seconds
    return f"; sampled in {seconds:.1f} s, {f'{times:.2f} times' if times > 1 else 'no'} faster than unmerged"


def _stopped(p: Any) -> tuple[tuple[Any, ...], float] | None:
    """The kind of p's sampling and its seconds; None where another's is timed, or where it was cut short."""
    global _clock
    clock, _clock = _clock, None
    if clock is None or clock[0]() is not p or shared.state.interrupted or shared.state.skipped:
        return None
    return clock[1], now() - clock[2]
