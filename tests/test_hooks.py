"""`attach` and its handle: what is on the model while merging, and that nothing stays."""

import contextlib
import copy
import gc
import types
import weakref

import pytest
import torch
from layer_calls import FIRST, layer_named

import tomesd_core as tome
from tomesd_core.foreign_hooks import Hook


def identities(model):
    """Ids of each module with its class, attributes, parameters and buffers, without its hooks."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        {name: id(value) for name, value in part.items() if "hooks" not in name}
        for module in model.modules()
        for part in ({"itself": module, "class": type(module)}, vars(module), vars(type(module)))
    ] + [{name: id(value) for name, value in tensors.items()}]


def test_attaching_changes_no_class_forward_or_attribute(unet, whole, inputs):
    before = identities(unet)
    with tome.attach(unet, whole(max_downsample=2)):
        assert identities(unet) == before
        unet(*inputs)
        assert identities(unet) == before
    assert identities(unet) == before


def test_detaching_keeps_the_hooks_of_others(unet, whole, inputs, hook_dicts, blocks_of):
    called = set()
    for block in blocks_of(unet).values():
        block.attn1.register_forward_pre_hook(lambda *_: called.add("attn1"), with_kwargs=True)
        block.attn1.to_q.register_forward_pre_hook(lambda *_: called.add("to_q"))
        block.norm1.register_forward_hook(lambda *_: called.add("norm1"))
    unet.register_forward_pre_hook(lambda *_: called.add("unet"))
    before = hook_dicts(unet)
    merging = tome.attach(unet, whole())
    assert hook_dicts(unet) != before
    later = unet.middle_block.register_forward_hook(lambda *_: None)
    unet(*inputs)
    assert called == {"attn1", "to_q", "norm1", "unet"}
    merging.detach()
    assert hook_dicts(unet) != before
    later.remove()
    assert hook_dicts(unet) == before


def test_detaching_restores_every_bit_and_detaching_twice_is_harmless(
    unet, whole, inputs, unmerged, hook_dicts
):
    before = hook_dicts(unet)
    tome.remove_patch(unet)
    assert hook_dicts(unet) == before
    with tome.attach(unet, whole()) as merging:
        assert not torch.equal(unet(*inputs), unmerged)
        merging.detach()
        assert hook_dicts(unet) == before
        merging.detach()
    assert hook_dicts(unet) == before
    assert torch.equal(unet(*inputs), unmerged)


@pytest.mark.parametrize(
    "where", ["attn1", "attn1.to_q", "attn1.to_v", "attn1.to_out", "norm1", "attn2", "ff"]
)
def test_after_an_exception_in_the_unet_the_next_pass_is_right_and_nothing_stays(
    unet, whole, inputs, unmerged, make_inputs, hook_dicts, blocks_of, where, method
):
    other = make_inputs((12, 20), batch=1, seed=5)
    before, part = hook_dicts(unet), blocks_of(unet)[FIRST].get_submodule(where)
    with pytest.raises(ZeroDivisionError), tome.attach(unet, whole(method=method)) as merging:
        merging.set_step(0)
        right, right_other = unet(*inputs), unet(*other)
        assert not merging.has_unfinished_call
        with part.register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            unet(*inputs)
        assert merging.has_unfinished_call == where.startswith("attn1")
        assert layer_named(merging.report()).merged_calls == 2 + (where in ("attn2", "ff"))
        assert torch.equal(unet(*other), right_other)
        assert torch.equal(unet(*inputs), right)
        assert not merging.has_unfinished_call
        blow = part.register_forward_pre_hook(lambda *_: 1 / 0)
        unet(*inputs)
    blow.remove()
    assert hook_dicts(unet) == before
    assert torch.equal(unet(*inputs), unmerged)


def test_a_second_attach_replaces_the_first(unet, whole, inputs, hook_dicts):
    before = hook_dicts(unet)
    wrapper = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=unet))
    first = tome.attach(unet, whole(ratio=0.3))
    once = {name: len(held) for name, held in hook_dicts(unet).items()}
    right = unet(*inputs)
    second = tome.attach(wrapper, whole(ratio=0.6))
    third = tome.attach(unet, whole(ratio=0.3))
    assert {name: len(held) for name, held in hook_dicts(unet).items()} == once
    first.detach()
    second.detach()
    assert {name: len(held) for name, held in hook_dicts(unet).items()} == once
    assert torch.equal(unet(*inputs), right)
    assert (first.report().steps, second.report().steps, third.report().steps) == (1, 0, 1)
    third.detach()
    assert hook_dicts(unet) == before


def test_two_unets_merge_side_by_side(make_unet, whole, inputs):
    one, other = make_unet(1), make_unet(2)
    with (
        tome.attach(one, whole(ratio=0.3)) as first,
        tome.attach(other, whole(ratio=0.6)) as second,
    ):
        one(*inputs)
        other(*inputs)
    assert (first.report().ratio, second.report().ratio) == (0.3, 0.6)
    assert {layer.merged_tokens for layer in first.report().merged_layers} == {256 - 76}
    assert {layer.merged_tokens for layer in second.report().merged_layers} == {256 - 153}


def activations(blocks):
    """Weak references to what parts of the blocks get and return from now on."""
    refs = []

    def keep(*tensors):
        refs.extend(map(weakref.ref, tensors))

    for block in blocks:
        block.norm1.register_forward_hook(lambda _, args, y: keep(args[0], y))
        block.attn1.to_q.register_forward_pre_hook(lambda _, args: keep(args[0]))
        block.attn1.register_forward_hook(Hook(lambda _, args, output: keep(output)))
    return refs


def test_the_handle_keeps_no_model_and_no_activations_alive(make_unet, whole, inputs, blocks_of):
    unet = make_unet()
    merging = tome.attach(unet, whole(max_downsample=2))
    refs = activations(blocks_of(unet).values())
    unet(*inputs)
    gc.collect()
    assert len(refs) == 7 * 4
    assert not any(ref() is not None for ref in refs)
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None
    assert len(merging.report().merged_layers) == 7
    merging.detach()


def test_a_pass_that_failed_keeps_no_activations_alive(unet, whole, inputs, blocks_of):
    block = blocks_of(unet)[FIRST]
    refs = activations([block])
    block.attn1.to_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with tome.attach(unet, whole()):
        with contextlib.suppress(ZeroDivisionError):
            unet(*inputs)
        gc.collect()
        assert len(refs) == 3
        assert not any(ref() is not None for ref in refs)


def test_a_copy_made_during_a_pass_does_not_merge_and_can_be_cleaned(
    unet, small_settings, inputs, unmerged, hook_dicts, blocks_of, method
):
    before, copies = hook_dicts(unet), []

    def copy_unet(*_):
        handle.remove()
        copies.append(copy.deepcopy(unet))

    with tome.attach(unet, small_settings(method=method)):
        handle = blocks_of(unet)[FIRST].attn1.to_out.register_forward_pre_hook(copy_unet)
        unet(*inputs)
        (theirs,) = copies
        assert torch.equal(theirs(*inputs), unmerged)
        tome.remove_patch(theirs)
        assert {name for name, held in hook_dicts(theirs).items() if held} == set()
        assert not torch.equal(unet(*inputs), unmerged)
    assert hook_dicts(unet) == before
