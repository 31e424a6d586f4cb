"""Merging on a UNet, by forward hooks on its modules alone: `attach`, and what one generation's merging knows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .hook import Hook, remove_hooks, whose_forward, whose_hook
from .matching import Matching, match
from .partition import make_partition
from .plan import coarsest_level, removed_or_why_not, why_left_out
from .proportional import Heads, Projections, Weighed, ask_heads, can_be_weighed
from .report import LayerReport, Report
from .schedule import progress_of
from .settings import MergeSettings
from .token_map import TokenMap
from .unet import Layer, find_layers, find_unet, measured_level

Grid = tuple[int, int]
LeaveOut = Callable[[nn.Module], "str | None"]
OnMap = Callable[[str, int, Grid, TokenMap], None]

KEPT_TOKENS = 2**22
"""Matchings are kept over steps for up to so many tokens of all layers together, about 60 bytes each."""

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

    Each thread has a sampling of its own: `set_step` speaks for the thread that calls it. Under gradient checkpointing
    a pass is left unmerged, since backward runs it again, or, where that can't be seen, backward raises `RuntimeError`.

    Raises `TypeError` for what is no UNet, and for a diffusers model.
    """
    unet = find_unet(model)
    detach(unet)
    merging = Merging(unet, settings or MergeSettings(), leave_out, on_map)
    _attached[unet] = merging
    return merging


def detach(model: object) -> None:
    """Detaches what is attached to `model`'s UNet, if anything is; takes hooks off that came with a copy of another."""
    unet = find_unet(model)
    merging = _attached.get(unet)
    if merging is not None:
        merging.detach()
    remove_hooks(unet)


@dataclasses.dataclass
class _Step:
    """One step of the sampling, made anew for each."""

    number: int
    ratio: float
    passes: int = 0
    """Passes of the UNet in this step so far."""
    has_merged: bool = False


@dataclasses.dataclass
class _Place:
    """Where the layers of a SpatialTransformer are in the running pass."""

    grid: Grid | None = None
    level: int | None = None
    """The level as it is measured."""
    why_not: str | None = None


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a call of `attn1` is given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        """`x`, `context` or `mask`, which may come by position, or another one by its name; None: it isn't given."""
        by_place = dict(zip(("x", "context", "mask"), self.args, strict=False))
        return by_place.get(name, self.kwargs.get(name))

    @property
    def attends_to_itself(self) -> bool:
        """Whether the keys are made of x."""
        context = self.get("context")
        return context is None or context is self.get("x")

    def each(self, change: Callable[[Any], Any]) -> _Inputs:
        """All of them changed."""
        return _Inputs(tuple(map(change, self.args)), {name: change(value) for name, value in self.kwargs.items()})

    def replaced(self, place: int, name: str, value: Any) -> _Inputs:
        """One of them replaced, or given: by position where it came so, else by its name."""
        if place < len(self.args):
            return _Inputs((*self.args[:place], value, *self.args[place + 1 :]), self.kwargs)
        return _Inputs(self.args, {**self.kwargs, name: value})


@dataclasses.dataclass
class _Call:
    """One call of `attn1` that is running."""

    inputs: _Inputs | None = None
    """As they came, as `_weak` makes them; None for a call that is left alone."""
    tokens: int = 0
    token_map: TokenMap | None = None
    """By which its output is unmerged, if it is."""
    weighed: Weighed | None = None


@dataclasses.dataclass
class _LayerPass:
    """What the hooks of one layer tell each other in a pass."""

    normed: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
    """The block's input, before norm1, and norm1's output; weak, to keep no activations."""
    calls: list[_Call] = dataclasses.field(default_factory=list)
    """Those that are running, the innermost last."""
    matched_calls: int = 0


@dataclasses.dataclass
class _KeptMatching:
    """A matching, kept for the steps that reuse it, with the last map made from it."""

    matching: Matching
    removed: int = -1
    token_map: TokenMap | None = None

    def map_of(self, removed: int) -> TokenMap:
        if self.token_map is None or self.removed != removed:
            self.removed, self.token_map = removed, self.matching.token_map(removed)
        return self.token_map


class _Sampling(threading.local):
    """What one thread's passes share. Every thread has its own."""

    def __init__(self, ratio: float) -> None:
        self.step = _Step(-1, ratio)
        self.counts_passes = True
        self.latent: Grid | None = None
        self.is_checkpointed = False
        self.places: dict[_GridHook, _Place] = {}
        self.layers: defaultdict[_LayerHooks, _LayerPass] = defaultdict(_LayerPass)
        self.matchings: dict[tuple[Any, ...], _KeptMatching] = {}
        self.kept_tokens = 0


class Merging:
    """The hooks on one UNet. A context manager; `detach`, or leaving it, removes every hook.

    It holds no reference to the model, and between calls none to any activation.
    """

    def __init__(
        self, unet: nn.Module, settings: MergeSettings, leave_out: LeaveOut | None, on_map: OnMap | None
    ) -> None:
        self.settings, self.leave_out, self.on_map = settings, leave_out, on_map
        self.sampling = _Sampling(settings.ratio_at(0.0))
        self.failure: str | None = None
        """Why nothing is merged any more: an error of the device's."""
        self.heads: dict[tuple[Any, ...], Heads | None] = {}
        self.attached = True
        """False after `detach`."""
        self._steps = self._merged_steps = 0
        self._is_compiled = hasattr(unet, "_orig_mod") or getattr(unet, "_compiled_call_impl", None) is not None
        # What is compiled ignores hooks that come later, or traces into them, and fails.
        layers = [] if self._is_compiled else find_layers(unet)
        self.coarsest = coarsest_level(settings, layers)
        self._layers: list[_LayerHooks] = []
        self._handles: list[RemovableHandle] = []
        if layers:
            self._handles.append(unet.register_forward_pre_hook(Hook(self._before_pass), with_kwargs=True))
        grids: dict[nn.Module, _GridHook] = {}
        for layer in layers:
            if layer.transformer not in grids:
                grid = grids[layer.transformer] = _GridHook(self, layer.level)
                self._handles.append(layer.transformer.register_forward_pre_hook(Hook(grid), with_kwargs=True))
            hooks = _LayerHooks(self, layer, grids[layer.transformer])
            self._layers.append(hooks)
            self._handles += hooks.register(layer)

    def set_step(self, step: int, total: int | None = None) -> None:
        """Says where sampling is: the UNet passes that follow belong to `step` (from 0) of `total`.

        Without it every pass counts as the next step, and the total is unknown, so that the ratio is the early one.
        """
        self.sampling.counts_passes = False
        self._begin_step(step, total)

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
        reports = [dataclasses.replace(hooks.report) for hooks in self._layers]
        if self._steps and self._layers and not any(report.calls or report.left_out for report in reports):
            notes.append("the model's own attention layers did not run")
        if self.failure and any(report.merged_calls for report in reports):
            notes.append(self.failure)
        ratio = self.sampling.step.ratio if self._steps else None
        return Report(reports, self._steps, self._merged_steps, ratio, notes)

    def detach(self) -> None:
        """Removes every hook; once more does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.attached = False
        self.sampling = _Sampling(self.sampling.step.ratio)
        for unet in [unet for unet, merging in _attached.items() if merging is self]:
            del _attached[unet]

    def __enter__(self) -> Merging:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _begin_step(self, number: int, total: int | None) -> None:
        sampling, every = self.sampling, self.settings.reuse_steps
        before = sampling.step.number
        # A step that doesn't come after the last one belongs to another run. Without `set_step` a pass may be any part
        # of a step, so nothing is kept from one to the next.
        if sampling.counts_passes or number <= before or number // every != before // every:
            sampling.matchings.clear()
            sampling.kept_tokens = 0
        number = max(number, 0)
        sampling.step = _Step(number, self.settings.ratio_at(progress_of(number, total)))

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_in_backward():
            return
        latent, sampling = args[0] if args else kwargs.get("x"), self.sampling
        sampling.latent = _grid_of(latent)
        sampling.is_checkpointed = isinstance(latent, Tensor) and _will_run_again(latent)
        # A pass that raised has left some behind.
        sampling.layers.clear()
        if sampling.counts_passes:
            self._begin_step(sampling.step.number + 1, None)
        self._steps += not sampling.step.passes
        sampling.step.passes += 1

    def count_merged_step(self) -> None:
        """Notes that a layer merges in the current step."""
        step = self.sampling.step
        self._merged_steps += not step.has_merged
        step.has_merged = True

    def token_map(self, layer: _LayerHooks, x: Tensor, grid: Grid) -> TokenMap | str:
        """The map for a call of a layer, by the similarity of x's tokens, or why there is none."""
        settings, sampling, (items, tokens, channels) = self.settings, self.sampling, x.shape
        step, state = sampling.step, sampling.layers[layer]
        removed = removed_or_why_not(settings, tokens, channels, step.ratio, x.device.type)
        if isinstance(removed, str):
            return removed
        key = (layer, step.passes, state.matched_calls, grid, items, x.device)
        state.matched_calls += 1
        matching = sampling.matchings.get(key)
        if matching is None:
            draw, draws = step.number if settings.draws_anew else 0, 1 if settings.shared_draw else items
            partition = make_partition(grid, settings.cell, settings.partition, draw, settings.window, draws, x.device)
            if not partition.most_removed:
                return f"its {grid[0]}x{grid[1]} grid is smaller than a {settings.cell[0]}x{settings.cell[1]} cell"
            matching = _KeptMatching(match(x, partition, settings.exact))
            if settings.reuse_steps > 1 and sampling.kept_tokens + items * tokens <= KEPT_TOKENS:
                sampling.matchings[key] = matching
                sampling.kept_tokens += items * tokens
        return matching.map_of(removed)


class _GridHook:
    """Sees where a SpatialTransformer's layers are in the running pass."""

    def __init__(self, merging: Merging, built_level: int | None) -> None:
        self._merging, self._built_level = merging, built_level

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sampling, level = self._merging.sampling, self._built_level
        grid = _grid_of(args[0] if args else kwargs.get("x"))
        if grid is None:
            sampling.places[self] = _Place(None, level, "its input is not an image")
            return
        if sampling.latent is not None:
            level = measured_level(sampling.latent, grid, level)
        why_not = why_left_out(self._merging.settings, level, math.prod(grid), self._merging.coarsest)
        sampling.places[self] = _Place(grid, level, why_not)


class _LayerHooks:
    """The hooks of one self-attention layer: what its attention is given is merged, and what it gives is unmerged."""

    def __init__(self, merging: Merging, layer: Layer, grid: _GridHook) -> None:
        self._merging, self._grid = merging, grid
        self.report = LayerReport(layer.name, layer.level, method=merging.settings.method)
        self._was_checkpointed = False
        self._odd_output: str | None = None

    def register(self, layer: Layer) -> list[RemovableHandle]:
        """Puts the hooks on the layer's modules."""
        attention = layer.block.attn1
        if not layer.is_self_attention:
            self.report.left_out = "it is no self-attention (disable_self_attn)"
            return []
        handles = [
            layer.block.norm1.register_forward_hook(Hook(self._after_norm)),
            attention.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            attention.register_forward_hook(Hook(self._after)),
        ]
        if self._merging.settings.method != "paper" and can_be_weighed(attention):
            handles += Projections(attention, self._weighed_call).handles
        return handles

    @property
    def _state(self) -> _LayerPass:
        return self._merging.sampling.layers[self]

    @property
    def _place(self) -> _Place:
        return self._merging.sampling.places.get(self._grid) or _Place(level=self.report.level)

    def _weighed_call(self) -> Weighed | None:
        calls = self._state.calls
        return calls[-1].weighed if calls else None

    def _after_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._place.why_not is None and args:
            self._state.normed = weakref.ref(args[0]), weakref.ref(output)
            self._was_checkpointed |= _will_run_again(args[0])

    def _before(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call()
        self._state.calls.append(call)
        if _is_in_backward():
            if self.report.merged_calls and not self._was_checkpointed:
                raise RuntimeError(
                    f"{self.report.name} was merged, and gradient checkpointing runs it again in backward, where it "
                    "would not be: detach merging, or switch checkpointing off (use_checkpoint=False)"
                )
            return None
        self.report.calls += 1
        self.report.level = self._place.level
        inputs = _Inputs(args, kwargs)
        merged = self._why_left_alone(attention, inputs) or self._merged(call, attention, inputs)
        if isinstance(merged, str):
            self.report.left_out = merged
            return None
        return merged.args, merged.kwargs

    def _why_left_alone(self, attention: nn.Module, inputs: _Inputs) -> str | None:
        """Why this call of attention is left alone, by all but its tokens; or None."""
        merging, place, x = self._merging, self._place, inputs.get("x")
        if place.why_not or merging.failure or self._odd_output:
            return place.why_not or merging.failure or self._odd_output
        if place.grid is None:
            return "its token grid is not known"
        if not isinstance(x, Tensor) or x.ndim != 3:
            return "its input is not a batch of tokens"
        if x.shape[1] != place.grid[0] * place.grid[1]:
            return f"its {x.shape[1]} tokens are not the grid's {place.grid[0]}x{place.grid[1]}"
        if inputs.get("mask") is not None and inputs.attends_to_itself:
            return "its attention is masked token by token"
        value = inputs.get("value")
        is_whole = inputs.attends_to_itself and (value is None or value is x)
        if merging.settings.method == "keys" and not is_whole:
            return "its keys and values are not its own tokens alone"
        self._was_checkpointed |= merging.sampling.is_checkpointed
        if self._was_checkpointed:
            return "backward would run it again (gradient checkpointing)"
        self.report.conflict = (merging.leave_out and merging.leave_out(attention)) or _left_to(attention)
        return self.report.conflict

    def _merged(self, call: _Call, attention: nn.Module, inputs: _Inputs) -> _Inputs | str:
        """What attention gets in place of its inputs, or why it is left alone."""
        merging, report, state, x = self._merging, self.report, self._state, inputs.get("x")
        grid = self._place.grid or (0, 0)
        source, normed = (ref() for ref in state.normed) if state.normed else (None, None)
        # A call with another tensor than norm1's output (part of the batch, say) is matched by what it was given.
        source = source if normed is x and source is not None else x
        report.tokens = x.shape[1]
        try:
            token_map = merging.token_map(self, source, grid)
            merged = token_map if isinstance(token_map, str) else self._inputs(call, attention, token_map, inputs)
        except Exception as error:
            # A device without one of the operations, or without memory: the picture is worth more than its speed.
            merging.failure = f"matching failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return merging.failure
        if isinstance(token_map, str) or isinstance(merged, str):
            return merged
        call.inputs = inputs.each(_weak)
        report.count_merged(token_map.merged_tokens)
        merging.count_merged_step()
        if merging.on_map is not None:
            merging.on_map(report.name, merging.sampling.step.number, grid, token_map)
        return merged

    def _inputs(self, call: _Call, attention: nn.Module, token_map: TokenMap, inputs: _Inputs) -> _Inputs | str:
        """The inputs with merged tokens, by the method; fills in what `call` needs for the way back."""
        method, x = self._merging.settings.method, inputs.get("x")
        # Keys that aren't the layer's own tokens stay as they are, and count as ever.
        weighs = method != "paper" and inputs.attends_to_itself
        heads = self._heads(attention, x) if weighs else None
        if weighs and heads is None:
            return "its attention has no scale that is known, to weigh merged keys by (the method paper needs none)"
        merged = token_map.merge(x)
        call.tokens = x.shape[1]
        call.token_map = None if method == "keys" else token_map
        queries = x if method == "keys" else merged
        # A context or value that is the input itself is self-attention; one of its own is left whole.
        arguments = inputs.each(lambda value: merged if value is x else value)
        if heads is not None:
            call.weighed = Weighed(heads, token_map.counts)
            queries = heads.widen_input(queries)
            arguments = arguments.replaced(1, "context", merged)
        return arguments.replaced(0, "x", queries)

    def _heads(self, attention: nn.Module, x: Tensor) -> Heads | None:
        """How this layer's attention splits and scales: asked once for each implementation and size."""
        if not can_be_weighed(attention):
            return None
        heads = self._merging.heads
        forward = getattr(attention.forward, "__func__", attention.forward)
        key = forward, attention.heads, x.shape[-1], getattr(attention, "scale", None)
        if key not in heads:
            heads[key] = ask_heads(attention, x, self._running)
        return heads[key]

    @contextlib.contextmanager
    def _running(self, weighed: Weighed) -> Iterator[None]:
        """While open, the innermost call of attention is this one."""
        calls = self._state.calls
        calls.append(_Call(weighed=weighed))
        try:
            yield
        finally:
            calls.pop()

    def _after(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls = self._state.calls
        call = calls.pop() if calls else _Call()
        if call.inputs is None:
            return None
        token_map = call.token_map
        merged_shape = token_map and (len(token_map.slots), token_map.merged_tokens)
        if token_map is not None and isinstance(output, Tensor) and output.shape[:2] == merged_shape:
            return token_map.unmerge(output)
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.ndim == 3 and first.shape[1] == call.tokens:
            return None
        self._odd_output = "its attention gave something else than its tokens"
        whole = call.inputs.each(lambda value: value())
        return attention.forward(*whole.args, **whole.kwargs)


def _left_to(attention: nn.Module) -> str | None:
    """Whose code inside attention counts on all tokens, so that the layer is left to it; or None."""
    name = whose_forward(attention)
    if name:
        return f"left to {name}, which has its own forward there"
    parts = [attention, *(getattr(attention, part, None) for part in ("to_q", "to_k", "to_v", "to_out"))]
    to_out = parts[-1]
    for part in (*parts, *(to_out.children() if isinstance(to_out, nn.Module) else ())):
        name = whose_hook(part) if isinstance(part, nn.Module) else None
        if name:
            return f"left to {name}, whose hook sees its tokens"
    return None


def _grid_of(x: Any) -> Grid | None:
    """The rows and columns of an image [B, C, H, W]; None for anything else."""
    return (x.shape[2], x.shape[3]) if isinstance(x, Tensor) and x.ndim == 4 else None


def _weak(value: Any) -> Callable[[], Any]:
    """Gives `value`, without keeping it alive if it is a tensor."""
    return weakref.ref(value) if isinstance(value, Tensor) else lambda: value


def _will_run_again(x: Tensor) -> bool:
    """Whether x runs under gradient checkpointing: it needs a gradient, and yet none is recorded."""
    return x.requires_grad and not torch.is_grad_enabled()


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
