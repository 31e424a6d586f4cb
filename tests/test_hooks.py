"""`attach` and its handle: what is on the model while merging, and that nothing stays."""

import copy
import gc
import types
import weakref

import pytest
import torch
from layer_calls import FIRST
from single_block import ldm_block

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


def test_attaching_changes_hooks_alone_and_detaching_restores_every_bit(
    unet, whole, inputs, unmerged, hook_dicts
):
    before, hooks = identities(unet), hook_dicts(unet)
    tome.remove_patch(unet)
    with tome.attach(unet, whole(max_downsample=2)) as merging:
        assert not torch.equal(unet(*inputs), unmerged)
        assert identities(unet) == before
        for _ in range(2):
            merging.detach()
            assert hook_dicts(unet) == hooks
    assert identities(unet) == before and hook_dicts(unet) == hooks
    assert torch.equal(unet(*inputs), unmerged)


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


@pytest.mark.parametrize(
    "where", ["attn1", "attn1.to_q", "attn1.to_v", "attn1.to_out", "norm1", "attn2", "ff"]
)
def test_after_an_exception_in_the_unet_the_next_pass_is_right_and_nothing_stays(
    unet, whole, inputs, unmerged, make_inputs, hook_dicts, where, method
):
    other = make_inputs((12, 20), batch=1, seed=5)
    before, part = hook_dicts(unet), unet.get_submodule(f"{FIRST}.{where}")
    with pytest.raises(ZeroDivisionError), tome.attach(unet, whole(method=method)) as merging:
        merging.set_step(0)
        right, right_other = unet(*inputs), unet(*other)
        assert not merging.has_unfinished_call
        with part.register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            unet(*inputs)
        assert merging.has_unfinished_call == where.startswith("attn1")
        assert merging.report().layers[0].merged_calls == 2 + (where in ("attn2", "ff"))
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


def test_two_models_merge_side_by_side(whole):
    one, other = ldm_block(), ldm_block()
    first, second = tome.attach(one, whole(ratio=0.3)), tome.attach(other, whole(ratio=0.6))
    for block in (one, other):
        block(torch.randn(2, 32, 8, 8))
    for merging, ratio, tokens in ((first, 0.3, 64 - 19), (second, 0.6, 64 - 38)):
        assert merging.report().ratio == ratio
        assert merging.report().layers[0].merged_tokens == tokens


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
    blow = unet.get_submodule(FIRST).attn1.to_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unet(*inputs)
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    blow.remove()
    unet(*inputs)
    gc.collect()
    assert [ref() for ref in refs] == [None] * (3 + 7 * 4)
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None
    assert len(merging.report().merged_layers) == 7
    merging.detach()


def test_a_copy_made_during_a_pass_does_not_merge_and_can_be_cleaned(
    unet, small_settings, inputs, unmerged, hook_dicts, method
):
    before, copies = hook_dicts(unet), []

    def copy_unet(*_):
        handle.remove()
        copies.append(copy.deepcopy(unet))

    with tome.attach(unet, small_settings(method=method)):
        handle = unet.get_submodule(FIRST).attn1.to_out.register_forward_pre_hook(copy_unet)
        unet(*inputs)
        (theirs,) = copies
        assert torch.equal(theirs(*inputs), unmerged)
        tome.remove_patch(theirs)
        assert {name for name, held in hook_dicts(theirs).items() if held} == set()
        assert not torch.equal(unet(*inputs), unmerged)
    assert hook_dicts(unet) == before
