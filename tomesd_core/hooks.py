"""`attach`: merge on a UNet by forward hooks on its modules, and the handle that removes them."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Collection, Hashable
from typing import Any

from torch import Tensor, nn

from .foreign_hooks import Hook, remove_hooks
from .layer_hooks import LayerHooks, is_in_backward, will_run_again
from .matching import match
from .partition import make_partition
from .passes import Grid, MergedCall, Passes, Place, Step, grid_of
from .plan import check_layer, coarsest_level, tokens_to_remove
from .probe import forget_heads
from .reasons import NO_LAYERS, NotMerged, in_a_line
from .report import LayerReport, Report
from .settings import MergeSettings, progress_of
from .token_map import TokenMap
from .unet import find_layers, find_unet, is_compiled, is_running, measured_level, names_in

LeaveOut = Callable[[nn.Module], "str | None"]
OnMap = Callable[[str, int, Grid, TokenMap], None]

KEPT_TOKENS = 2**22
"""Limit on the tokens of all matchings kept for later steps; each takes about 60 bytes."""

_removing = threading.Lock()
"""Held while hooks are removed: several threads may detach at once."""

_attached: weakref.WeakKeyDictionary[nn.Module, Merging] = weakref.WeakKeyDictionary()


def attach(
    model: object,
    settings: MergeSettings | None = None,
    leave_out: LeaveOut | None = None,
    on_map: OnMap | None = None,
    ignored: Collection[str] = (),
) -> Merging:
    """Merge tokens around the self-attention of `model`'s UNet until the handle is detached.

    `model` is a UNet of ldm, sgm or diffusers, an object with `.model.diffusion_model`, or a
    diffusers pipeline. If it has no self-attention layers, the report says so. A previous `attach`
    to the same UNet is detached.

    `leave_out(attn1)` is called at every call of an attention, and returns a reason not to merge it
    or None. `on_map(layer name, step, grid, TokenMap)` is called for every merged call, with the
    step counted from 0 and the grid as (rows, columns). An attention whose `forward` was replaced
    on the instance isn't merged, unless one of the Python modules in `ignored` replaced it.

    Threads sample independently: `set_step` applies to the calling thread. Passes under gradient
    checkpointing aren't merged, since backward reruns them; where that can't be detected, backward
    raises `RuntimeError`. An error of merging itself never reaches the caller: that call and all
    later ones run unmerged, and the report has the reason.

    Raises `TypeError` if `model` is not a UNet and has none.
    """
    unet = find_unet(model)
    detach(unet)
    merging = Merging(unet, settings or MergeSettings(), leave_out, on_map, ignored)
    _attached[unet] = merging
    return merging


def detach(model: object) -> None:
    """Detach merging from `model`'s UNet, and remove hooks that were copied from another one."""
    unet = find_unet(model)
    merging = _attached.pop(unet, None)
    if merging is not None:
        merging.detach()
    if not is_running(unet):
        remove_hooks(unet)


class Merging:
    """The hooks on one UNet. `detach`, or leaving it as a context manager, removes them all.

    It keeps neither the model alive nor, between calls, any activation.
    """

    def __init__(
        self,
        unet: nn.Module,
        settings: MergeSettings,
        leave_out: LeaveOut | None,
        on_map: OnMap | None,
        ignored: Collection[str],
    ) -> None:
        self.settings, self.leave_out = settings, leave_out
        self.on_map, self.ignored = on_map, ignored
        self.passes = Passes(settings)
        self.failure: str | None = None
        """The error of merging itself that ended merging."""
        self.refusals: dict[Hashable, str] = {}
        """Reasons why an attention can't weight keys, by implementation."""
        self.attached = True
        """False after `detach`."""
        self._few_steps: int | None = None
        """The number of steps, if below `full_steps`."""
        self._steps = self._merged_steps = 0
        self._unet = weakref.ref(unet)
        self._is_compiled, self._names = is_compiled(unet), names_in(unet)
        # Compiled code ignores later hooks, or traces into them and fails.
        layers = [] if self._is_compiled else find_layers(unet)
        self.coarsest = coarsest_level(settings, layers)
        """The coarsest level that merges."""
        with contextlib.ExitStack() as handles:
            keep = handles.enter_context
            if layers:
                keep(unet.register_forward_pre_hook(Hook(self._before_pass), with_kwargs=True))
                keep(unet.register_forward_hook(Hook(self._after_pass)))
            for transformer, level in {layer.transformer: layer.level for layer in layers}.items():
                before = Hook(functools.partial(self._before_transformer, level))
                keep(transformer.register_forward_pre_hook(before, with_kwargs=True))
            self._layers = [LayerHooks(self, layer, handles) for layer in layers]
            self.handles = handles.pop_all()
            """The registered hooks."""

    def set_step(
        self, step: int, total: int | None = None, schedule_steps: int | None = None
    ) -> None:
        """Set the sampling step (from 0) of `total` to which the following UNet passes belong.

        `schedule_steps` is the number of steps from pure noise if img2img runs only the last
        `total` of them. Without `set_step` every pass counts as one step, and the ratio is the
        early one, since the total is unknown.
        """
        self.passes.counts_passes = False
        self._begin_step(step, total, schedule_steps)

    def on_step_end(
        self, pipeline: Any, step: int, timestep: Any, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Set the next step; the `callback_on_step_end` of a diffusers pipeline."""
        total = pipeline.num_timesteps
        schedule_steps = getattr(pipeline.scheduler, "num_inference_steps", None)
        self.set_step((step + 1) % total, total, schedule_steps)
        return inputs

    def report(self) -> Report:
        """Report what was merged so far; available at any time, also after `detach`."""
        reports = [hooks.report.copy() for hooks in self._layers]
        ratio = self.passes.step.ratio if self._steps else None
        notes = self._notes(reports)
        return Report(reports, self._steps, self._merged_steps, ratio, notes, self.failure)

    def _notes(self, reports: list[LayerReport]) -> list[str]:
        settings, notes = self.settings, []
        if self._is_compiled:
            notes.append("this model is compiled (torch.compile), which bypasses hooks")
        elif not self._layers:
            notes.append(NO_LAYERS)
        elif self.coarsest > settings.max_downsample:
            notes.append(
                f"no attention at level {settings.max_downsample}: merging at this model's finest "
                f"level, {self.coarsest}"
            )
        if self._few_steps and not any(report.merged_calls for report in reports):
            notes.append(
                f"{self._few_steps} steps keep more tokens than {settings.full_steps} steps"
            )
        has_run = any(report.calls or report.reason for report in reports)
        if self._steps and self._layers and not has_run:
            notes.append("the model's own attention layers did not run")
        return notes

    def detach(self) -> None:
        """Remove every hook; calling it again has no effect.

        A pass that is running, in any thread, finishes merged, and its hooks go when it ends.
        """
        self.attached = False
        unet = self._unet()
        if unet is None or not is_running(unet):
            self._remove()

    def __enter__(self) -> Merging:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def fail(self, error: Exception) -> str:
        """Stop merging after an error of merging itself; return the reason."""
        self.failure = self.failure or f"merging failed: {in_a_line(error)}"
        return self.failure

    @property
    def has_unfinished_call(self) -> bool:
        """Whether a merged call is running in this thread, or its last pass raised inside one."""
        layers = self.passes.layers.values()
        return any(isinstance(call, MergedCall) for layer in layers for call in layer.calls)

    def count_merged_step(self) -> None:
        """Count the current step as merged."""
        step = self.passes.step
        self._merged_steps += not step.has_merged
        step.has_merged = True

    def token_map(self, layer: LayerHooks, x: Tensor, grid: Grid) -> TokenMap:
        """The map for a call of `layer`, matched by x's tokens. Raises `NotMerged`."""
        settings, passes, (items, tokens, channels) = self.settings, self.passes, x.shape
        step, state, device = passes.step, passes.layers[layer], x.device
        removed = tokens_to_remove(settings, tokens, channels, layer.heads, step.ratio, device.type)
        key = (layer, step.passes, state.matched_calls, grid, items, device)
        state.matched_calls += 1
        make_map = passes.map_makers.get(key)
        if make_map is None:
            draw = step.number if settings.redraws else 0
            draws = 1 if settings.shared_draw else items
            partition = make_partition(
                grid, step.cell, settings.partition, draw, settings.window, draws, device
            )
            if not partition.most_removed:
                small, large = (f"{rows}x{columns}" for rows, columns in (grid, step.cell))
                raise NotMerged(f"its {small} grid is smaller than a {large} cell")
            matching = match(x, partition, settings.exact)
            make_map = functools.lru_cache(maxsize=1)(matching.token_map)
            if settings.reuse_steps > 1 and passes.kept_tokens + items * tokens <= KEPT_TOKENS:
                passes.map_makers[key] = make_map
                passes.kept_tokens += items * tokens
        return make_map(removed)

    def _begin_step(
        self, number: int, total: int | None, schedule_steps: int | None = None
    ) -> None:
        passes, every = self.passes, self.settings.reuse_steps
        before = passes.step.number
        # A step number that doesn't increase belongs to another sampling. Without `set_step` a pass
        # may be any part of a step, so no matching is kept for the next pass.
        if passes.counts_passes or number <= before or number // every != before // every:
            passes.map_makers.clear()
            passes.kept_tokens = 0
        steps = schedule_steps or total
        number, settings = max(number, 0), self.settings.in_steps(steps)
        self._few_steps = None if settings is self.settings else steps
        passes.step = Step(number, settings.ratio_at(progress_of(number, total)), settings.cell)

    def _before_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.attached:
            self._remove()
            return
        if is_in_backward():
            return
        latent, passes = args[0] if args else kwargs.get(self._names.latent), self.passes
        passes.latent = grid_of(latent)
        passes.is_checkpointed = isinstance(latent, Tensor) and will_run_again(latent)
        # Clear what a pass that raised left behind.
        if self.has_unfinished_call:
            forget_heads()
        passes.layers.clear()
        if passes.counts_passes:
            self._begin_step(passes.step.number + 1, None)
        self._steps += not passes.step.passes
        passes.step.passes += 1

    def _before_transformer(
        self, level: int | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Record the token grid of a transformer, and whether its layers merge at that size."""
        passes, place = self.passes, Place(level=level)
        passes.places[weakref.ref(module)] = place
        place.grid = grid_of(args[0] if args else kwargs.get(self._names.hidden))
        if place.grid is None:
            place.reason = "its input is not an image"
            return
        if passes.latent is not None:
            place.level = measured_level(passes.latent, place.grid, level)
        try:
            check_layer(self.settings, place.level, math.prod(place.grid), self.coarsest)
        except NotMerged as reason:
            place.reason = str(reason)

    def _after_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.attached:
            self._remove()

    def _remove(self) -> None:
        with _removing:
            self.handles.close()
            self.passes = Passes(self.settings, self.passes.step.ratio)
            unet = self._unet()
            if unet is not None and _attached.get(unet) is self:
                _attached.pop(unet, None)
