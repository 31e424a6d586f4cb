"""One generation's merging: from the script's arguments to hooks that live exactly as long as its sampling."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from modules import sd_models
from torch import nn

from ..hooks import Merging, attach
from ..settings import MergeSettings, SettingsError
from .arguments import PANEL_FIELDS, effective_fields, read_arguments
from .log import log

ERROR_KEY = "ToMe error"
BUILT_IN_RATIO = "get_token_merging_ratio"

_running: Sampling | None = None


def prepare(p: Any, args: Sequence[Any]) -> None:
    """Before WebUI applies its own token merging: writes what was set to the picture's parameters.

    A wrong value switches merging off for this generation, and says so there, under the picture and in the log.
    """
    # Plot cells and loops share these dicts, or reuse p: what an earlier one left doesn't belong here.
    for key in [ERROR_KEY, *(setting.infotext for setting in PANEL_FIELDS.values())]:
        p.extra_generation_params.pop(key, None)
    if getattr(vars(p).get(BUILT_IN_RATIO), "is_tome", False):
        delattr(p, BUILT_IN_RATIO)

    try:
        settings = read_arguments(args)
    except SettingsError as error:
        p.extra_generation_params[ERROR_KEY] = str(error)
        _say(p, f"nothing merged: {error}")
        return
    if settings is None:
        return
    if not _has_pass(p, settings):
        where = "img2img" if not hasattr(p, "enable_hr") else "a picture without hires fix"
        _say(p, f"nothing merged: apply to is {settings.apply_to!r}, and {where} has none")
        return
    fields = effective_fields(settings, has_hires_pass=bool(getattr(p, "enable_hr", False)))
    p.extra_generation_params.update({PANEL_FIELDS[name].infotext: value for name, value in fields.items()})
    if p.get_token_merging_ratio() or p.get_token_merging_ratio(for_hr=True):
        _say(p, "WebUI's own token merging is left out of this generation")
    p.get_token_merging_ratio = _no_built_in_merging


def bind(p: Any, args: Sequence[Any], first_batch: bool = True) -> None:
    """Binds merging to the coming `p.sample`, whichever way it ends: done, failed, interrupted or skipped."""
    try:
        settings = read_arguments(args)
    except SettingsError:
        return
    if settings is None or not _has_pass(p, settings):
        return
    before, own = p.sample, vars(p).get("sample")
    spent = False

    @functools.wraps(before)
    def sample(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        if spent:
            return before(*args, **kwargs)
        spent = True
        with Sampling(p, settings) as sampling:
            try:
                return before(*args, **kwargs)
            finally:
                # Whoever wrapped this one in the meantime still calls it: leave theirs, and be spent.
                if vars(p).get("sample") is sample:
                    if own is None:
                        del p.sample
                    else:
                        p.sample = own
                sampling.stop()
                p.comment(f"ToMe: {sampling.summary}")
                if first_batch:
                    log.info(sampling.summary)

    p.sample = sample


def on_denoise(params: Any) -> None:
    """WebUI's denoiser is about to run the UNet: see that the right one is hooked, and knows its step."""
    if _running is not None:
        _running.follow(params)


def stop() -> None:
    """Takes merging off whatever it is on, for good: the script is being unloaded."""
    if _running is not None:
        _running.settings = None
        _running.stop()


class Sampling:
    """The merging of one `p.sample`: first pass, hires pass, refiner and all."""

    def __init__(self, p: Any, settings: MergeSettings) -> None:
        self.settings: MergeSettings | None = settings
        self._p = p
        self._merging: Merging | None = None
        self._unet: nn.Module | None = None
        self._is_hires = False
        self._summaries: dict[str, None] = {}
        self._outer: Sampling | None = None

    def __enter__(self) -> Sampling:
        global _running
        self._outer, _running = _running, self
        return self

    def __exit__(self, *exc: object) -> None:
        global _running
        _running = self._outer
        self.stop()

    @property
    def summary(self) -> str:
        """What was merged, in one line."""
        return "; ".join(self._summaries) or "nothing merged: no step reached the UNet"

    def follow(self, params: Any) -> None:
        """Hooks the UNet that is about to run, if it is this sampling's and its pass merges; unhooks any other."""
        denoiser = self._p.sampler.model_wrap_cfg
        is_hires = bool(getattr(self._p, "is_hr_pass", False))
        # Another extension's generation may run inside this one. WebUI before 1.8 doesn't say whose the call is.
        is_ours = getattr(params, "denoiser", denoiser) is denoiser
        if self.settings is None or not is_ours or not _merges_in(self.settings, is_hires):
            self.stop()
            return
        unet = sd_models.model_data.sd_model.model.diffusion_model
        if self._merging is None or not self._merging.attached or self._unet is not unet or self._is_hires != is_hires:
            self.stop()
            self._merging, self._unet, self._is_hires = attach(unet, self.settings), unet, is_hires
        self._merging.set_step(denoiser.step, denoiser.total_steps)

    def stop(self) -> None:
        """Leaves nothing on the model, and keeps no reference to it."""
        if self._merging is not None:
            summary = self._merging.report().summary
            has_two = bool(getattr(self._p, "enable_hr", False))
            self._summaries[f"{'hires' if self._is_hires else 'first'} pass: {summary}" if has_two else summary] = None
            self._merging.detach()
        self._merging = self._unet = None


def _no_built_in_merging(for_hr: bool = False) -> float:
    """In place of `p.get_token_merging_ratio`: never merge twice."""
    return 0


_no_built_in_merging.is_tome = True  # type: ignore[attr-defined]


def _has_pass(p: Any, settings: MergeSettings) -> bool:
    return settings.apply_to != "hires pass" or bool(getattr(p, "enable_hr", False))


def _merges_in(settings: MergeSettings, is_hires: bool) -> bool:
    return settings.apply_to in ("both passes", "hires pass" if is_hires else "first pass")


def _say(p: Any, line: str) -> None:
    p.comment(f"ToMe: {line}")
    log.warning(line)
