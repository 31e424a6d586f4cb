"""Whatever fails in merging costs no picture, and whenever it is taken off, the running pass ends
as it began."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tomesd_core as tome
from tomesd_core.probe import forget_heads
from tomesd_core.settings import METHODS

FIRST = "input_blocks.1.1.transformer_blocks.0"


@pytest.fixture
def unet(make_unet):
    return make_unet()


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def only_first(unet, blocks_of):
    """A `leave_out` that lets the first layer merge alone."""
    first = blocks_of(unet)[FIRST].attn1
    return lambda attention: None if attention is first else "not this one"


class Failing(TorchDispatchMode):
    """While it is open, merging's own operation number `at` raises; those of the model run."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.ran = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_ours():
            self.ran += 1
            if self.ran == self.at:
                raise self.error
        return func(*args, **(kwargs or {}))


def is_ours():
    """Whether the innermost code that runs is merging's, and not that of an attention inside of it."""
    frame = sys._getframe(2)
    while frame is not None:
        if "tomesd_core" in frame.f_code.co_filename:
            return True
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module):
            return False
        frame = frame.f_back
    return False


def failures(run, error):
    """Runs once for each operation of merging, which fails in that run."""
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
def test_each_operation_of_a_merged_layer_may_fail(
    unet, small_settings, make_inputs, only_first, method, message
):
    inputs, settings, summaries = make_inputs((8, 8)), small_settings(method=method), []
    unmerged = unet(*inputs)

    def run():
        with tome.attach(unet, settings, only_first) as merging:
            output = unet(*inputs)
        summaries.append(merging.report().summary)
        assert not merging.has_unfinished_call
        return output

    outputs = list(failures(run, RuntimeError(message)))
    assert len(outputs) > 15
    for output, summary in zip(outputs, summaries, strict=False):
        assert torch.equal(output, unmerged)
        # What fails in a probe is the attention's answer, but for a lack of memory.
        assert f"merging failed: RuntimeError: {message}" in summary or "unknown logit scale" in summary
    assert "1 of 7 self-attention layers" in summaries[-1]


def test_what_a_recorder_of_maps_raises_costs_no_picture(unet, small_settings, make_inputs, method):
    unmerged = unet(*make_inputs())
    with tome.attach(unet, small_settings(method=method), on_map=lambda *_: [][0]) as merging:
        assert torch.equal(unet(*make_inputs()), unmerged)
    assert "merging failed: IndexError" in merging.report().summary
    assert merging.report().merged_steps == 0


def test_memory_that_attention_itself_lacks_is_its_own_error(
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


def test_a_probe_that_lacks_memory_for_a_moment_is_asked_again(
    unet, small_settings, make_inputs, monkeypatch
):
    def full(self, x):
        raise MemoryError

    forget_heads()
    with monkeypatch.context() as patch:
        patch.setattr("tomesd_core.probe._Probe.queries", full)
        with tome.attach(unet, small_settings(method="keys")) as merging:
            unet(*make_inputs())
        assert "merging failed: MemoryError" in merging.report().summary
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


# Taken off in the middle of a pass.


def detach_here(merging):
    merging.detach()


def detach_in_a_thread(merging):
    thread = threading.Thread(target=merging.detach)
    thread.start()
    thread.join()


def remove_patch_in_a_thread(merging):
    thread = threading.Thread(target=tome.remove_patch, args=[merging._unet()])
    thread.start()
    thread.join()


def attach_another(merging):
    tome.attach(merging._unet(), merging.settings)


DETACH = detach_here, detach_in_a_thread, remove_patch_in_a_thread


@pytest.mark.parametrize("detach", DETACH)
@pytest.mark.parametrize("where", ["attn1.to_q", "attn1.to_out", "attn2"])
def test_a_pass_in_which_merging_is_taken_off_ends_as_it_began(
    unet, small_settings, make_inputs, hook_dicts, blocks_of, method, where, detach
):
    before, inputs = hook_dicts(unet), make_inputs()
    unmerged = unet(*inputs)
    with tome.attach(unet, small_settings(method=method)):
        merged = unet(*inputs)
    part = list(blocks_of(unet).values())[1].get_submodule(where)
    with tome.attach(unet, small_settings(method=method)) as merging:
        blow = part.register_forward_pre_hook(lambda *_: detach(merging))
        assert torch.equal(unet(*inputs), merged)
        blow.remove()
        assert hook_dicts(unet) == before
        assert torch.equal(unet(*inputs), unmerged)
    assert len(merging.report().merged_layers) == 3


@pytest.mark.parametrize("detach", DETACH)
def test_after_a_pass_that_raised_nothing_stays_either(
    unet, small_settings, make_inputs, hook_dicts, blocks_of, method, detach
):
    before, inputs = hook_dicts(unet), make_inputs()
    unmerged, part = unet(*inputs), blocks_of(unet)[FIRST].attn1.to_out

    def blow(*_):
        detach(merging)
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


def test_another_attach_in_the_middle_of_a_pass_merges_nothing_twice(
    unet, small_settings, make_inputs, hook_dicts, blocks_of, method
):
    before, inputs = hook_dicts(unet), make_inputs()
    with tome.attach(unet, small_settings(method=method)):
        merged = unet(*inputs)
    first = tome.attach(unet, small_settings(method=method))
    part = list(blocks_of(unet).values())[1].attn1.to_out
    handle = part.register_forward_pre_hook(lambda *_: attach_another(first))
    output = unet(*inputs)
    handle.remove()
    assert torch.equal(output, merged)
    assert torch.equal(unet(*inputs), merged)
    tome.remove_patch(unet)
    assert hook_dicts(unet) == before


def test_a_copy_made_in_the_middle_of_a_pass_does_not_merge(
    unet, small_settings, make_inputs, blocks_of, method
):
    inputs, copies = make_inputs(), []
    unmerged = unet(*inputs)
    with tome.attach(unet, small_settings(method=method)):
        merged = unet(*inputs)
        part = list(blocks_of(unet).values())[1].attn1.to_out
        handle = part.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(unet)))
        unet(*inputs)
        handle.remove()
        part = list(blocks_of(copies[0]).values())[1].attn1.to_out
        part._forward_pre_hooks.pop(handle.id)
        assert torch.equal(copies[0](*inputs), unmerged)
        assert not torch.equal(merged, unmerged)


# A module of another extension in the place of attn1.


class Sharing(nn.Module):
    """It counts on all tokens, as LayerDiffuse's."""

    def __init__(self, inner):
        super().__init__()
        self.heads, self.inner = inner.heads, [inner]

    def forward(self, x, context=None, mask=None):
        return self.inner[0](x + {256: 0.1, 64: 0.2}[x.shape[1]], context=context, mask=mask)


def test_a_module_in_the_place_of_attention_is_left_whole_and_named(
    unet, small_settings, make_inputs, blocks_of, method
):
    for block in blocks_of(unet).values():
        block.attn1 = Sharing(block.attn1)
    inputs = make_inputs()
    unmerged = unet(*inputs)
    with tome.attach(unet, small_settings(method=method)) as merging:
        assert torch.equal(unet(*inputs), unmerged)
    assert f"left to {__name__}, which replaces attn1" in merging.report().summary


def test_calls_that_a_merged_layer_leaves_whole_are_counted(
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
    # Of the last step's calls none is counted but that which the ratio has no part in.
    assert "; 2 of 8 calls not merged: it attends to other tokens too" in merging.report().summary
