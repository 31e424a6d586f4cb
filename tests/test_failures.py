"""Failures of merging, and detaching in the middle of a pass: the picture is made all the same."""

import copy
import sys
import threading

import pytest
import torch
from layer_calls import FIRST
from ldm.modules.attention import CrossAttention
from single_block import block_around
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
    frame = sys._getframe(2)
    while frame is not None:
        if "tomesd_core" in frame.f_code.co_filename:
            return True
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module):
            return False
        frame = frame.f_back
    return False


def failures(run, error):
    """Run once per operation of merging, which fails."""
    at = 1
    while True:
        with Failing(at, error) as failing:
            output = run()
        if failing.ran < at:
            return
        yield output
        at += 1


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 960.00 MiB", "not implemented"]
)
def test_each_operation_of_a_merged_layer_may_fail(small_settings, method, message):
    block, x = block_around(CrossAttention(32, heads=2, dim_head=16)), torch.randn(2, 32, 8, 8)
    settings, summaries = small_settings(method=method), []
    unmerged = block(x)

    def run():
        with tome.attach(block, settings) as merging:
            output = block(x)
        summaries.append(merging.report().summary)
        assert not merging.has_unfinished_call
        return output

    outputs = list(failures(run, RuntimeError(message)))
    assert len(outputs) > 15
    for output, summary in zip(outputs, summaries, strict=False):
        assert torch.equal(output, unmerged)
        # An error in a probe is the attention's answer, unless memory ran out.
        assert (
            f"merging failed: RuntimeError: {message}" in summary
            or "unknown logit scale" in summary
        )
    assert "1 of 1 self" in summaries[-1]


def test_a_failing_map_recorder_costs_no_picture(unet, small_settings, make_inputs, method):
    unmerged = unet(*make_inputs())
    with tome.attach(unet, small_settings(method=method), on_map=lambda *_: [][0]) as merging:
        assert torch.equal(unet(*make_inputs()), unmerged)
    assert "IndexError" in merging.report().summary
    assert merging.report().merged_steps == 0


def test_an_error_of_attention_itself_is_raised(
    unet, small_settings, make_inputs, blocks_of, method
):
    inputs = make_inputs()
    with tome.attach(unet, small_settings(method=method)) as merging:
        right = unet(*inputs)
        assert not merging.has_unfinished_call
        blow = blocks_of(unet)[FIRST].attn1.to_v.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            unet(*inputs)
        assert merging.has_unfinished_call
        blow.remove()
        merging.set_step(0)
        assert torch.equal(unet(*inputs), right)
        assert not merging.has_unfinished_call
        assert merging.report().layers[0].merged_calls == 2


def test_a_probe_that_ran_out_of_memory_is_repeated(
    unet, small_settings, make_inputs, blocks_of, monkeypatch
):
    kind = type(blocks_of(unet)[FIRST].attn1)
    usual, is_full = kind.forward, True

    def forward(self, x, context=None, mask=None):
        if is_full and x.shape[1] == PROBE_TOKENS:
            raise MemoryError
        return usual(self, x, context, mask)

    monkeypatch.setattr(kind, "forward", forward)
    with tome.attach(unet, small_settings(method="keys")) as merging:
        unet(*make_inputs())
    assert "MemoryError" in merging.report().summary
    is_full = False
    with tome.attach(unet, small_settings(method="keys")) as merging:
        unet(*make_inputs())
    assert len(merging.report().merged_layers) == 3


def test_an_attach_that_fails_midway_leaves_nothing(
    unet, small_settings, make_inputs, hook_dicts, blocks_of
):
    before, block = hook_dicts(unet), list(blocks_of(unet).values())[3]
    norm, block.norm1 = block.norm1, None
    with pytest.raises(AttributeError):
        tome.attach(unet, small_settings())
    block.norm1 = norm
    assert hook_dicts(unet) == before


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


DETACH = {
    "here": lambda unet, merging: merging.detach(),
    "in a thread": lambda unet, merging: in_a_thread(merging.detach),
    "remove_patch": lambda unet, merging: in_a_thread(lambda: tome.remove_patch(unet)),
}


def test_threads_that_detach_at_once_take_turns(hook_dicts):
    block = block_around(CrossAttention(32, heads=2, dim_head=16))
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


@pytest.fixture(params=DETACH)
def detach(request):
    return DETACH[request.param]


@pytest.mark.parametrize("where", ["attn1.to_q", "attn1.to_out", "attn2"])
def test_a_pass_during_which_merging_is_detached_ends_as_it_began(
    unet, small_settings, make_inputs, hook_dicts, blocks_of, method, where, detach
):
    before, inputs = hook_dicts(unet), make_inputs()
    unmerged = unet(*inputs)
    with tome.attach(unet, small_settings(method=method)):
        merged = unet(*inputs)
    part = list(blocks_of(unet).values())[1].get_submodule(where)
    with tome.attach(unet, small_settings(method=method)) as merging:
        blow = part.register_forward_pre_hook(lambda *_: detach(unet, merging))
        assert torch.equal(unet(*inputs), merged)
        blow.remove()
        assert hook_dicts(unet) == before
        assert torch.equal(unet(*inputs), unmerged)
    assert len(merging.report().merged_layers) == 3


def test_nothing_stays_after_a_detached_pass_that_raised(
    unet, small_settings, make_inputs, hook_dicts, blocks_of, method, detach
):
    before, inputs = hook_dicts(unet), make_inputs()
    unmerged, part = unet(*inputs), blocks_of(unet)[FIRST].attn1.to_out

    def blow(*_):
        detach(unet, merging)
        raise ZeroDivisionError

    for then in ("a pass", "the handle"):
        merging = tome.attach(unet, small_settings(method=method))
        handle = part.register_forward_pre_hook(blow)
        with pytest.raises(ZeroDivisionError):
            unet(*inputs)
        handle.remove()
        if then == "a pass":
            assert torch.equal(unet(*inputs), unmerged)
        else:
            merging.detach()
        assert hook_dicts(unet) == before


def test_another_attach_during_a_pass_merges_nothing_twice(
    unet, small_settings, make_inputs, hook_dicts, blocks_of, method
):
    before, inputs = hook_dicts(unet), make_inputs()
    with tome.attach(unet, small_settings(method=method)):
        merged = unet(*inputs)
    first = tome.attach(unet, small_settings(method=method))
    part = list(blocks_of(unet).values())[1].attn1.to_out
    handle = part.register_forward_pre_hook(lambda *_: tome.attach(unet, first.settings) and None)
    output = unet(*inputs)
    handle.remove()
    assert torch.equal(output, merged)
    assert torch.equal(unet(*inputs), merged)
    tome.remove_patch(unet)
    assert hook_dicts(unet) == before


def test_a_copy_made_during_a_pass_does_not_merge(
    unet, small_settings, make_inputs, blocks_of, method
):
    inputs, copies = make_inputs(), []
    unmerged = unet(*inputs)
    with tome.attach(unet, small_settings(method=method)):
        merged = unet(*inputs)
        part = list(blocks_of(unet).values())[1].attn1.to_out
        handle = part.register_forward_pre_hook(
            lambda *_: None if copies else copies.append(copy.deepcopy(unet))
        )
        unet(*inputs)
        handle.remove()
        assert torch.equal(copies[0](*inputs), unmerged)
        assert not torch.equal(merged, unmerged)


class Sharing(nn.Module):
    """Another extension's module in place of attn1 that needs all tokens, like LayerDiffuse's."""

    def __init__(self, inner):
        super().__init__()
        self.heads, self.inner = inner.heads, [inner]

    def forward(self, x, context=None, mask=None):
        return self.inner[0](x + {256: 0.1, 64: 0.2}[x.shape[1]], context=context, mask=mask)


def test_a_layer_with_a_foreign_module_as_attention_is_not_merged(
    unet, small_settings, make_inputs, blocks_of, method
):
    for block in blocks_of(unet).values():
        block.attn1 = Sharing(block.attn1)
    inputs = make_inputs()
    unmerged = unet(*inputs)
    with tome.attach(unet, small_settings(method=method)) as merging:
        assert torch.equal(unet(*inputs), unmerged)
    assert __name__ in merging.report().summary and "attn1" in merging.report().summary


def test_unmerged_calls_of_a_merged_layer_are_counted(
    unet, small_settings, make_inputs, blocks_of, monkeypatch
):
    block = blocks_of(unet)[FIRST]

    def with_reference(x, context=None):
        y = block.norm1(x)
        block.attn1(y, context=torch.cat([y, y], dim=1))
        return block.attn1(y) + x

    monkeypatch.setattr(block, "_forward", with_reference)
    settings = small_settings(method="keys", ratio=0.5, late_ratio=0.0, schedule="linear")
    with tome.attach(unet, settings) as merging:
        for step in range(2):
            merging.set_step(step, 2)
            unet(*make_inputs())
    # Calls that aren't merged because of the step's ratio don't count.
    assert "2 of 8 calls not merged" in merging.report().summary
