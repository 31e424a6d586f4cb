"""The hooks of one self-attention layer: merge the inputs of its attention, unmerge the output.

A call of `attn1` goes on the layer's stack once its inputs are merged, and comes off with its
output. An error of merging before that leaves the call unmerged; a later one repeats it unmerged.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .foreign_hooks import Hook, whose_forward, whose_hook
from .passes import Call, Grid, Inputs, LayerPass, MergedCall, Place, held_weakly
from .probe import probe_heads
from .proportional import Projections, Rest, Weighted, has_projections
from .reasons import NotMerged
from .report import LayerReport
from .unet import Layer, is_compiled

if TYPE_CHECKING:
    from .hooks import Merging

# Private in torch. Without it backward can't be detected, and a pass under checkpointing looks like
# any other.
_graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)


class LayerHooks:
    """The hooks of one self-attention layer."""

    def __init__(self, merging: Merging, layer: Layer, handles: contextlib.ExitStack) -> None:
        """Register the hooks; closing `handles` removes them."""
        self._merging, self._transformer = merging, weakref.ref(layer.transformer)
        self.heads, self._names = layer.heads, layer.names
        self.report = LayerReport(layer.name, layer.level, method=merging.settings.method)
        self._was_checkpointed = False
        self._odd_output: str | None = None
        self._projections: Projections | None = None
        keep, attention = handles.enter_context, layer.block.attn1
        if not layer.is_self_attention:
            self.report.reason = f"it is not self-attention ({layer.names.never_itself})"
            return
        if any(map(is_compiled, (layer.transformer, layer.block, attention))):
            self.report.reason = "it is compiled (torch.compile), which bypasses hooks"
            return
        keep(layer.block.norm1.register_forward_hook(Hook(self._after_norm)))
        keep(attention.register_forward_pre_hook(Hook(self._before), with_kwargs=True))
        keep(attention.register_forward_hook(Hook(self._after)))
        if merging.settings.weights_keys and has_projections(attention):
            self._projections = Projections(attention, self._running, self._repeat_weighted)
            keep(self._projections.handles)
            self._projections.register()

    @property
    def _state(self) -> LayerPass:
        return self._merging.passes.layers[self]

    @property
    def _place(self) -> Place:
        return self._merging.passes.places.get(self._transformer) or Place(level=self.report.level)

    def _running(self) -> Weighted | None:
        calls = self._state.calls
        return calls[-1].weighted if calls else None

    @contextlib.contextmanager
    def _runs(self, call: Call) -> Iterator[None]:
        """Make `call` the innermost call, the one that the projections' hooks serve."""
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
                    f"{self.report.name} was merged, and gradient checkpointing reruns it in "
                    "backward, unmerged: detach merging or switch checkpointing off"
                )
        else:
            try:
                call, inputs = self._merge(attention, inputs)
            except NotMerged as reason:
                self.report.count_unmerged(str(reason), by_ratio=reason.by_ratio)
            except Exception as error:
                # The picture is worth more than its speed.
                self.report.count_unmerged(self._merging.fail(error))
        self._state.calls.append(call)
        return inputs.args, inputs.kwargs

    def _merge(self, attention: nn.Module, inputs: Inputs) -> tuple[MergedCall, Inputs]:
        """The call and its merged inputs. Raises `NotMerged` with the reason."""
        merging, state, x = self._merging, self._state, inputs.x
        self.report.calls += 1
        self.report.level = self._place.level
        grid = self._check_inputs(inputs)
        self._check_attention(attention)
        source, normed = (ref() for ref in state.normed) if state.normed else (None, None)
        # A call with another tensor than norm1's output, part of the batch for example, is matched
        # by its own input.
        source = source if normed is x and source is not None else x
        self.report.tokens = x.shape[1]
        token_map = merging.token_map(self, source, grid)
        # Keys from elsewhere aren't merged and keep weight 1.
        heads = None
        if merging.settings.weights_keys and inputs.attends_to_itself:
            heads = probe_heads(
                attention, x, lambda probe: self._runs(Call(probe)), merging.refusals
            )
        merged = token_map.merge(x)
        queries = merged if merging.settings.merges_queries else x
        # Replace every argument that is x itself; others aren't merged.
        arguments = inputs.each(lambda value: merged if value is x else value)
        call = MergedCall(
            Weighted(heads, queries, token_map.counts, x.shape[1]) if heads else None,
            inputs=inputs.each(held_weakly),
            token_map=token_map,
            has_merged_queries=merging.settings.merges_queries,
        )
        if heads is not None or queries is x:
            arguments = arguments.replaced(1, self._names.context, merged)
        if heads is not None:
            queries = heads.stand_in(queries)
        if merging.on_map is not None:
            merging.on_map(self.report.name, merging.passes.step.number, grid, token_map)
        return call, arguments.replaced(0, self._names.hidden, queries)

    def _check_inputs(self, inputs: Inputs) -> Grid:
        """The grid of the call's tokens. Raises `NotMerged` if they can't be merged."""
        merging, place, x = self._merging, self._place, inputs.x
        if reason := place.reason or merging.failure or self._odd_output:
            raise NotMerged(reason)
        if place.grid is None:
            raise NotMerged("its token grid is unknown")
        rows, columns = place.grid
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise NotMerged("its input is not a batch of tokens")
        if x.shape[1] != rows * columns:
            raise NotMerged(f"its {x.shape[1]} tokens don't fit the {rows}x{columns} grid")
        if inputs.mask is not None and inputs.attends_to_itself:
            raise NotMerged("its attention has a mask")
        value = inputs.kwargs.get("value")
        is_plain = inputs.attends_to_itself and (value is None or value is x)
        if not merging.settings.merges_queries and not is_plain:
            raise NotMerged("it attends to other tokens too")
        return rows, columns

    def _check_attention(self, attention: nn.Module) -> None:
        """Raises `NotMerged` if the attention's implementation, or other code in it, forbids it."""
        merging = self._merging
        self._was_checkpointed |= merging.passes.is_checkpointed
        if self._was_checkpointed:
            raise NotMerged("gradient checkpointing would rerun it in backward")
        if merging.settings.weights_keys and getattr(attention, "fused_projections", False):
            raise NotMerged("its projections are fused (only the method paper merges them)")
        excluded = merging.leave_out and merging.leave_out(attention)
        self.report.conflict = excluded or conflict_in(attention, merging.ignored)
        if self.report.conflict:
            raise NotMerged(self.report.conflict)
        if self._projections is not None and not self._projections.are_hooked:
            self._projections.register()

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
            self.report.count_unmerged(str(reason))
        except Exception as error:
            self.report.count_unmerged(self._merging.fail(error))
        else:
            self.report.count_merged(call.token_map.merged_tokens)
            self._merging.count_merged_step()
            return unmerged
        calls.append(call)  # Stays on the stack if the repetition fails too.
        whole = self._repeat(attention, call)
        calls.pop()
        return whole

    def _repeat(self, attention: nn.Module, call: MergedCall) -> Any:
        """The output of the call without merging."""
        whole = call.inputs.each(lambda value: value())
        with self._runs(Call()):
            return attention.forward(*whole.args, **whole.kwargs)

    def _repeat_weighted(self, attention: nn.Module, error: Exception) -> Weighted:
        """Repeat the call unmerged after an error in a projection's hook; return its rest."""
        call = self._state.calls[-1]
        if not isinstance(call, MergedCall) or call.weighted is None:
            raise error
        self.report.count_unmerged(self._merging.fail(error))
        call.output = self._repeat(attention, call)
        call.weighted = Rest(call.weighted.heads)
        return call.weighted


def conflict_in(attention: nn.Module, ignored: Collection[str]) -> str | None:
    """Reason not to merge because of foreign code that relies on the token count; None if absent.

    A replaced `forward` of the Python modules in `ignored` is no reason.
    """
    if not has_projections(attention):
        return f"left to {type(attention).__module__}, which replaces attn1"
    name = whose_forward(attention)
    if name and name not in ignored:
        return f"left to {name}, which replaces its forward"
    to_out: Any = attention.to_out
    projections = attention.to_q, attention.to_k, attention.to_v, to_out, *to_out.children()
    for part in (attention, *projections):
        if name := whose_hook(part):
            return f"left to {name}, which hooks it"
    return None


def will_run_again(x: Tensor) -> bool:
    """Whether x runs under gradient checkpointing: it needs a gradient, but none is recorded."""
    return x.requires_grad and not torch.is_grad_enabled()


def is_in_backward() -> bool:
    """Whether autograd's engine is running in this thread."""
    return bool(_graph_task_id() != -1)
