"""Failures of merging, and detaching in the middle of a pass: the picture is made all the same."""

import itertools
import threading
import traceback

import pytest
import torch
import torch.nn.functional as F
from layer_calls import FIRST
from ldm.modules.attention import CrossAttention
from single_block import ldm_block
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tomesd_core as tome
from tomesd_core.probe import PROBE_TOKENS


class Failing(TorchDispatchMode):
    """While open, merging's operation number `at` raises an error."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.ran = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_of_merging():
            self.ran += 1
            if self.ran == self.at:
                raise self.error
        return func(*args, **(kwargs or {}))


def is_of_merging():
    """Whether merging's code runs, and not an attention called by it."""
    for frame, _ in traceback.walk_stack(None):
        if "tomesd_core" in frame.f_code.co_filename:
            return True
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module):
            return False
    return False


@pytest.fixture
def settings(small_settings, method):
    return small_settings(method=method)


class KeysFirst(CrossAttention):
    """Projects its keys and values before its queries."""

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        k, v, q = self.to_k(context), self.to_v(context), self.to_q(x)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [CrossAttention, KeysFirst])
@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 960.00 MiB", "not implemented"]
)
def test_each_operation_of_a_merged_layer_may_fail(settings, kind, message):
    block, image = ldm_block(kind), torch.randn(2, 32, 8, 8)
    unmerged = block(image)
    for at in itertools.count(1):
        with (
            tome.attach(block, settings) as merging,
            Failing(at, RuntimeError(message)) as failing,
        ):
            output = block(image)
        assert not merging.has_unfinished_call
        summary = merging.report().summary
        if failing.ran < at:
            break
        assert torch.equal(output, unmerged)
        # An error in a probe is the attention's answer, unless memory ran out.
        assert (
            f"merging failed: RuntimeError: {message}" in summary
            or "unknown logit scale" in summary
        )
    assert at > 16
    assert "1 of 1 self" in summary


def test_a_failing_map_recorder_costs_no_picture(settings):
    block, image = ldm_block(), torch.randn(2, 32, 8, 8)
    unmerged = block(image)
    with tome.attach(block, settings, on_map=lambda *_: [][0]) as merging:
        assert torch.equal(block(image), unmerged)
    assert "IndexError" in merging.report().summary
    assert merging.report().merged_steps == 0


def test_a_probe_that_ran_out_of_memory_is_repeated(small_settings):
    class Attention(CrossAttention):
        is_memory_full = True

        def forward(self, x, context=None, mask=None):
            if self.is_memory_full and x.shape[1] == PROBE_TOKENS:
                raise MemoryError
            return super().forward(x, context, mask)

    block, image = ldm_block(Attention), torch.randn(2, 32, 8, 8)
    with tome.attach(block, small_settings(method="keys")) as merging:
        block(image)
    assert "MemoryError" in merging.report().summary
    Attention.is_memory_full = False
    with tome.attach(block, small_settings(method="keys")) as merging:
        block(image)
    assert len(merging.report().merged_layers) == 1


def test_an_attach_that_fails_midway_leaves_nothing(unet, hook_dicts, blocks_of):
    before, block = hook_dicts(unet), list(blocks_of(unet).values())[3]
    norm, block.norm1 = block.norm1, None
    with pytest.raises(AttributeError):
        tome.attach(unet)
    block.norm1 = norm
    assert hook_dicts(unet) == before


def test_threads_that_detach_at_once_take_turns(hook_dicts):
    block = ldm_block()
    before, merging = hook_dicts(block), tome.attach(block)
    assert hook_dicts(block) != before
    removing, may_go_on = threading.Event(), threading.Event()
    merging.handles.callback(lambda: (removing.set(), may_go_on.wait()))
    first, second = (threading.Thread(target=merging.detach) for _ in range(2))
    first.start()
    removing.wait()
    second.start()
    second.join(0.5)
    waits = second.is_alive()
    may_go_on.set()
    first.join()
    second.join()
    assert waits, "else both would take the same hook off the stack"
    assert hook_dicts(block) == before


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.fixture(
    params=[
        lambda unet, merging: merging.detach(),
        lambda unet, merging: in_a_thread(merging.detach),
        lambda unet, merging: in_a_thread(lambda: tome.remove_patch(unet)),
    ],
    ids=["here", "in a thread", "remove_patch"],
)
def detach(request):
    return request.param


@pytest.fixture
def merged(unet, inputs, settings):
    """The output of a merged pass."""
    with tome.attach(unet, settings):
        return unet(*inputs)


@pytest.mark.parametrize("where", ["attn1.to_q", "attn1.to_out", "attn2"])
def test_a_pass_during_which_merging_is_detached_ends_as_it_began(
    unet, settings, inputs, unmerged, merged, hook_dicts, where, detach
):
    before = hook_dicts(unet)
    with tome.attach(unet, settings) as merging:
        part = unet.get_submodule(f"{FIRST}.{where}")
        with part.register_forward_pre_hook(lambda *_: detach(unet, merging)):
            assert torch.equal(unet(*inputs), merged)
        assert hook_dicts(unet) == before
        assert torch.equal(unet(*inputs), unmerged)
    assert len(merging.report().merged_layers) == 3


@pytest.mark.parametrize("then", ["a pass", "the handle"])
def test_nothing_stays_after_a_detached_pass_that_raised(
    unet, settings, inputs, unmerged, hook_dicts, detach, then
):
    before, part = hook_dicts(unet), unet.get_submodule(FIRST).attn1.to_out
    merging = tome.attach(unet, settings)

    def blow(*_):
        detach(unet, merging)
        raise ZeroDivisionError

    with part.register_forward_pre_hook(blow), pytest.raises(ZeroDivisionError):
        unet(*inputs)
    if then == "a pass":
        assert torch.equal(unet(*inputs), unmerged)
    else:
        merging.detach()
    assert hook_dicts(unet) == before


def test_another_attach_during_a_pass_merges_nothing_twice(
    unet, settings, inputs, merged, hook_dicts
):
    before, part = hook_dicts(unet), unet.get_submodule(FIRST).attn1.to_out
    tome.attach(unet, settings)
    with part.register_forward_pre_hook(lambda *_: tome.attach(unet, settings) and None):
        assert torch.equal(unet(*inputs), merged)
    assert torch.equal(unet(*inputs), merged)
    tome.remove_patch(unet)
    assert hook_dicts(unet) == before
