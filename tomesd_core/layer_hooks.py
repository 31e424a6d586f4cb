"""One self-attention layer's hooks: merge the inputs of its attention, and unmerge the output.

A call of `attn1` goes on the layer's stack once its inputs are merged, and comes off it with its
output. Whatever of ours fails before that leaves the call unmerged; whatever fails later has the
call repeated unmerged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .foreign_hooks import Hook, whose_forward, whose_hook
from .passes import LayerPass, Place
from .proportional import Projections, Rest, Weighted, has_projections, probe_heads
from .reasons import NotMerged
from .report import LayerReport
from .token_map import TokenMap
from .unet import Layer, Names

if TYPE_CHECKING:
    from .hooks import Merging

ODD_OUTPUT = "its attention returned an unexpected shape"

# A private function of torch: without it nothing is known of backward, and checkpointed passes look
# like any other.
_graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of a call of `attn1`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: Names

    def _get(self, place: int, name: str) -> Any:
        """An argument by position or name; None if absent."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    @property
    def x(self) -> Any:
        """The tokens."""
        return self._get(0, self.names.tokens)

    @property
    def context(self) -> Any:
        """What the tokens attend to, where that isn't themselves."""
        return self._get(1, self.names.context)

    @property
    def mask(self) -> Any:
        """A mask for each token."""
        return self._get(2, self.names.mask)

    @property
    def attends_to_itself(self) -> bool:
        """Whether the keys are made of x."""
        return self.context is None or self.context is self.x

    def each(self, change: Callable[[Any], Any]) -> Inputs:
        """All of them changed."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return Inputs(tuple(map(change, self.args)), kwargs, self.names)

    def with_context(self, context: Tensor) -> Inputs:
        """With another context."""
        return self._replaced(1, self.names.context, context)

    def with_x(self, x: Tensor) -> Inputs:
        """With other tokens."""
        return self._replaced(0, self.names.tokens, x)

    def _replaced(self, place: int, name: str, value: Any) -> Inputs:
        """One of them replaced, or added: by position if it is positional, else by name."""
        if place < len(self.args):
            return dataclasses.replace(
                self, args=(*self.args[:place], value, *self.args[place + 1 :])
            )
        return dataclasses.replace(self, kwargs={**self.kwargs, name: value})


@dataclasses.dataclass
class Call:
    """A running call of `attn1`: unmerged, unless it is a `MergedCall`."""

    weighted: Weighted | None = None
    """What the hooks on its projections do."""


@dataclasses.dataclass(kw_only=True)
class MergedCall(Call):
    """A running call of `attn1` whose inputs are merged."""

    inputs: Inputs
    """The original arguments, each as `_weak` gives it."""
    tokens: int
    token_map: TokenMap
    has_merged_queries: bool
    output: Any = None
    """Of the same call unmerged, where it had to be repeated."""

    def unmerge(self, output: Any) -> Any:
        """The output of attention for every token. Raises `NotMerged` where it isn't of the tokens
        that went in."""
        merged_shape = self.token_map.shape[0], self.token_map.merged_tokens
        if (
            self.has_merged_queries
            and isinstance(output, Tensor)
            and output.shape[:2] == merged_shape
        ):
            return self.token_map.unmerge(output)
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.ndim == 3 and first.shape[1] == self.tokens:
            return output
        raise NotMerged(ODD_OUTPUT)


class LayerHooks:
    """The hooks of one self-attention layer."""

    def __init__(self, merging: Merging, layer: Layer, place: Any) -> None:
        """`place` is what the layer's `Place` is kept under, in the passes of `merging`."""
        self._merging, self._place_key = merging, place
        self.heads, self._names = layer.heads, layer.names
        self.report = LayerReport(layer.name, layer.level, method=merging.settings.method)
        self._was_checkpointed = False
        self._odd_output: str | None = None
        self._projections: Projections | None = None

    def register(self, layer: Layer) -> Iterator[RemovableHandle]:
        """Puts the hooks on the layer's modules, one after the other."""
        attention = layer.block.attn1
        if not layer.is_self_attention:
            self.report.reason = f"it is not self-attention ({layer.names.never_itself})"
            return
        if layer.is_compiled:
            self.report.reason = "it is compiled (torch.compile), and hooks can't reach into that"
            return
        yield layer.block.norm1.register_forward_hook(Hook(self._after_norm))
        yield attention.register_forward_pre_hook(Hook(self._before), with_kwargs=True)
        yield attention.register_forward_hook(Hook(self._after))
        if self._merging.settings.weights_keys and has_projections(attention):
            self._projections = Projections(attention, self._running, self._repeat_weighted)
            yield from self._projections.register()

    @property
    def _state(self) -> LayerPass:
        return self._merging.passes.layers[self]

    @property
    def _place(self) -> Place:
        return self._merging.passes.places.get(self._place_key) or Place(level=self.report.level)

    def _running(self) -> Weighted | None:
        calls = self._state.calls
        return calls[-1].weighted if calls else None

    @contextlib.contextmanager
    def _runs(self, call: Call) -> Iterator[None]:
        """Makes `call` the innermost one: for the projections' hooks, it is the running call."""
        calls = self._state.calls
        calls.append(call)
        try:
            yield
        finally:
            calls.pop()

    def _after_norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._place.reason is None and args and isinstance(output, Tensor):
            self._state.normed = weakref.ref(args[0]), weakref.ref(output)
            self._was_checkpointed |= will_run_again(args[0])

    def _before(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, inputs = Call(), Inputs(args, kwargs, self._names)
        if is_in_backward():
            if self.report.merged_calls and not self._was_checkpointed:
                raise RuntimeError(
                    f"{self.report.name} was merged, and gradient checkpointing runs it again in backward, where it "
                    "would not be: detach merging, or switch checkpointing off (use_checkpoint=False)"
                )
        else:
            try:
                call, inputs = self._merge(attention, inputs)
            except NotMerged as reason:
                self.report.count_whole(str(reason), by_ratio=reason.by_ratio)
            except Exception as error:
                # The picture is worth more than its speed.
                self.report.count_whole(self._merging.fail(error))
        self._state.calls.append(call)
        return inputs.args, inputs.kwargs

    def _merge(self, attention: nn.Module, inputs: Inputs) -> tuple[MergedCall, Inputs]:
        """The call with its merged inputs. Raises `NotMerged` with the reason where it stays whole."""
        self.report.calls += 1
        self.report.level = self._place.level
        grid = self._check(attention, inputs)
        merging, state, x = self._merging, self._state, inputs.x
        source, normed = (ref() for ref in state.normed) if state.normed else (None, None)
        # A call with another tensor than norm1's output (part of the batch, say) is matched by its
        # own input.
        source = source if normed is x and source is not None else x
        self.report.tokens = x.shape[1]
        token_map = merging.token_map(self, source, grid)
        # Keys from elsewhere aren't merged and keep weight 1.
        weights = merging.settings.weights_keys and inputs.attends_to_itself
        heads = None
        if weights:
            heads = probe_heads(
                attention, x, lambda probe: self._runs(Call(probe)), merging.refusals
            )
        merged = token_map.merge(x)
        queries = merged if merging.settings.merges_queries else x
        # Every argument that is x itself is replaced; others aren't merged.
        arguments = inputs.each(lambda value: merged if value is x else value)
        call = MergedCall(
            Weighted(heads, queries, token_map.counts, x.shape[1]) if heads else None,
            inputs=inputs.each(_weak),
            tokens=x.shape[1],
            token_map=token_map,
            has_merged_queries=merging.settings.merges_queries,
        )
        if heads is not None or queries is x:
            arguments = arguments.with_context(merged)
        if heads is not None:
            queries = heads.stand_in(queries)
        if merging.on_map is not None:
            merging.on_map(self.report.name, merging.passes.step.number, grid, token_map)
        return call, arguments.with_x(queries)

    def _check(self, attention: nn.Module, inputs: Inputs) -> tuple[int, int]:
        """The grid of the call's tokens. Raises `NotMerged` where anything but their number keeps
        the call whole."""
        merging, place, x = self._merging, self._place, inputs.x
        if reason := place.reason or merging.failure or self._odd_output:
            raise NotMerged(reason)
        if place.grid is None:
            raise NotMerged("its token grid is unknown")
        rows, columns = place.grid
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise NotMerged("its input is not a batch of tokens")
        if x.shape[1] != rows * columns:
            raise NotMerged(f"its {x.shape[1]} tokens are not the grid's {rows}x{columns}")
        if inputs.mask is not None and inputs.attends_to_itself:
            raise NotMerged("its attention has a mask for each token")
        value = inputs.kwargs.get("value")
        is_whole = inputs.attends_to_itself and (value is None or value is x)
        if not merging.settings.merges_queries and not is_whole:
            raise NotMerged("it attends to other tokens too")
        self._was_checkpointed |= merging.passes.is_checkpointed
        if self._was_checkpointed:
            raise NotMerged("backward would run it again (gradient checkpointing)")
        if merging.settings.weights_keys and getattr(attention, "fused_projections", False):
            raise NotMerged("its projections are fused (the method paper takes them)")
        self.report.conflict = (merging.leave_out and merging.leave_out(attention)) or conflict_in(
            attention, merging.ignored
        )
        if self.report.conflict:
            raise NotMerged(self.report.conflict)
        if self._projections is not None and not self._projections.are_hooked:
            merging.keep(self._projections.register())
        return rows, columns

    def _after(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls = self._state.calls
        call = calls.pop() if calls else None
        if not isinstance(call, MergedCall):
            return None
        if call.output is not None:
            return call.output
        try:
            unmerged = call.unmerge(output)
        except NotMerged as reason:
            self._odd_output = str(reason)
            self.report.count_whole(str(reason))
        except Exception as error:
            self.report.count_whole(self._merging.fail(error))
        else:
            self.report.count_merged(call.token_map.merged_tokens)
            self._merging.count_merged_step()
            return unmerged
        calls.append(call)  # It stays there if the repetition fails too.
        whole = self._repeat(attention, call)
        calls.pop()
        return whole

    def _repeat(self, attention: nn.Module, call: MergedCall) -> Any:
        """The output of the call without merging."""
        whole = call.inputs.each(lambda value: value())
        with self._runs(Call()):
            return attention.forward(*whole.args, **whole.kwargs)

    def _repeat_weighted(self, attention: nn.Module, error: Exception) -> Weighted:
        """Repeats the running call unmerged, after an error in a hook on its projections; gives
        what these do then."""
        call = self._state.calls[-1]
        if not isinstance(call, MergedCall) or call.weighted is None:
            raise error
        self.report.count_whole(self._merging.fail(error))
        call.output = self._repeat(attention, call)
        call.weighted = Rest(call.weighted.heads)
        return call.weighted


def conflict_in(attention: nn.Module, ignored: Collection[str]) -> str | None:
    """Whose code inside attention counts on all tokens, but for a `forward` of `ignored` modules;
    None: nobody's."""
    if not has_projections(attention):
        return f"left to {type(attention).__module__}, which replaces attn1"
    name = whose_forward(attention)
    if name and name not in ignored:
        return f"left to {name}, which replaces its forward"
    to_out: Any = attention.to_out
    for part in (
        attention,
        attention.to_q,
        attention.to_k,
        attention.to_v,
        to_out,
        *to_out.children(),
    ):
        if name := whose_hook(part):
            return f"left to {name}, which hooks it"
    return None


def will_run_again(x: Tensor) -> bool:
    """Whether x runs under gradient checkpointing: it needs a gradient, and yet none is recorded."""
    return x.requires_grad and not torch.is_grad_enabled()


def is_in_backward() -> bool:
    """Whether autograd's engine is running in this thread."""
    return bool(_graph_task_id() != -1)


def _weak(value: Any) -> Callable[[], Any]:
    """A function that gives `value`, without keeping it alive if it is a tensor."""
    return weakref.ref(value) if isinstance(value, Tensor) else lambda: value
