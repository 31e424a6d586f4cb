"""The merging of one sampling: hooks that are on the UNet exactly as long as one `p.sample` runs."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modules import shared
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..foreign_hooks import Hook
from ..hooks import Merging, attach
from ..merge_map import MapRecorder, MergeMap
from ..reasons import in_a_line, is_out_of_memory
from ..report import Report
from ..settings import MergeSettings
from ..token_map import TokenMap
from . import generation, host, options
from .clock import now
from .generation import Generation
from .log import guarded, log

UNetInput = tuple[Sequence[int], Mapping[str, Any]]
"""What a call of the UNet is given: the latent's rows and columns, and in Forge
`transformer_options`."""

_running: Sampling | None = None

_too_large: dict[tuple[int, ...], str] = {}
"""Shapes of latents at which a merged call of attention raised, with the reason: the next pictures
run unmerged."""


def settings_in_use() -> MergeSettings | None:
    """The settings of the sampling that is running, or of the last generation. None where that
    didn't merge."""
    return generation.last.settings if _running is None else _running.settings


def bind(p: Any, first_batch: bool = True) -> None:
    """Binds merging to the coming `p.sample`, whichever way it ends: done, failed, interrupted or
    skipped."""
    _unwrap(p)
    prepared = generation.of(p)
    if prepared is None or prepared.settings is None:
        return
    # Not every host has loaded the model earlier than this.
    layers = host.loaded_layers()
    # The hires checkpoint may have attention layers even if this model has none.
    if layers or (layers is not None and getattr(p, "hr_checkpoint_info", None)):
        p.sample = _MergedSample(p, prepared, first_batch)
    else:
        no_layers = "this model has no self-attention layers that can be merged"
        generation.leave_unmerged(p, "no model is loaded" if layers is None else no_layers)


def on_denoise(params: Any) -> None:
    """WebUI's denoiser is about to run the UNet: sees that the right one is hooked, and knows its
    step."""
    if _running is not None:
        guarded("merging", _running.follow, _running.stop)(params)


def stop() -> None:
    """Takes merging off whatever it is on, for good: the script is being unloaded, from whichever
    thread."""
    if _running is not None:
        _running.stop("the UI was reloaded meanwhile")
    _too_large.clear()


class _MergedSample:
    """The stand-in for `p.sample` until it was called once: the same, merged."""

    def __init__(self, p: Any, prepared: Generation, in_log: bool) -> None:
        self._p, self._generation, self._in_log = p, prepared, in_log
        self._before = p.sample
        self.own = vars(p).get("sample")
        """What stood on the instance before; None where there was nothing."""
        self._was_called = False
        # Without its attributes: another copy of the extension has some of the same names.
        functools.update_wrapper(self, self._before, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        p = host.p_in("process_images_inner", otherwise=self._p)
        if p is not self._p:
            return self._of_copy(p)(*args, **kwargs)
        # Another extension may have wrapped this one, and may put it back after it was taken off.
        if self._was_called or generation.of(self._p) is not self._generation:
            return self._before(*args, **kwargs)
        self._was_called = True
        sampling = Sampling(self._p, self._generation)
        try:
            with sampling:
                samples = self._before(*args, **kwargs)
        finally:
            _unwrap(self._p)
            # The picture is worth more than its summary.
            guarded("the summary", self._report)(sampling)
        return samples

    def _report(self, sampling: Sampling) -> None:
        """Reports what was merged: in the parameters, under the picture, and once a generation in
        the log."""
        summary = sampling.summary()
        if generation.built_in_is_on(self._p):
            summary += "; WebUI's own token merging is left out"
        has_merged = any(report.merged_layers for report in sampling.reports)
        generation.claim(self._p, has_merged, sampling.failure)
        suffix = (
            f"; sampled in {sampling.seconds:.1f} s"
            if has_merged and sampling.seconds is not None
            else ""
        )
        generation.last.settings, generation.last.summary = (
            self._generation.settings,
            summary + suffix,
        )
        generation.say(self._p, summary, suffix)
        if self._in_log:
            log.info(summary + suffix)
        if options.option(options.LOG_LAYERS):
            for report in sampling.reports:
                log.info(str(report))
        self._generation.maps, line = sampling.maps()
        if line:
            generation.say(self._p, line)

    def _of_copy(self, p: Any) -> Any:
        """The `sample` of a copy of our p that took this one along, as it is without us."""
        if generation.of(p) is self._generation:
            generation.erase(p)
        return self.own or types.MethodType(type(p).sample, p)


def _unwrap(p: Any) -> None:
    """Takes our wrapper off `p.sample`, if it is the outermost one, and puts back what was there."""
    sample = vars(p).get("sample")
    if isinstance(sample, _MergedSample):
        if sample.own is None:
            del p.sample
        else:
            p.sample = sample.own


class Sampling:
    """The merging of one `p.sample`: first pass, hires pass, refiner and all. A context manager."""

    def __init__(self, p: Any, prepared: Generation) -> None:
        self.settings = prepared.settings
        self.reports: list[Report] = []
        """Of each part of the sampling between two changes of the UNet or the pass."""
        self.failure: str | None = None
        """Why merging ended before the sampling did."""
        self.seconds: float | None = None
        """How long sampling took, from its first step on; None where it was cut short."""
        self._p = p
        self._map_place = prepared.map_place
        self._summaries: Counter[str] = Counter()
        """Of the same parts: a refiner may merge as the model before it."""
        self._recorders: dict[bool, PictureRecorder] = {}
        """For the first (False) and the hires pass."""
        self._merging: Merging | None = None
        self._unet: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._is_hires = False
        self._shape: tuple[int, ...] = ()
        self._unet_input: UNetInput = ((), {})
        self._outer: Sampling | None = None
        self._began: float | None = None

    def __enter__(self) -> Sampling:
        global _running
        self._outer, _running = _running, self
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        global _running
        _running = self._outer
        guarded("the end of merging", self._end)(error)

    def _end(self, error: BaseException | None) -> None:
        if (
            isinstance(error, Exception)
            and self._merging is not None
            and self._merging.has_unfinished_call
        ):
            lack = "ran out of memory" if is_out_of_memory(error) else "failed"
            self.failure = f"merged attention {lack} at this size ({in_a_line(error)})"
            _too_large[self._shape] = self.failure
            log.error(
                f"{self.failure}; pictures of this size are made without merging until the UI is reloaded"
            )
        self.unhook()
        if (
            error is None
            and self._began is not None
            and not (shared.state.interrupted or shared.state.skipped)
        ):
            self.seconds = now() - self._began

    def stop(self, reason: str) -> None:
        """Merges nothing any more, whatever runs and in whichever thread this is called."""
        merging, self.settings, self.failure = self._merging, None, self.failure or reason
        if merging is not None:
            merging.detach()

    def follow(self, params: Any) -> None:
        """Hooks the UNet that is about to run, if it is this sampling's and its pass merges;
        unhooks any other."""
        denoiser = host.denoiser_of(params)
        is_hires = bool(getattr(self._p, "is_hr_pass", False))
        # Another extension's generation may run inside this one; a script may sample ours with a
        # sampler of its own.
        is_ours = denoiser is not None and denoiser.p is self._p
        if is_ours and self._began is None:
            self._began = now()
        unet, settings = host.loaded_unet(), self.settings  # `stop` may take them meanwhile.
        if settings is None or not is_ours or unet is None or not merges_in(settings, is_hires):
            self.unhook()
            return
        if reason := _too_large.get(tuple(params.x.shape)):
            self.unhook()
            self._summaries[f"nothing merged: {reason}"] = 1
            return
        if (
            self._merging is None
            or not self._merging.attached
            or self._unet is not unet
            or self._is_hires != is_hires
        ):
            self.unhook()
            self._hook(unet, settings, is_hires, params.x.shape, denoiser.sampler)
        # Samplers that run the model twice a step run it once in the last; WebUI's total counts
        # that one twice too.
        options_of_sampler = (
            getattr(getattr(denoiser.sampler, "config", None), "options", None) or {}
        )
        twice_a_step = bool(options_of_sampler.get("second_order"))
        if self._merging is not None:
            total = denoiser.total_steps - twice_a_step
            self._merging.set_step(
                denoiser.step, total, generation.schedule_steps(self._p, is_hires)
            )

    def _hook(
        self, unet: nn.Module, settings: MergeSettings, is_hires: bool, shape: Any, sampler: Any
    ) -> None:
        if self._map_place and is_hires not in self._recorders:
            first_items = host.first_items(sampler.sampler_extra_args["cond"])
            self._recorders[is_hires] = PictureRecorder(
                self._map_place, first_items, tuple(shape[-2:]), lambda: self._unet_input
            )
        self._merging = attach(
            unet, settings, host.hypertile_of, self._recorders.get(is_hires), host.LEFT_BEHIND
        )
        self._handle = unet.register_forward_pre_hook(Hook(self._note_input), with_kwargs=True)
        self._unet, self._is_hires, self._shape = unet, is_hires, tuple(shape)

    def _note_input(self, unet: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x, options = args[0] if args else kwargs.get("x"), kwargs.get("transformer_options")
        self._unet_input = (
            getattr(x, "shape", ())[-2:],
            options if isinstance(options, dict) else {},
        )

    def unhook(self) -> None:
        """Leaves nothing on the model, and keeps no reference to it."""
        merging, (_, options) = self._merging, self._unet_input
        if merging is None or self._handle is None:
            return
        merging.detach()
        self._handle.remove()
        self._merging = self._unet = self._handle = None
        self._unet_input = (), {}
        self.failure = self.failure or merging.failure
        report = merging.report()
        where = (
            f"{'hires' if self._is_hires else 'first'} pass: "
            if generation.has_hires_pass(self._p)
            else ""
        )
        why = None if report.merged_layers else host.why_layers_did_not_run(options)
        self._summaries[f"{where}{report.summary}{f': {why}' if why else ''}"] += 1
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
        """The merge map of each picture, from the last pass that merged, and in a line what they
        are; or none."""
        for recorder in reversed(self._recorders.values()):
            if maps := recorder.maps(recorder.pictures):
                return maps, f"{maps[0]}{recorder.what_of(maps[0])}"
        return [], ""


class PictureRecorder(MapRecorder):
    """Keeps what one pass merged in each picture's prompted half; a refiner goes on with it."""

    def __init__(
        self,
        place: tuple[int, int],
        first_items: list[int],
        latent: Sequence[int],
        unet_input: Callable[[], UNetInput],
    ) -> None:
        """`latent` is the whole pictures' (rows, columns); `unet_input` gives that of the UNet's
        running call."""
        super().__init__(*place)
        self._first_items, self._latent, self._unet_input = first_items, latent, unet_input
        self.pictures = first_items
        """Where the pictures are among the items that are kept."""
        self._of_tiles: set[tuple[str, tuple[int, int]]] = set()

    def __call__(
        self, layer_name: str, step: int, grid: tuple[int, int], token_map: TokenMap
    ) -> None:
        latent, options = self._unet_input()
        if any(side < whole for side, whole in zip(latent, self._latent, strict=False)):
            self._of_tiles.add((layer_name, grid))
        items = host.prompted_items(options, len(token_map.slots))
        if items is not None:
            self.pictures = list(range(len(self._first_items)))
            token_map = TokenMap(token_map.slots[list(items)], token_map.merged_tokens)
        super().__call__(layer_name, step, grid, token_map)

    def what_of(self, merge_map: MergeMap) -> str:
        """What a map shows where it isn't the whole picture: another extension may give the UNet
        tiles, one a call."""
        return ", of one tile" if (merge_map.layer_name, merge_map.grid) in self._of_tiles else ""


def merges_in(settings: MergeSettings, is_hires: bool) -> bool:
    """Whether the first pass, or the hires pass, merges by `apply_to`."""
    return settings.apply_to in ("both passes", "hires pass" if is_hires else "first pass")
