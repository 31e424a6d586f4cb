"""One generation's merging: from the script's arguments to hooks that live exactly as long as its sampling."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..hooks import Merging, attach
from ..merge_map import MapRecorder, MergeMap
from ..settings import PANEL_FIELDS, MergeSettings, SettingsError
from . import maps, options, store
from .arguments import panel_values, read_arguments, read_map, unused_fields
from .axes import OVERRIDES
from .log import log
from .model import hypertile_of, loaded_unet, unet_is_replaced

ERROR_KEY = "ToMe error"
COMMENT = "ToMe: "

_running: Sampling | None = None
_last: tuple[MergeSettings | None, str] | None = None
"""The settings of the last generation that was asked to merge, None where it couldn't, and what was said of it."""


def settings_in_use() -> MergeSettings | None:
    """The settings of the sampling that is running, or of the last generation. None where that didn't merge."""
    if _running is not None:
        return _running.settings
    return _last[0] if _last else None


def last_summary() -> str | None:
    """What the last generation merged, in one line; None where it wasn't asked to."""
    return _last[1] if _last else None


def prepare(p: Any, args: Sequence[Any]) -> None:
    """Before WebUI applies its own token merging: writes what was set to the picture's parameters.

    A wrong value switches merging off for this generation, and says so there, under the picture and in the log.
    """
    global _last
    _forget(p)
    try:
        settings = _settings(p, args)
        if settings is not None:
            read_map(args)
    except SettingsError as error:
        p.extra_generation_params[ERROR_KEY] = str(error)
        _say(p, f"nothing merged: {error}")
        return
    if settings is None:
        _last = None
        return
    if not _has_pass(p, settings):
        where = "a picture without hires fix" if hasattr(p, "enable_hr") else "img2img"
        _say(p, f"nothing merged: apply to is {settings.apply_to!r}, and {where} has none")
        return
    if _built_in_is_on(p) and not options.option(options.OVERRULE_BUILT_IN, True):
        _say(p, "nothing merged: WebUI's own token merging is on, and the settings say not to overrule it")
        return
    unused = unused_fields(settings, has_hires_pass=bool(getattr(p, "enable_hr", False)))
    for name, value in panel_values(settings).items():
        if name not in unused:
            p.extra_generation_params[PANEL_FIELDS[name].infotext] = value
    p.get_token_merging_ratio = _no_built_in_merging


def bind(p: Any, args: Sequence[Any], first_batch: bool = True) -> None:
    """Binds merging to the coming `p.sample`, whichever way it ends: done, failed, interrupted or skipped."""
    _unwrap(p)
    if vars(p).get("get_token_merging_ratio") is not _no_built_in_merging:
        # `prepare` said that this generation doesn't merge, and why.
        return
    settings = _settings(p, args)
    if settings is None:
        return
    shown = read_map(args)
    before, own = p.sample, vars(p).get("sample")
    spent = False

    @functools.wraps(before)
    def sample(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        if spent:
            # Whoever wrapped this one in the meantime put it back.
            return before(*args, **kwargs)
        spent = True
        sampling = Sampling(p, settings, shown)
        try:
            with sampling:
                samples = before(*args, **kwargs)
        finally:
            _unwrap(p)
            sampling.tell(in_log=first_batch)
        if shown is not None:
            found = sampling.maps()
            maps.keep(p, found)
            for merge_map in found[:1]:
                p.comment(COMMENT + str(merge_map))
        return samples

    sample.tome_wraps = own  # type: ignore[attr-defined]
    p.sample = sample


def _forget(p: Any) -> None:
    """Takes what an earlier generation left off p: plot cells share its dicts with it, and loops reuse it."""
    _unwrap(p)
    maps.forget(p)
    if vars(p).get("get_token_merging_ratio") is _no_built_in_merging:
        del p.get_token_merging_ratio
    for key in (ERROR_KEY, *(setting.infotext for setting in PANEL_FIELDS.values())):
        p.extra_generation_params.pop(key, None)
    for line in [line for line in p.comments if line.startswith(COMMENT)]:
        del p.comments[line]


def _unwrap(p: Any) -> None:
    """Takes our wrapper off `p.sample`, if it is the outermost one, and puts back what was there."""
    sample = vars(p).get("sample")
    if hasattr(sample, "tome_wraps"):
        if sample.tome_wraps is None:
            del p.sample
        else:
            p.sample = sample.tome_wraps


def _settings(p: Any, args: Sequence[Any]) -> MergeSettings | None:
    return read_arguments(args, getattr(p, OVERRIDES, None), store.preset_settings)


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

    def __init__(self, p: Any, settings: MergeSettings, shown: tuple[int, int] | None = None) -> None:
        self.settings: MergeSettings | None = settings
        self._p = p
        self._shown = shown
        """Step and layer of the merge map."""
        self._recorded: dict[bool, tuple[MapRecorder, list[int]]] = {}
        """For the first (False) and the hires pass: its maps, and where its pictures are in the batch."""
        self._merging: Merging | None = None
        self._unet: nn.Module | None = None
        self._is_hires = False
        self._summaries: Counter[str] = Counter()
        """Of each part of the sampling between two changes of the UNet; a refiner may merge as the model before it."""
        self._outer: Sampling | None = None

    def __enter__(self) -> Sampling:
        global _running
        self._outer, _running = _running, self
        return self

    def __exit__(self, *exc: object) -> None:
        global _running
        _running = self._outer
        self.stop()

    def follow(self, params: Any) -> None:
        """Hooks the UNet that is about to run, if it is this sampling's and its pass merges; unhooks any other."""
        sampler = self._p.sampler
        denoiser = sampler.model_wrap_cfg
        is_hires = bool(getattr(self._p, "is_hr_pass", False))
        # Another extension's generation may run inside this one. WebUI before 1.8 doesn't say whose the call is.
        is_ours = getattr(params, "denoiser", denoiser) is denoiser
        if self.settings is None or not is_ours or not _merges_in(self.settings, is_hires):
            self.stop()
            return
        unet = loaded_unet()
        if self._merging is None or not self._merging.attached or self._unet is not unet or self._is_hires != is_hires:
            self.stop()
            recorder = self._recorder(sampler, is_hires) if self._shown else None
            self._merging = attach(unet, self.settings, hypertile_of, recorder)
            self._unet, self._is_hires = unet, is_hires
        # Samplers that run the model twice a step run it once in the last; WebUI's total counts that one twice too.
        options_of_sampler = getattr(getattr(sampler, "config", None), "options", None) or {}
        twice_a_step = bool(options_of_sampler.get("second_order"))
        self._merging.set_step(denoiser.step, denoiser.total_steps - twice_a_step)

    def maps(self) -> list[MergeMap]:
        """The merge map of each picture, from the last pass that merged; none where none did."""
        passes = [recorder.maps(rows) for _, (recorder, rows) in sorted(self._recorded.items(), reverse=True)]
        return next((found for found in passes if found), [])

    def _recorder(self, sampler: Any, is_hires: bool) -> MapRecorder:
        """The pass's recorder, which a refiner goes on with."""
        if is_hires not in self._recorded:
            rows = maps.first_rows(sampler.sampler_extra_args["cond"])
            self._recorded[is_hires] = MapRecorder(*self._shown), rows
        return self._recorded[is_hires][0]

    def stop(self) -> None:
        """Leaves nothing on the model, and keeps no reference to it."""
        if self._merging is not None:
            report = self._merging.report()
            has_two = bool(getattr(self._p, "enable_hr", False))
            where = f"{'hires' if self._is_hires else 'first'} pass: " if has_two else ""
            why = ": the UNet was replaced" if not report.merged_layers and unet_is_replaced() else ""
            self._summaries[where + report.summary + why] += 1
            if options.option(options.LOG_LAYERS, False):
                log.info(str(report))
            self._merging.detach()
        self._merging = self._unet = None

    def tell(self, in_log: bool) -> None:
        """Says what was merged, under the picture and, once a generation, in the log."""
        global _last
        parts = [part if times == 1 else f"{part} ({times} times)" for part, times in self._summaries.items()]
        summary = "; ".join(parts) or "nothing merged: no step reached the UNet"
        if _built_in_is_on(self._p):
            summary += "; WebUI's own token merging is left out"
        if self.settings is not None:
            _last = self.settings, summary
        self._p.comment(COMMENT + summary)
        if in_log:
            log.info(summary)


def _no_built_in_merging(for_hr: bool = False) -> float:
    """In place of `p.get_token_merging_ratio`: never merge twice."""
    return 0


def _built_in_is_on(p: Any) -> bool:
    """Whether WebUI's own token merging would be on, whatever stands in the place of p's method."""
    ratio = type(p).get_token_merging_ratio
    return bool(ratio(p) or (getattr(p, "enable_hr", False) and ratio(p, for_hr=True)))


def _has_pass(p: Any, settings: MergeSettings) -> bool:
    return settings.apply_to != "hires pass" or bool(getattr(p, "enable_hr", False))


def _merges_in(settings: MergeSettings, is_hires: bool) -> bool:
    return settings.apply_to in ("both passes", "hires pass" if is_hires else "first pass")


def _say(p: Any, line: str) -> None:
    global _last
    _last = None, line
    p.comment(COMMENT + line)
    log.warning(line)
