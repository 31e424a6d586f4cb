"""Merging on a UNet, by forward hooks on its modules alone: `attach`, and the handle that it
returns."""

from __future__ import annotations

import math
import sys
import types
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .foreign_hooks import Hook, remove_hooks
from .layer_hooks import LayerHooks, MergedCall, is_in_backward, will_run_again
from .matching import match
from .partition import make_partition
from .passes import Grid, KeptMatching, Passes, Place, Step
from .plan import check_layer, coarsest_level, tokens_to_remove
from .proportional import forget_heads
from .reasons import NotMerged, in_a_line
from .report import Report
from .schedule import progress_of
from .settings import MergeSettings
from .token_map import TokenMap
from .unet import Layer, find_layers, find_unet, is_compiled, measured_level, names_in

LeaveOut = Callable[[nn.Module], "str | None"]
OnMap = Callable[[str, int, Grid, TokenMap], None]

KEPT_TOKENS = 2**22
"""Matchings are kept over steps for up to so many tokens of all layers together, about 60 bytes
each."""

_attached: weakref.WeakKeyDictionary[nn.Module, Merging] = weakref.WeakKeyDictionary()


def attach(
    model: object,
    settings: MergeSettings | None = None,
    leave_out: LeaveOut | None = None,
    on_map: OnMap | None = None,
    ignored: Collection[str] = (),
) -> Merging:
    """Merges tokens around the self-attention of `model`'s UNet until the returned handle is
    detached.

    `model` is a UNet of ldm, sgm or diffusers, anything with `.model.diffusion_model`, or a
    diffusers pipeline. A model without such layers is no error: the report says so. What was
    attached to the same UNet before is detached. `leave_out` is asked at every call of an `attn1`
    module, and keeps it unmerged by giving a reason. `on_map` is told of every call that is merged:
    the layer's name, the step (from 0), the grid (rows, columns) and the `TokenMap` of the call's
    batch. A `forward` that stands on an `attn1` instance keeps it unmerged, but for those of the
    `ignored` Python modules.

    Each thread has a sampling of its own: `set_step` speaks for the thread that calls it. Under
    gradient checkpointing a pass is left unmerged, since backward runs it again, or, where that
    can't be seen, backward raises `RuntimeError`. An error of merging itself never reaches the
    caller: that call of attention, and all that come after it, run unmerged, and the report has the
    reason.

    Raises `TypeError` for what is no UNet, and for a pipeline without one.
    """
    unet = find_unet(model)
    detach(unet)
    merging = Merging(unet, settings or MergeSettings(), leave_out, on_map, ignored)
    try:
        merging.register(unet)
    except BaseException:
        merging.detach()
        raise
    _attached[unet] = merging
    return merging


def detach(model: object) -> None:
    """Detaches what is attached to `model`'s UNet, if anything is; takes hooks off that came with a
    copy of another."""
    unet = find_unet(model)
    merging = _attached.pop(unet, None)
    if merging is not None:
        merging.detach()
    if not is_running(unet):
        remove_hooks(unet)


class Merging:
    """The hooks on one UNet. A context manager; `detach`, or leaving it, removes every hook.

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
        self.settings, self.leave_out, self.on_map, self.ignored = (
            settings,
            leave_out,
            on_map,
            ignored,
        )
        self.passes = Passes(settings)
        self.failure: str | None = None
        """The reason why nothing is merged any more: an error of merging itself."""
        self.refusals: dict[Hashable, str] = {}
        """By implementation of attention: why it can't weight keys."""
        self.coarsest = settings.max_downsample
        """The level up to which layers merge."""
        self.attached = True
        """False after `detach`."""
        self._few_steps: int | None = None
        """The number of steps, where it is below that for the full ratio."""
        self._steps = self._merged_steps = 0
        self._unet = weakref.ref(unet)
        self._is_compiled, self._names = is_compiled(unet), names_in(unet)
        self._layers: list[LayerHooks] = []
        self._handles: list[RemovableHandle] = []

    def register(self, unet: nn.Module) -> None:
        """Puts every hook on `unet`; for `attach`."""
        # Compiled code ignores hooks that come later, or traces into them, and fails.
        found = [] if self._is_compiled else find_layers(unet)
        if not found:
            return
        self.coarsest = coarsest_level(self.settings, found)
        self.keep([unet.register_forward_pre_hook(Hook(self._before_pass), with_kwargs=True)])
        self.keep([unet.register_forward_hook(Hook(self._after_pass))])
        grids: dict[nn.Module, _GridHook] = {}
        for layer in found:
            if layer.transformer not in grids:
                grid = grids[layer.transformer] = _GridHook(self, layer)
                self.keep(
                    [layer.transformer.register_forward_pre_hook(Hook(grid), with_kwargs=True)]
                )
            hooks = LayerHooks(self, layer, grids[layer.transformer])
            self._layers.append(hooks)
            self.keep(hooks.register(layer))

    def keep(self, handles: Iterable[RemovableHandle]) -> None:
        """Keeps the handles for `detach`, each as soon as its hook is registered."""
        for handle in handles:
            self._handles.append(handle)

    def set_step(
        self, step: int, total: int | None = None, schedule_steps: int | None = None
    ) -> None:
        """Says where sampling is: the UNet passes that follow belong to `step` (from 0) of `total`.

        `schedule_steps` is the number of steps from pure noise, where img2img takes only the last
        `total` of them. Without a call every pass counts as the next step, and the total is
        unknown, so that the ratio is the early one.
        """
        self.passes.counts_passes = False
        self._begin_step(step, total, schedule_steps)

    def on_step_end(
        self, pipeline: Any, step: int, timestep: Any, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The `callback_on_step_end` of a diffusers pipeline: says that the step after this one
        begins."""
        total = pipeline.num_timesteps
        self.set_step(
            (step + 1) % total, total, getattr(pipeline.scheduler, "num_inference_steps", None)
        )
        return inputs

    def report(self) -> Report:
        """What was merged so far; can be read at any time, also after `detach`."""
        notes = []
        if self._is_compiled:
            notes.append("this model is compiled (torch.compile), and hooks can't reach into that")
        elif not self._layers:
            notes.append("this model has no self-attention layers that can be merged")
        elif self.coarsest > self.settings.max_downsample:
            notes.append(
                f"no attention at level {self.settings.max_downsample}: merging at level {self.coarsest}, "
                "the finest of this model"
            )
        reports = [hooks.report.copy() for hooks in self._layers]
        if self._few_steps and not any(report.merged_calls for report in reports):
            notes.append(
                f"a picture of {self._few_steps} steps keeps more tokens than one of {self.settings.full_steps}"
            )
        if (
            self._steps
            and self._layers
            and not any(report.calls or report.reason for report in reports)
        ):
            notes.append("the model's own attention layers did not run")
        ratio = self.passes.step.ratio if self._steps else None
        return Report(reports, self._steps, self._merged_steps, ratio, notes, self.failure)

    def detach(self) -> None:
        """Removes every hook; once more does no harm.

        A pass that is running, in whichever thread, ends as it began, and the hooks go with its
        end.
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
        """Merges nothing any more, after an error of merging itself; gives the reason."""
        self.failure = self.failure or f"merging failed: {in_a_line(error)}"
        return self.failure

    @property
    def has_unfinished_call(self) -> bool:
        """Whether a merged call of attention is running in this thread, or was when its last pass
        raised."""
        return any(
            isinstance(call, MergedCall)
            for layer in self.passes.layers.values()
            for call in layer.calls
        )

    def count_merged_step(self) -> None:
        """Notes that a layer merges in the current step."""
        step = self.passes.step
        self._merged_steps += not step.has_merged
        step.has_merged = True

    def token_map(self, layer: LayerHooks, x: Tensor, grid: Grid) -> TokenMap:
        """The map for a call of a layer, by the similarity of x's tokens. Raises `NotMerged` where
        there is none."""
        settings, passes, (items, tokens, channels) = self.settings, self.passes, x.shape
        step, state = passes.step, passes.layers[layer]
        removed = tokens_to_remove(
            settings, tokens, channels, layer.heads, step.ratio, x.device.type
        )
        key = (layer, step.passes, state.matched_calls, grid, items, x.device)
        state.matched_calls += 1
        matching = passes.matchings.get(key)
        if matching is None:
            draw, draws = (
                step.number if settings.draws_anew else 0,
                1 if settings.shared_draw else items,
            )
            partition = make_partition(
                grid, step.cell, settings.partition, draw, settings.window, draws, x.device
            )
            if not partition.most_removed:
                rows, columns = step.cell
                raise NotMerged(
                    f"its {grid[0]}x{grid[1]} grid is smaller than a {rows}x{columns} cell"
                )
            matching = KeptMatching(match(x, partition, settings.exact))
            if settings.reuse_steps > 1 and passes.kept_tokens + items * tokens <= KEPT_TOKENS:
                passes.matchings[key] = matching
                passes.kept_tokens += items * tokens
        return matching.map_of(removed)

    def _begin_step(
        self, number: int, total: int | None, schedule_steps: int | None = None
    ) -> None:
        passes, every = self.passes, self.settings.reuse_steps
        before = passes.step.number
        # A step that doesn't come after the last one belongs to another run. Without `set_step` a
        # pass may be any part of a step, so nothing is kept from one to the next.
        if passes.counts_passes or number <= before or number // every != before // every:
            passes.matchings.clear()
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
        passes.latent = _grid_of(latent)
        passes.is_checkpointed = isinstance(latent, Tensor) and will_run_again(latent)
        # Clear what a pass that raised left behind.
        if self.has_unfinished_call:
            forget_heads()
        passes.layers.clear()
        if passes.counts_passes:
            self._begin_step(passes.step.number + 1, None)
        self._steps += not passes.step.passes
        passes.step.passes += 1

    def _after_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.attached:
            self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.passes = Passes(self.settings, self.passes.step.ratio)
        for unet in [unet for unet, merging in _attached.items() if merging is self]:
            del _attached[unet]


class _GridHook:
    """Sees the grid of a transformer's input, and with it where its layers are in the running pass."""

    def __init__(self, merging: Merging, layer: Layer) -> None:
        self._merging, self._built_level, self._input = merging, layer.level, layer.names.image

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        merging, level = self._merging, self._built_level
        grid, passes = _grid_of(args[0] if args else kwargs.get(self._input)), merging.passes
        if grid is None:
            passes.places[self] = Place(None, level, "its input is not an image")
            return
        if passes.latent is not None:
            level = measured_level(passes.latent, grid, level)
        place = passes.places[self] = Place(grid, level)
        try:
            check_layer(merging.settings, level, math.prod(grid), merging.coarsest)
        except NotMerged as reason:
            place.reason = str(reason)


def is_running(unet: nn.Module) -> bool:
    """Whether any thread is inside a call of `unet`, or of a module in it."""
    modules = set(map(id, unet.modules()))
    return any(id(module) in modules for module in _running_modules())


def _running_modules() -> Iterator[object]:
    """The modules whose calls are on the stacks of all threads."""
    code = nn.Module._call_impl.__code__
    for top in sys._current_frames().values():
        frame: types.FrameType | None = top
        while frame is not None:
            if frame.f_code is code:
                yield frame.f_locals.get("self")
            frame = frame.f_back


def _grid_of(x: Any) -> Grid | None:
    """The rows and columns of an image [B, C, H, W]; None for anything else."""
    return (x.shape[2], x.shape[3]) if isinstance(x, Tensor) and x.ndim == 4 else None
