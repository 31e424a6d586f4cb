"""Merging during one sampling: its hooks are on the UNet only while one `p.sample` runs."""

from __future__ import annotations

import functools
import types
from collections import Counter
from typing import Any

from modules import shared
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..foreign_hooks import Hook
from ..hooks import Merging, attach
from ..merge_map import MergeMap
from ..reasons import NO_LAYERS, in_a_line, is_out_of_memory
from ..report import Report
from ..settings import MergeSettings
from . import generation, host, options
from .generation import Generation
from .log import guarded, log
from .maps import PictureRecorder, UNetInput

_running: Sampling | None = None

_too_large: dict[tuple[int, ...], str] = {}
"""Latent shapes at which merged attention raised, with the reason; these run unmerged."""


def settings_in_use() -> MergeSettings | None:
    """The settings of the running sampling, or of the last generation; None if it didn't merge."""
    return generation.last.settings if _running is None else _running.settings


def bind(p: Any, first_batch: bool = True) -> None:
    """Make the next call of `p.sample` merge, if p's generation asks for it."""
    unbind(p)
    prepared = generation.of(p)
    if prepared is None or prepared.settings is None:
        return
    # Some hosts load the model only now.
    layers = host.loaded_layers()
    # The hires checkpoint may have attention layers even if this model has none.
    if layers or (layers is not None and getattr(p, "hr_checkpoint_info", None)):
        p.sample = _MergedSample(p, prepared, first_batch)
    else:
        generation.leave_unmerged(p, "no model is loaded" if layers is None else NO_LAYERS)


def unbind(p: Any) -> None:
    """Undo `bind`, unless another extension has wrapped `p.sample` since."""
    sample = vars(p).get("sample")
    if isinstance(sample, _MergedSample):
        if sample.own is None:
            del p.sample
        else:
            p.sample = sample.own


def on_denoise(params: Any) -> None:
    """WebUI's denoiser is about to run the UNet: hook the right UNet and set the step."""
    if _running is not None:
        guarded("merging", _running.follow, _running.stop)(params)


def stop() -> None:
    """End merging for good, from any thread: the script is being unloaded."""
    if _running is not None:
        _running.stop("the UI was reloaded meanwhile")
    _too_large.clear()


class _MergedSample:
    """Stands in for `p.sample` during one call, which it merges."""

    def __init__(self, p: Any, prepared: Generation, in_log: bool) -> None:
        self._p, self._generation, self._in_log = p, prepared, in_log
        self._before = p.sample
        self.own = vars(p).get("sample")
        """The instance attribute before `bind`; None if there was none."""
        self._was_called = False
        # Without its attributes: another copy of the extension uses the same names.
        functools.update_wrapper(self, self._before, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        p = host.p_in("process_images_inner", otherwise=self._p)
        if p is not self._p:
            return self._of_copy(p)(*args, **kwargs)
        # An extension that wrapped this object may restore it after `unbind`.
        if self._was_called or generation.of(self._p) is not self._generation:
            return self._before(*args, **kwargs)
        self._was_called = True
        sampling = Sampling(self._p, self._generation)
        try:
            with sampling:
                return self._before(*args, **kwargs)
        finally:
            unbind(self._p)
            # The picture is worth more than its summary.
            guarded("the summary", self._report)(sampling)

    def _report(self, sampling: Sampling) -> None:
        """Report what was merged: in the parameters, under the picture and in the log."""
        summary = sampling.summary()
        if generation.built_in_is_on(self._p):
            summary += "; WebUI's own token merging is disabled"
        has_merged = any(report.merged_layers for report in sampling.reports)
        generation.claim(self._p, has_merged, sampling.failure)
        is_timed = has_merged and sampling.seconds is not None
        suffix = f"; sampled in {sampling.seconds:.1f} s" if is_timed else ""
        generation.last.settings = self._generation.settings
        generation.last.summary = summary + suffix
        generation.say(self._p, summary, suffix)
        if self._in_log:
            log.info(summary + suffix)
        if options.value_of(options.LOG_LAYERS):
            for report in sampling.reports:
                log.info(str(report))
        self._generation.maps, line = sampling.maps()
        if line:
            generation.say(self._p, line)

    def _of_copy(self, p: Any) -> Any:
        """The unmerged `sample` of a copy of p, which took this object along."""
        if generation.of(p) is self._generation:
            generation.erase(p)
        return self.own or types.MethodType(type(p).sample, p)


class Sampling:
    """Merging in one `p.sample`, through its first pass, hires pass and refiner.

    As a context manager it lets the denoiser's callback drive it; at the end no hook is left.
    """

    def __init__(self, p: Any, prepared: Generation) -> None:
        self.settings = prepared.settings
        self.reports: list[Report] = []
        """One report for each UNet and pass."""
        self.failure: str | None = None
        """Why merging ended before the sampling did."""
        self.seconds: float | None = None
        """Time from the first step on; None if the sampling was cut short."""
        self._p = p
        self._map_place = prepared.map_place
        self._summaries: Counter[str] = Counter()
        """The reports' summaries; a refiner may repeat one."""
        self._recorders: dict[bool, PictureRecorder] = {}
        """For the first pass (False) and the hires pass (True)."""
        self._merging: Merging | None = None
        self._unet: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._is_hires = False
        self._shape: tuple[int, ...] = ()
        self._unet_input: UNetInput = ((), {})
        self._began: float | None = None

    def __enter__(self) -> None:
        global _running
        self._outer, _running = _running, self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        global _running
        _running = self._outer
        guarded("the end of merging", self.end)(error)

    def end(self, error: BaseException | None) -> None:
        """The sampling ended, with `error` if it raised."""
        merging = self._merging
        if isinstance(error, Exception) and merging is not None and merging.has_unfinished_call:
            what = "ran out of memory" if is_out_of_memory(error) else "failed"
            self.failure = f"merged attention {what} at this size ({in_a_line(error)})"
            _too_large[self._shape] = self.failure
            log.error(f"{self.failure}; this size runs unmerged until the UI is reloaded")
        self.unhook()
        is_cut_short = shared.state.interrupted or shared.state.skipped
        if error is None and self._began is not None and not is_cut_short:
            self.seconds = host.now() - self._began

    def stop(self, reason: str) -> None:
        """Stop merging, from any thread and at any time."""
        merging, self.settings, self.failure = self._merging, None, self.failure or reason
        if merging is not None:
            merging.detach()

    def follow(self, params: Any) -> None:
        """Hook the UNet that is about to run if this sampling merges in it; unhook any other."""
        denoiser = host.denoiser_of(params)
        is_hires = bool(getattr(self._p, "is_hr_pass", False))
        # Another extension's generation may run inside this one, and a script may sample with its
        # own sampler.
        is_own = denoiser is not None and denoiser.p is self._p
        if is_own and self._began is None:
            self._began = host.now()
        unet, settings = host.loaded_unet(), self.settings  # `stop` may clear the settings.
        if settings is None or not is_own or unet is None or not merges_in(settings, is_hires):
            self.unhook()
            return
        if reason := _too_large.get(tuple(params.x.shape)):
            self.unhook()
            self._summaries[f"nothing merged: {reason}"] = 1
            return
        if not self._is_hooked(unet, is_hires):
            self.unhook()
            self._hook(unet, settings, is_hires, params.x.shape, denoiser.sampler)
        if self._merging is not None:
            schedule_steps = generation.schedule_steps(self._p, is_hires)
            self._merging.set_step(denoiser.step, host.steps_of(denoiser), schedule_steps)

    def _is_hooked(self, unet: nn.Module, is_hires: bool) -> bool:
        is_attached = self._merging is not None and self._merging.attached
        return is_attached and self._unet is unet and self._is_hires == is_hires

    def _hook(
        self, unet: nn.Module, settings: MergeSettings, is_hires: bool, shape: Any, sampler: Any
    ) -> None:
        if self._map_place and is_hires not in self._recorders:
            self._recorders[is_hires] = PictureRecorder(
                self._map_place,
                host.first_items(sampler),
                tuple(shape[-2:]),
                lambda: self._unet_input,
            )
        recorder = self._recorders.get(is_hires)
        self._merging = attach(unet, settings, host.hypertile_of, recorder, host.LEFT_BEHIND)
        self._handle = unet.register_forward_pre_hook(Hook(self._note_input), with_kwargs=True)
        self._unet, self._is_hires, self._shape = unet, is_hires, tuple(shape)

    def _note_input(self, unet: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x, options = args[0] if args else kwargs.get("x"), kwargs.get("transformer_options")
        latent = getattr(x, "shape", ())[-2:]
        self._unet_input = latent, options if isinstance(options, dict) else {}

    def unhook(self) -> None:
        """Remove every hook and drop every reference to the model; keep the report."""
        merging, (_, options) = self._merging, self._unet_input
        if merging is None or self._handle is None:
            return
        merging.detach()
        self._handle.remove()
        self._merging = self._unet = self._handle = None
        self._unet_input = (), {}
        self.failure = self.failure or merging.failure
        report = merging.report()
        line = report.summary
        if generation.has_hires_pass(self._p):
            line = f"{'hires' if self._is_hires else 'first'} pass: {line}"
        reason = None if report.merged_layers else host.reason_layers_did_not_run(options)
        self._summaries[f"{line}: {reason}" if reason else line] += 1
        self.reports.append(report)

    def summary(self) -> str:
        """What was merged, in one line."""
        parts = [
            part if times == 1 else f"{part} ({times} times)"
            for part, times in self._summaries.items()
        ]
        line = "; ".join(parts) or "nothing merged: no step reached the UNet"
        return line if self.failure is None or self.failure in line else f"{line}; {self.failure}"

    def maps(self) -> tuple[list[MergeMap], str]:
        """Each picture's merge map from the last pass that merged, and a line on it; or none."""
        for recorder in reversed(self._recorders.values()):
            if maps := recorder.maps(recorder.pictures):
                return maps, f"{maps[0]}{recorder.suffix_of(maps[0])}"
        return [], ""


def merges_in(settings: MergeSettings, is_hires: bool) -> bool:
    """Whether `apply_to` includes the first pass, or the hires pass."""
    return settings.apply_to in ("both passes", "hires pass" if is_hires else "first pass")
