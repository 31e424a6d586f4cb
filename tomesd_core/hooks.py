"""Merging on a UNet, by forward hooks on its modules alone: `attach`, and what one generation's merging knows."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .matching import Matching, match
from .partition import Partition, make_partition
from .plan import coarsest_level, removed_or_why_not, why_left_out
from .report import LayerReport, Report
from .schedule import progress_of
from .settings import MergeSettings
from .token_map import TokenMap
from .unet import Layer, find_layers, find_unet, measured_level

Grid = tuple[int, int]
LeaveOut = Callable[[nn.Module], "str | None"]
OnMap = Callable[[str, int, Grid, TokenMap], None]

_attached: weakref.WeakKeyDictionary[nn.Module, Merging] = weakref.WeakKeyDictionary()


def attach(
    model: object,
    settings: MergeSettings | None = None,
    leave_out: LeaveOut | None = None,
    on_map: OnMap | None = None,
) -> Merging:
    """Merges tokens around the self-attention of `model`'s UNet until the returned handle is detached.

    `model` is an ldm or sgm UNetModel, or anything with `.model.diffusion_model`. A model without such layers is no
    error: the report says so. What was attached to the same UNet before is detached. `leave_out` is asked at every call
    of an `attn1` module, and keeps it unmerged by giving a reason. `on_map` is told of every call that is merged: the
    layer's name, the step (from 0), the grid (rows, columns) and the `TokenMap` of the call's batch.

    Raises `TypeError` for what is no UNet, and for a diffusers model.
    """
    unet = find_unet(model)
    if unet in _attached:
        _attached[unet].detach()
    merging = Merging(unet, settings or MergeSettings(), leave_out, on_map)
    _attached[unet] = merging
    return merging


def detach(model: object) -> None:
    """Detaches what is attached to `model`'s UNet, if anything is."""
    merging = _attached.get(find_unet(model))
    if merging is not None:
        merging.detach()


@dataclasses.dataclass
class _Place:
    """Where a SpatialTransformer's layers are in the current pass."""

    built_level: int | None
    """The level by the structure."""
    level: int | None
    """The level as measured in the last pass."""
    grid: Grid | None = None
    why_not: str | None = None


@dataclasses.dataclass
class _LayerState:
    """What the hooks of one layer tell each other."""

    place: _Place
    report: LayerReport
    normed: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
    """The block's input, before norm1, and norm1's output; weak, to keep no activations."""
    maps: list[TokenMap | None] = dataclasses.field(default_factory=list)
    """The maps of the attention calls that are running, the innermost last; None for a call left alone."""
    calls_in_pass: int = 0


@dataclasses.dataclass
class _Kept:
    """A matching, kept for the steps that reuse it, with the last map made from it."""

    matching: Matching
    removed: int = -1
    token_map: TokenMap | None = None

    def map_of(self, removed: int) -> TokenMap:
        if self.token_map is None or self.removed != removed:
            self.removed, self.token_map = removed, self.matching.token_map(removed)
        return self.token_map


class Merging:
    """The hooks on one UNet. A context manager; `detach`, or leaving it, removes every hook.

    It holds no reference to the model, and between calls none to any activation.
    """

    def __init__(
        self,
        unet: nn.Module,
        settings: MergeSettings,
        leave_out: LeaveOut | None = None,
        on_map: OnMap | None = None,
    ) -> None:
        self.settings = settings
        self._leave_out = leave_out
        self._on_map = on_map
        self._attached = True
        self._step = -1
        self._counts_passes = True
        self._ratio = settings.ratio_at(0.0)
        self._latent: Grid | None = None
        self._steps = 0
        self._step_began = self._step_merged = False
        self._merged_steps = 0
        self._partitions: dict[tuple[Grid, int, torch.device], Partition] = {}
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._pass: tuple[int, ...] = ()
        """The batch sizes of the UNet passes of this step so far: what tells one pass of a step from another."""
        layers = find_layers(unet)
        self._coarsest = coarsest_level(settings, layers)
        self._layers: list[_LayerState] = []
        self._handles = [unet.register_forward_pre_hook(self._on_unet, with_kwargs=True)] if layers else []
        places: dict[nn.Module, _Place] = {}
        for layer in layers:
            if layer.transformer not in places:
                place = places[layer.transformer] = _Place(layer.level, layer.level)
                self._handles.append(
                    layer.transformer.register_forward_pre_hook(self._on_transformer(place), with_kwargs=True)
                )
            self._add(layer, places[layer.transformer])

    @property
    def attached(self) -> bool:
        """False after `detach`."""
        return self._attached

    def set_step(self, step: int, total: int | None = None) -> None:
        """Says where sampling is: the UNet passes that follow belong to `step` (from 0) of `total`.

        Without it every pass counts as the next step, and the total is unknown, so that the ratio is the early one.
        """
        self._counts_passes = False
        self._begin_step(step, total)

    def report(self) -> Report:
        """What was merged so far; can be read at any time, also after `detach`."""
        notes = []
        if not self._layers:
            notes.append("this model has no self-attention layers that can be merged")
        elif self._coarsest > self.settings.max_downsample:
            notes.append(
                f"no attention at level {self.settings.max_downsample}: merging at level {self._coarsest}, "
                "the finest of this model"
            )
        if (
            self._steps
            and self._layers
            and not any(state.report.calls or state.report.left_out for state in self._layers)
        ):
            notes.append("the model's attention layers did not run: the UNet was replaced")
        layers = [dataclasses.replace(state.report) for state in self._layers]
        return Report(layers, self._steps, self._merged_steps, self._ratio if self._steps else None, notes)

    def detach(self) -> None:
        """Removes every hook; once more does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attached = False
        self._partitions.clear()
        self._kept.clear()
        for state in self._layers:
            state.normed = None
            state.maps.clear()
        for unet in [unet for unet, merging in _attached.items() if merging is self]:
            del _attached[unet]

    def __enter__(self) -> Merging:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _add(self, layer: Layer, place: _Place) -> None:
        state = _LayerState(place, LayerReport(layer.name, layer.level))
        self._layers.append(state)
        if not layer.is_self_attention:
            state.report.left_out = "it is no self-attention (disable_self_attn)"
            return
        self._handles += [
            layer.block.norm1.register_forward_hook(self._on_norm(state)),
            layer.block.attn1.register_forward_pre_hook(self._before_attention(state), with_kwargs=True),
            layer.block.attn1.register_forward_hook(self._after_attention(state)),
        ]

    def _begin_step(self, step: int, total: int | None) -> None:
        every = self.settings.reuse_steps
        # A step that doesn't come after the last one belongs to another run. Without `set_step` a pass may be any part
        # of a step, so nothing is kept from one to the next.
        if self._counts_passes or step <= self._step or step // every != self._step // every:
            self._kept.clear()
        self._step = max(step, 0)
        self._pass = ()
        self._ratio = self.settings.ratio_at(progress_of(self._step, total))
        self._partitions.clear()
        self._step_began = self._step_merged = False

    def _on_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latent = args[0] if args else kwargs.get("x")
        self._latent = tuple(latent.shape[-2:]) if isinstance(latent, Tensor) and latent.ndim == 4 else None
        if self._counts_passes:
            self._begin_step(self._step + 1, None)
        self._pass += (latent.shape[0] if self._latent else 0,)
        if not self._step_began:
            self._step_began = True
            self._steps += 1
        for state in self._layers:
            state.calls_in_pass = 0
            # Left behind by a pass that raised.
            state.normed = None
            state.maps.clear()

    def _on_transformer(self, place: _Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("x")
            if not isinstance(x, Tensor) or x.ndim != 4:
                place.grid, place.why_not = None, "its input is not an image"
                return
            rows, columns = place.grid = tuple(x.shape[-2:])
            if self._latent is not None:
                place.level = measured_level(self._latent, place.grid, place.built_level)
            place.why_not = why_left_out(self.settings, place.level, rows * columns, self._coarsest)

        return hook

    def _on_norm(self, state: _LayerState) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if state.place.why_not is None and args:
                state.normed = weakref.ref(args[0]), weakref.ref(output)

        return hook

    def _before_attention(self, state: _LayerState) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state.maps.append(None)
            report, place = state.report, state.place
            report.calls += 1
            report.level = place.level
            why_not = place.why_not or self._why_not(place, args, kwargs)
            if not why_not and self._leave_out is not None:
                why_not = report.conflict = self._leave_out(module)
            if why_not:
                report.left_out = why_not
                return None
            y = args[0]
            report.tokens = y.shape[1]
            source, normed = (ref() for ref in state.normed) if state.normed else (None, None)
            # A call with another tensor than norm1's output (part of the batch, say) is matched by what it was given.
            token_map = self._token_map(state, source if normed is y and source is not None else y, place.grid)
            if isinstance(token_map, str):
                report.left_out = token_map
                return None
            state.maps[-1] = token_map
            report.merged_tokens = token_map.merged_tokens
            report.fewest_tokens = min(report.fewest_tokens or report.merged_tokens, report.merged_tokens)
            report.most_tokens = max(report.most_tokens, report.merged_tokens)
            report.merged_calls += 1
            if not self._step_merged:
                self._step_merged = True
                self._merged_steps += 1
            if self._on_map is not None:
                self._on_map(report.name, self._step, place.grid, token_map)
            merged = token_map.merge(y)
            # A context that is the input itself is self-attention; one of its own is left whole.
            swap = [merged if value is y else value for value in args]
            return tuple(swap), {name: merged if value is y else value for name, value in kwargs.items()}

        return hook

    def _after_attention(self, state: _LayerState) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            token_map = state.maps.pop() if state.maps else None
            return None if token_map is None else token_map.unmerge(output)

        return hook

    def _why_not(self, place: _Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why this call of `attn1` is left alone, or None."""
        if place.grid is None:
            return "its token grid is not known"
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            return "its input is not a batch of tokens"
        if args[0].shape[1] != place.grid[0] * place.grid[1]:
            return f"its {args[0].shape[1]} tokens are not the grid's {place.grid[0]}x{place.grid[1]}"
        context = args[1] if len(args) > 1 else kwargs.get("context")
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        if mask is not None and (context is None or context is args[0]):
            return "its attention is masked token by token"
        return None

    def _token_map(self, state: _LayerState, x: Tensor, grid: Grid) -> TokenMap | str:
        """The map for this call, by the similarity of x's tokens, or why there is none."""
        settings, ratio, (items, tokens, channels) = self.settings, self._ratio, x.shape
        removed = removed_or_why_not(settings, tokens, channels, ratio, x.device.type)
        if isinstance(removed, str):
            return removed
        number, state.calls_in_pass = state.calls_in_pass, state.calls_in_pass + 1
        key = (None if settings.share_layers else id(state), self._pass, number, grid, items, x.device)
        kept = self._kept.get(key)
        if kept is None:
            partition = self._partition(grid, 1 if settings.shared_draw else items, x.device)
            if not partition.most_removed:
                return f"its {grid[0]}x{grid[1]} grid is smaller than a {settings.stride[0]}x{settings.stride[1]} cell"
            kept = _Kept(match(x, partition, exact=settings.window is None))
            if settings.reuse_steps > 1 or settings.share_layers:
                self._kept[key] = kept
        return kept.map_of(removed)

    def _partition(self, grid: Grid, items: int, device: torch.device) -> Partition:
        """This step's partition of a grid, made once for all layers on it."""
        key = grid, items, device
        if key not in self._partitions:
            settings = self.settings
            self._partitions[key] = make_partition(
                grid, settings.stride, settings.partition, max(self._step, 0), settings.window, items, device
            )
        return self._partitions[key]
