"""One generation's merging: from the script's arguments to hooks that live exactly as long as its sampling."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..hooks import Merging, attach
from ..merge_map import MapRecorder, MergeMap
from ..settings import PANEL_FIELDS, MergeSettings, SettingsError
from . import maps, namesakes, options, presets
from .arguments import panel_values, read_arguments, read_map, unused_fields
from .axes import OVERRIDES
from .log import log
from .model import hypertile_of, loaded_unet, unet_is_replaced

ERROR_KEY = "ToMe error"
COMMENT = "ToMe: "

PREPARED = f"{__name__}.prepared"
"""The attribute of `p` that holds a `Prepared`. It is named after this module, so that a second copy of the extension,
whose modules have other names, has one of its own."""

_running: Sampling | None = None
_last: tuple[MergeSettings | None, str] | None = None
"""The settings of the last generation that was asked to merge, None where it couldn't, and what was said of it."""


@dataclasses.dataclass
class Prepared:
    """What was decided about a generation, and what was written on its `p`."""

    settings: MergeSettings | None = None
    """None where it doesn't merge."""
    shown: tuple[int, int] | None = None
    """Step and layer of the merge map."""
    parameters: set[str] = dataclasses.field(default_factory=set)
    comments: set[str] = dataclasses.field(default_factory=set)


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
    _forget(p)
    _decide(p, args)
    line = namesakes.warning(p, is_asked=PREPARED in vars(p))
    if line:
        _comment(p, _prepared(p), line)


def _decide(p: Any, args: Sequence[Any]) -> None:
    """Prepares p for a generation that merges, or says why it doesn't, where it was asked to."""
    global _last
    try:
        settings = _settings(p, args)
        shown = None if settings is None else read_map(args)
    except SettingsError as error:
        _write(p, {ERROR_KEY: str(error)})
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
    used = {name: value for name, value in panel_values(settings).items() if name not in unused}
    _write(p, {PANEL_FIELDS[name].infotext: value for name, value in used.items()})
    prepared = _prepared(p)
    prepared.settings, prepared.shown = settings, shown
    p.get_token_merging_ratio = _no_built_in_merging


def bind(p: Any, first_batch: bool = True) -> None:
    """Binds merging to the coming `p.sample`, whichever way it ends: done, failed, interrupted or skipped."""
    _unwrap(p)
    prepared = vars(p).get(PREPARED)
    if prepared is not None and prepared.settings is not None:
        p.sample = _MergedSample(p, prepared, first_batch)


class _MergedSample:
    """What stands in the place of `p.sample` until it was called once: the same, merged."""

    def __init__(self, p: Any, prepared: Prepared, in_log: bool) -> None:
        self._p, self._prepared, self._in_log = p, prepared, in_log
        self._before = p.sample
        self.own = vars(p).get("sample")
        """What stood on the instance before; None where that was nothing."""
        self._spent = False
        # Without its attributes: another copy of the extension has some of the same names.
        functools.update_wrapper(self, self._before, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sampled = _sampled(self._p)
        if sampled is not self._p:
            return self._of_copy(sampled)(*args, **kwargs)
        if self._spent:
            # Another extension wrapped this one in the meantime, and put it back after it had been taken off.
            return self._before(*args, **kwargs)
        self._spent = True
        p, prepared = self._p, self._prepared
        sampling = Sampling(p, prepared)
        try:
            with sampling:
                samples = self._before(*args, **kwargs)
        finally:
            _unwrap(p)
            sampling.tell(self._in_log)
        if prepared.shown is not None:
            found, line = sampling.maps()
            maps.keep(p, found)
            if found:
                _comment(p, prepared, line)
        return samples

    def _of_copy(self, p: Any) -> Any:
        """The `sample` of a copy of our p that took this one along, as it is without us."""
        if vars(p).get(PREPARED) is self._prepared:
            _erase(p)
        return self.own or types.MethodType(type(p).sample, p)


def _sampled(p: Any) -> Any:
    """The `p` that WebUI is sampling, or this one where WebUI doesn't do it.

    A `sample` on an instance isn't told whose it is called as, and `copy(p)` takes it along: other extensions make
    pictures of their own from such copies. Only the function that calls it knows.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "process_images_inner":
        frame = frame.f_back
    return p if frame is None else frame.f_locals.get("p", p)


def _forget(p: Any) -> None:
    """Takes what an earlier generation left off p, which loops use again and plots copy."""
    _unwrap(p)
    maps.forget(p)
    if vars(p).get("get_token_merging_ratio") is _no_built_in_merging:
        del p.get_token_merging_ratio
    _erase(p)


def _erase(p: Any) -> None:
    """Takes what was written for a picture out of p's parameters and comments, not out of a p's that it shares with."""
    prepared = vars(p).pop(PREPARED, None)
    if prepared is not None:
        parameters, comments = p.extra_generation_params, p.comments
        p.extra_generation_params = {key: parameters[key] for key in parameters if key not in prepared.parameters}
        p.comments = {line: comments[line] for line in comments if line not in prepared.comments}


def _prepared(p: Any) -> Prepared:
    """What is written on p; from then on it has parameters and comments of its own, since copies of p share them."""
    if PREPARED not in vars(p):
        setattr(p, PREPARED, Prepared())
        p.extra_generation_params, p.comments = dict(p.extra_generation_params), dict(p.comments)
    return getattr(p, PREPARED)


def _write(p: Any, parameters: dict[str, Any]) -> None:
    _prepared(p).parameters.update(parameters)
    p.extra_generation_params.update(parameters)


def _comment(p: Any, prepared: Prepared, line: str) -> None:
    prepared.comments.add(COMMENT + line)
    p.comment(COMMENT + line)


def _unwrap(p: Any) -> None:
    """Takes our wrapper off `p.sample`, if it is the outermost one, and puts back what was there."""
    sample = vars(p).get("sample")
    if isinstance(sample, _MergedSample):
        if sample.own is None:
            del p.sample
        else:
            p.sample = sample.own


def _settings(p: Any, args: Sequence[Any]) -> MergeSettings | None:
    return read_arguments(args, getattr(p, OVERRIDES, None), presets.get)


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

    def __init__(self, p: Any, prepared: Prepared) -> None:
        self.settings = prepared.settings
        self._p = p
        self._prepared = prepared
        self._recorded: dict[bool, tuple[MapRecorder, list[int]]] = {}
        """For the first (False) and the hires pass: its maps, and where its pictures are in the batch."""
        self._latents: dict[bool, tuple[int, int]] = {}
        """The size of each pass's latent, rows and columns."""
        self._levels: dict[str, int | None] = {}
        """The level of each layer, as it was in the last call."""
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
        is_ours = params.denoiser is denoiser if hasattr(params, "denoiser") else _sampled(self._p) is self._p
        if self.settings is None or not is_ours or not _merges_in(self.settings, is_hires):
            self.stop()
            return
        unet = loaded_unet()
        if self._merging is None or not self._merging.attached or self._unet is not unet or self._is_hires != is_hires:
            self.stop()
            recorder = self._recorder(sampler, is_hires) if self._prepared.shown else None
            self._latents[is_hires] = tuple(params.x.shape[-2:])
            self._merging = attach(unet, self.settings, hypertile_of, recorder)
            self._unet, self._is_hires = unet, is_hires
        # Samplers that run the model twice a step run it once in the last; WebUI's total counts that one twice too.
        options_of_sampler = getattr(getattr(sampler, "config", None), "options", None) or {}
        twice_a_step = bool(options_of_sampler.get("second_order"))
        self._merging.set_step(denoiser.step, denoiser.total_steps - twice_a_step)

    def maps(self) -> tuple[list[MergeMap], str]:
        """The merge map of each picture, from the last pass that merged, and in a line what they are; or none.

        Another extension may let the UNet see the latent in tiles, of which the recorded call is one.
        """
        for is_hires, (recorder, rows) in sorted(self._recorded.items(), reverse=True):
            found = recorder.maps(rows)
            if found:
                level = self._levels.get(found[0].layer_name)
                sides = zip(found[0].grid, self._latents[is_hires], strict=True)
                is_tile = level is not None and any(tokens * level < whole for tokens, whole in sides)
                return found, f"{found[0]}{', of one tile' if is_tile else ''}"
        return [], ""

    def _recorder(self, sampler: Any, is_hires: bool) -> MapRecorder:
        """The pass's recorder, which a refiner goes on with."""
        if is_hires not in self._recorded:
            rows = maps.first_rows(sampler.sampler_extra_args["cond"])
            self._recorded[is_hires] = MapRecorder(*self._prepared.shown), rows
        return self._recorded[is_hires][0]

    def stop(self) -> None:
        """Leaves nothing on the model, and keeps no reference to it."""
        if self._merging is not None:
            report = self._merging.report()
            self._levels |= {layer.name: layer.level for layer in report.layers}
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
        _comment(self._p, self._prepared, summary)
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
    _comment(p, _prepared(p), line)
    log.warning(line)
