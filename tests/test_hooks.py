import concurrent.futures
import contextlib
import copy
import functools
import gc
import random
import types
import weakref

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import tomesd_core as tome
from tomesd_core import hooks, token_map
from tomesd_core.foreign_hooks import Hook
from tomesd_core.matching import match
from tomesd_core.partition import make_partition

SD1 = {"attention_resolutions": [1, 2, 4], "channel_mult": (1, 1, 1, 1)}
FIRST = "input_blocks.1.1.transformer_blocks.0"


@pytest.fixture
def unet(make_unet):
    return make_unet()


@pytest.fixture(params=tome.settings.METHODS)
def method(request):
    return request.param


@pytest.fixture
def whole(small_settings):
    """Settings that search the whole image, in the tokens' own precision."""
    return lambda **values: small_settings(window=None, **values)


@pytest.fixture
def record(blocks_of):
    """Records every layer's calls: grid, block input x, norm1's y, what attention saw (q) and what
    came of it.

    A foreign hook on the output would have the layer left to it, so that one is put there as one of
    ours.
    """

    @contextlib.contextmanager
    def recording(unet):
        calls, handles = {}, []

        def tap(call, name, block):
            transformer = unet.get_submodule(name.rsplit(".transformer_blocks", 1)[0])
            return [
                transformer.register_forward_pre_hook(
                    lambda _, args: vars(call).update(grid=tuple(args[0].shape[-2:]))
                ),
                block.norm1.register_forward_hook(
                    lambda _, args, y: vars(call).update(x=args[0], y=y)
                ),
                block.attn1.to_q.register_forward_pre_hook(
                    lambda _, args: vars(call).update(q=args[0])
                ),
                block.attn1.register_forward_hook(
                    Hook(lambda _, args, output: vars(call).update(output=output))
                ),
            ]

        for name, block in blocks_of(unet).items():
            calls[name] = types.SimpleNamespace(attn=block.attn1)
            handles += tap(calls[name], name, block)
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    return recording


def assert_merged(call, settings, step=0):
    """Attention saw norm1's output merged by the map of the block's input; its output was unmerged
    with that map."""
    removed = call.y.shape[1] - call.q.shape[1]
    assert removed > 0
    if settings.window is None:
        assert removed == int(call.y.shape[1] * settings.ratio)
    split = make_partition(
        call.grid,
        settings.cell,
        settings.partition,
        step if settings.draws_anew else 0,
        settings.window,
        1 if settings.shared_draw else call.x.shape[0],
    )
    the_map = match(call.x, split, settings.exact).token_map(removed)
    assert torch.equal(call.q, the_map.merge(call.y))
    expected = the_map.unmerge(call.attn.forward(the_map.merge(call.y)))
    torch.testing.assert_close(call.output, expected, rtol=0, atol=1e-6)


def assert_unmerged(call):
    assert call.q is call.y
    assert call.output.shape == call.y.shape


def merged_alone(attention, y, of=None, grid=(16, 12), **options):
    """What one call of attention gives, merged by the input of its block, or by its own."""
    the_map = tome.match_tokens(y if of is None else of, grid, 0.5, window=None)
    return the_map.unmerge(attention.forward(the_map.merge(y), **options))


# What is left on a model: nothing.


def identities(model):
    """All that each module is besides its hooks: its class, attributes, parameters, children, and
    its class's own."""
    return [
        [
            {name: id(value) for name, value in part.items() if "hooks" not in name}
            for part in (
                {"itself": module, "class": type(module), **vars(module)},
                vars(type(module)),
                module._parameters,
                module._modules,
                module._buffers,
            )
        ]
        for module in model.modules()
    ]


def add_foreign_hooks(unet, blocks_of):
    """Hooks of other extensions, on modules where merging has its own."""
    calls = []
    for block in blocks_of(unet).values():
        block.attn1.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append("attn1"), with_kwargs=True
        )
        block.attn1.to_q.register_forward_pre_hook(lambda module, args: calls.append("to_q"))
        block.norm1.register_forward_hook(lambda module, args, output: calls.append("norm1 out"))
    unet.register_forward_pre_hook(lambda module, args: calls.append("unet"))
    return calls


def test_while_attached_no_class_forward_or_attribute_differs(unet, whole, make_inputs):
    before = identities(unet)
    with tome.attach(unet, whole(max_downsample=2)):
        assert identities(unet) == before
        unet(*make_inputs())
        assert identities(unet) == before
    assert identities(unet) == before


def test_after_detach_every_hook_list_holds_what_it_held(
    unet, whole, make_inputs, hook_dicts, blocks_of
):
    foreign = add_foreign_hooks(unet, blocks_of)
    before = hook_dicts(unet)
    merging = tome.attach(unet, whole())
    assert hook_dicts(unet) != before
    later = unet.middle_block.register_forward_hook(lambda *_: None)
    unet(*make_inputs())
    assert {"attn1", "to_q", "norm1 out", "unet"} == set(foreign)
    merging.detach()
    assert later.id in unet.middle_block._forward_hooks
    later.remove()
    assert hook_dicts(unet) == before


def test_detach_brings_back_every_bit_and_does_no_harm_twice(unet, whole, make_inputs, hook_dicts):
    before, inputs = hook_dicts(unet), make_inputs()
    unmerged = unet(*inputs)
    hooks.detach(unet)
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
def test_after_an_exception_inside_the_unet_the_next_pass_is_right_and_nothing_stays(
    unet, whole, make_inputs, hook_dicts, blocks_of, where, method
):
    inputs, other = make_inputs(), make_inputs((12, 20), batch=1, seed=5)
    unmerged = unet(*inputs)
    add_foreign_hooks(unet, blocks_of)
    before, part = hook_dicts(unet), blocks_of(unet)[FIRST].get_submodule(where)
    with pytest.raises(ZeroDivisionError), tome.attach(unet, whole(method=method)) as merging:
        merging.set_step(0)
        right, right_other = unet(*inputs), unet(*other)
        blow = part.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            unet(*inputs)
        blow.remove()
        assert torch.equal(unet(*other), right_other)
        assert torch.equal(unet(*inputs), right)
        blow = part.register_forward_pre_hook(lambda *_: 1 / 0)
        unet(*inputs)
    blow.remove()
    assert hook_dicts(unet) == before
    assert torch.equal(unet(*inputs), unmerged)


def test_a_second_attach_replaces_the_first(unet, whole, make_inputs, hook_dicts):
    before, inputs = hook_dicts(unet), make_inputs()
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


def test_two_unets_merge_side_by_side(make_unet, whole, make_inputs):
    one, other, inputs = make_unet(1), make_unet(2), make_inputs()
    with (
        tome.attach(one, whole(ratio=0.3)) as first,
        tome.attach(other, whole(ratio=0.6)) as second,
    ):
        one(*inputs)
        other(*inputs)
    assert (first.report().ratio, second.report().ratio) == (0.3, 0.6)
    assert {layer.merged_tokens for layer in first.report().merged_layers} == {256 - 76}
    assert {layer.merged_tokens for layer in second.report().merged_layers} == {256 - 153}


def test_without_settings_the_defaults_hold(unet):
    with tome.attach(unet) as merging:
        assert merging.settings == tome.MergeSettings()


def test_the_handle_keeps_neither_the_model_nor_its_activations_alive(
    make_unet, whole, make_inputs, blocks_of
):
    unet, refs = make_unet(), []
    merging = tome.attach(unet, whole(max_downsample=2))
    for block in blocks_of(unet).values():
        block.norm1.register_forward_hook(
            lambda _, args, y: refs.extend([weakref.ref(args[0]), weakref.ref(y)])
        )
        block.attn1.to_q.register_forward_pre_hook(
            lambda _, args: refs.append(weakref.ref(args[0]))
        )
        block.attn1.register_forward_hook(
            Hook(lambda _, args, output: refs.append(weakref.ref(output)))
        )
    unet(*make_inputs())
    gc.collect()
    assert len(refs) == 7 * 4
    assert not any(ref() is not None for ref in refs)
    gone = weakref.ref(unet)
    del unet, block
    gc.collect()
    assert gone() is None
    assert len(merging.report().merged_layers) == 7
    merging.detach()


def test_a_pass_that_failed_keeps_no_activations_alive(unet, whole, make_inputs, blocks_of):
    refs = []
    block = blocks_of(unet)[FIRST]
    block.attn1.to_q.register_forward_pre_hook(lambda _, args: refs.append(weakref.ref(args[0])))
    block.norm1.register_forward_hook(
        lambda _, args, y: refs.extend([weakref.ref(args[0]), weakref.ref(y)])
    )
    block.attn1.to_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with tome.attach(unet, whole()):
        with contextlib.suppress(ZeroDivisionError):
            unet(*make_inputs())
        gc.collect()
        assert len(refs) == 3
        assert not any(ref() is not None for ref in refs)


# What is merged, and by which map.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.75},
        {"ratio": 0.1},
        {"stride": (2, 4)},
        {"stride": (3, 1)},
        {"partition": "corner"},
        {"partition": "uniform"},
        {"partition": "alternating"},
        {"shared_draw": False},
        {"window": 4},
        {"window": 4, "partition": "uniform", "shared_draw": False},
    ],
    ids=str,
)
def test_attention_sees_the_tokens_merged_by_the_similarity_of_the_blocks_input(
    unet, small_settings, record, make_inputs, options
):
    settings = small_settings(max_downsample=2, **{"window": None, **options})
    with tome.attach(unet, settings) as merging, record(unet) as calls:
        merging.set_step(3)
        unet(*make_inputs((16, 12)))
    for call in calls.values():
        assert_merged(call, settings, step=3)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, 4),
        ({"use_linear_in_transformer": True}, 4),
        ({"in_channels": 9}, 9),
        ({"transformer_depth": 2, "context_dim": [8, 8]}, 4),
    ],
    ids=["sd1", "sd2", "inpainting", "two blocks"],
)
def test_any_unet_and_any_batch(make_unet, whole, record, make_inputs, options, channels, batch):
    unet, settings = make_unet(**options), whole()
    if "transformer_depth" in options:
        latent, timesteps, context = make_inputs(batch=batch)
        inputs = latent, timesteps, [context, context]
    else:
        inputs = make_inputs(batch=batch, channels=channels)
    with tome.attach(unet, settings) as merging, record(unet) as calls:
        output = unet(*inputs)
    assert output.shape == (batch, 4, 16, 16)
    assert output.isfinite().all()
    merged = {layer.name for layer in merging.report().merged_layers}
    assert merged == {layer.name for layer in merging.report().layers if layer.level == 1}
    for name, call in calls.items():
        assert_merged(call, settings) if name in merged else assert_unmerged(call)


@pytest.mark.parametrize("max_downsample", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("latent", "batch"),
    [((64, 96), 1), ((65, 33), 2), ((125, 75), 1), ((8, 8), 2), ((9, 11), 2), ((40, 13), 2)],
    ids=str,
)
def test_layers_merge_up_to_max_downsample_at_any_size(
    make_unet, small_settings, record, make_inputs, odd_sizes, latent, batch, max_downsample
):
    unet, settings = (
        make_unet(**SD1, num_heads=1),
        small_settings(ratio=0.7, max_downsample=max_downsample),
    )
    with tome.attach(unet, settings) as merging, record(unet) as calls:
        output = unet(*make_inputs(latent, batch))
    assert output.shape == (batch, 4, *latent)
    assert output.isfinite().all()
    report = merging.report()
    assert [layer.level for layer in report.layers] == [1, 2, 4, 8, 4, 4, 2, 2, 1, 1]
    for layer in report.layers:
        rows, columns = grid = tuple(-(-side // layer.level) for side in latent)
        assert calls[layer.name].grid == grid
        if layer.level <= max_downsample and min(grid) > 1:
            assert_merged(calls[layer.name], settings)
            assert (layer.tokens, layer.merged_tokens) == (
                rows * columns,
                calls[layer.name].q.shape[1],
            )
            continue
        assert_unmerged(calls[layer.name])
        assert layer.reason
        if layer.level > max_downsample:
            assert layer.reason == f"level {layer.level} is above max downsample {max_downsample}"


def test_layers_with_fewer_than_min_tokens_are_left_alone_and_the_report_says_so(
    unet, whole, make_inputs
):
    for least, merged in ((64, 7), (65, 3), (256, 3), (257, 0)):
        with tome.attach(unet, whole(max_downsample=2, min_tokens=least)) as merging:
            unet(*make_inputs())
        layers = merging.report().layers
        assert sum(layer.merged_calls > 0 for layer in layers) == merged
        assert {layer.reason for layer in layers if not layer.merged_calls} <= {
            f"{tokens} tokens are under min tokens {least}" for tokens in (64, 256)
        }
        assert all(layer.reason for layer in layers if not layer.merged_calls)


class Resized(nn.Module):
    """An entry of the UNet that another extension wrapped: it runs at another size and is scaled
    back."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, h, emb, context):
        whole = h.shape[-2:]
        if self.size is None:
            return self.inner(h, emb, context)
        return nn.functional.interpolate(
            self.inner(nn.functional.interpolate(h, self.size), emb, context), whole, mode="nearest"
        )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("size", [(8, 8), (8, 10), (7, 9)])
def test_a_layer_that_something_resizes_is_merged_on_the_grid_that_it_sees(
    unet, whole, record, make_inputs, size, when
):
    settings, wrapped = whole(max_downsample=2), None
    if when == "before":
        wrapped = unet.input_blocks[1] = Resized(unet.input_blocks[1], size)
    with tome.attach(unet, settings) as merging:
        if when == "after":
            wrapped = unet.input_blocks[1] = Resized(unet.input_blocks[1], size)
        with record(unet) as calls:
            unet(*make_inputs())
        (call,) = (call for name, call in calls.items() if name.startswith("input_blocks.1."))
        assert call.grid == size
        for each in calls.values():
            assert_merged(each, settings)
        assert [layer.level for layer in merging.report().layers] == [2, 2, 2, 2, 2, 1, 1]
        wrapped.size = None
        with record(unet) as calls:
            unet(*make_inputs())
        for each in calls.values():
            assert_merged(each, settings, step=1)
        assert [layer.level for layer in merging.report().layers] == [1, 2, 2, 2, 2, 1, 1]


def test_a_unet_without_attention_at_max_downsample_merges_at_its_finest_level_and_says_so(
    make_unet, whole, make_inputs
):
    unet = make_unet(attention_resolutions=[2, 4], channel_mult=(1, 1, 1))
    with tome.attach(unet, whole()) as merging:
        unet(*make_inputs())
    report = merging.report()
    assert {layer.level for layer in report.merged_layers} == {2}
    assert {layer.level for layer in report.layers} == {2, 4}
    assert report.notes == ["no attention at level 1: merging at level 2, the finest of this model"]
    assert report.notes[0] in str(report)
    with tome.attach(unet, whole(max_downsample=4)) as merging:
        unet(*make_inputs())
    assert {layer.level for layer in merging.report().merged_layers} == {2, 4}
    assert merging.report().notes == []


def test_blocks_with_disable_self_attn_are_left_alone_and_are_no_attention_level(
    make_unet, whole, record, make_inputs
):
    unet = make_unet(disable_self_attentions=[True, False])
    for max_downsample in (1, 2):
        with (
            tome.attach(unet, whole(max_downsample=max_downsample)) as merging,
            record(unet) as calls,
        ):
            unet(*make_inputs())
        assert bool(merging.report().notes) == (max_downsample == 1)
        for layer in merging.report().layers:
            if layer.level == 1:
                assert_unmerged(calls[layer.name])
                assert "disable_self_attn" in layer.reason
            else:
                assert_merged(calls[layer.name], merging.settings)


@pytest.mark.filterwarnings("ignore:.*autocast.*")
@pytest.mark.parametrize("has_blocks", [False, True], ids=["convolution", "unet without attention"])
def test_a_model_without_such_layers_makes_its_picture_and_the_reason_is_said(
    make_unet, whole, make_inputs, hook_dicts, has_blocks
):
    model = (
        make_unet(use_spatial_transformer=False, context_dim=None)
        if has_blocks
        else nn.Conv2d(4, 4, 3)
    )
    inputs = make_inputs()[: 2 if has_blocks else 1]
    unmerged, before = model(*inputs), hook_dicts(model)
    with tome.attach(model, whole()) as merging:
        merging.set_step(0, 2)
        assert torch.equal(model(*inputs), unmerged)
    report = merging.report()
    assert report.merged_layers == []
    assert report.notes == ["this model has no self-attention layers that can be merged"]
    assert report.notes[0] in report.summary
    assert hook_dicts(model) == before


def test_a_unet_whose_blocks_never_run_makes_its_picture_and_the_reason_is_said(
    unet, whole, make_inputs, monkeypatch
):
    monkeypatch.setattr(unet, "forward", lambda x, timesteps, context: x + 1)
    inputs = make_inputs()
    with tome.attach(unet, whole()) as merging:
        assert torch.equal(unet(*inputs), inputs[0] + 1)
    assert merging.report().notes == ["the model's own attention layers did not run"]


def test_a_reason_given_by_leave_out_keeps_a_layer_unmerged(
    unet, whole, record, make_inputs, blocks_of
):
    chosen = blocks_of(unet)[FIRST].attn1
    leave_out = {chosen: "another extension tiles it"}.get
    with tome.attach(unet, whole(), leave_out) as merging, record(unet) as calls:
        unet(*make_inputs())
    layers = {layer.name: layer for layer in merging.report().layers}
    assert layers[FIRST].reason == layers[FIRST].conflict == "another extension tiles it"
    assert [layer.name for layer in layers.values() if layer.conflict] == [FIRST]
    assert merging.report().summary.endswith("; 1 left out: another extension tiles it")
    assert_unmerged(calls[FIRST])
    assert len(merging.report().merged_layers) == 2


def test_a_ratio_that_removes_nothing_leaves_all_bits_and_says_so(unet, whole, make_inputs):
    inputs = make_inputs()
    unmerged = unet(*inputs)
    with tome.attach(unet, whole(ratio=0)) as merging:
        assert torch.equal(unet(*inputs), unmerged)
    assert "nothing" in merging.report().layers[0].reason
    assert merging.report().summary.startswith("nothing merged: ")


def test_a_unet_called_with_keywords_is_merged_alike(unet, whole, make_inputs):
    latent, timesteps, context = make_inputs()
    with tome.attach(unet, whole()) as merging:
        merging.set_step(1)
        assert torch.equal(
            unet(x=latent, timesteps=timesteps, context=context), unet(latent, timesteps, context)
        )
    assert merging.report().merged_layers


def test_a_pass_that_goes_past_the_unets_own_call_is_merged_alike(unet, whole, make_inputs):
    """An extension may keep the UNet's forward and call that."""
    inputs, settings = make_inputs(), whole()
    with tome.attach(unet, settings) as merging:
        merging.set_step(2)
        right = unet(*inputs)
    with tome.attach(unet, settings) as merging:
        merging.set_step(2)
        assert torch.equal(unet.forward(*inputs), right)
    assert len(merging.report().merged_layers) == 3
    with tome.attach(unet, settings) as merging:
        unet.forward(*inputs)
    assert len(merging.report().merged_layers) == 3


# What a block may do with its attention.


@pytest.fixture
def drive(unet, whole, make_inputs, blocks_of, monkeypatch):
    """Runs the UNet, merging, with another `_forward` on one block, as extensions put there."""

    def driving(body, name=FIRST, size=(16, 12), batch=2):
        block = blocks_of(unet)[name]
        monkeypatch.setattr(block, "_forward", lambda x, context=None: body(block, x, context))
        with tome.attach(unet, whole()) as merging:
            output = unet(*make_inputs(size, batch))
        assert output.shape == (batch, 4, *size)
        return next(layer for layer in merging.report().layers if layer.name == name)

    return driving


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("length", [1, 20, 192, 384])
@pytest.mark.parametrize("keyword", [True, False])
def test_a_context_of_its_own_is_left_whole_and_its_mask_goes_with_it(
    drive, length, keyword, is_masked
):
    def body(block, x, context):
        y, generator = block.norm1(x), torch.Generator().manual_seed(0)
        other = torch.randn(x.shape[0], length, x.shape[2], generator=generator)
        mask = torch.arange(length).expand(x.shape[0], -1) < 7 if is_masked else None
        output = (
            block.attn1(y, context=other, mask=mask) if keyword else block.attn1(y, other, mask)
        )
        close(output, merged_alone(block.attn1, y, of=x, context=other, mask=mask))
        return output + x

    assert drive(body).merged_calls == 1


def test_each_of_several_calls_in_a_block_gives_what_it_would_alone(drive):
    """As with a reference picture: calls as usual, one with a longer context, others on a part of
    the batch."""

    def body(block, x, context):
        y = block.norm1(x)
        usual = block.attn1(y)
        longer = block.attn1(y, context=torch.cat([y, 2 * y], dim=1))
        part, rest = y[1:], y[:1]
        own, unsaid = block.attn1(part, context=part), block.attn1(rest)
        close(usual, merged_alone(block.attn1, y, of=x))
        close(longer, merged_alone(block.attn1, y, of=x, context=torch.cat([y, 2 * y], dim=1)))
        close(own, merged_alone(block.attn1, part))
        close(unsaid, merged_alone(block.attn1, rest))
        # A context that is the very same tensor is self-attention.
        for again in (block.attn1(y), block.attn1(y, y), block.attn1(y, context=y)):
            assert torch.equal(again, usual)
        return usual + x

    layer = drive(body, batch=3)
    assert (layer.calls, layer.merged_calls) == (7, 7)


def test_a_block_that_runs_twice_in_a_pass_is_matched_anew(drive):
    def body(block, x, context):
        for each in (x, x.flip(1)):
            y = block.norm1(each)
            output = block.attn1(y)
            close(output, merged_alone(block.attn1, y, of=each))
        return output + x

    assert drive(body).merged_calls == 2


def test_a_call_within_a_call_gives_what_it_would_alone(unet, whole, make_inputs, blocks_of):
    """A hook of another extension may run attention once more in the middle of it."""
    block, inner = blocks_of(unet)[FIRST], []
    y = torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(0))

    def once_more(module, args):
        if not inner:
            inner.append(y)
            inner[0] = block.attn1(y)

    with tome.attach(unet, whole()) as merging:
        merging.set_step(0)
        right = unet(*make_inputs())
        block.attn1.to_out.register_forward_pre_hook(once_more)
        assert torch.equal(unet(*make_inputs()), right)
    close(inner[0], merged_alone(block.attn1, y, grid=(16, 16)))


def test_where_the_token_count_is_not_the_grids_it_stays_unmerged(drive):
    """Pictures' tokens laid in one row, and a part of a picture's."""

    def body(block, x, context):
        y = block.norm1(x)
        row = y.reshape(1, -1, y.shape[2])
        output = block.attn1(row)
        assert torch.equal(output, block.attn1.forward(row))
        assert torch.equal(block.attn1(y[:, :100]), block.attn1.forward(y[:, :100]))
        return output.view(x.shape) + x

    layer = drive(body)
    assert (layer.calls, layer.merged_calls) == (2, 0)
    assert "100 tokens are not the grid's 16x12" in layer.reason


def test_attention_masked_token_by_token_stays_unmerged(drive):
    def body(block, x, context):
        y, mask = (
            block.norm1(x),
            torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5,
        )
        for output in (
            block.attn1(y, mask=mask),
            block.attn1(y, None, mask),
            block.attn1(y, y, mask),
        ):
            assert torch.equal(output, block.attn1.forward(y, mask=mask))
        return output + x

    layer = drive(body)
    assert layer.merged_calls == 0
    assert "mask" in layer.reason


def with_more_arguments(kind, calls):
    """A class of attention whose forward takes more arguments, which it notes, as sgm's."""

    class Attention(kind):
        def forward(self, x, context=None, mask=None, *more, **named):
            calls.append((x, context, mask, more, named))
            return super().forward(x, context=context)

    return Attention


def test_extra_arguments_pass_through(unet, whole, make_inputs, blocks_of, monkeypatch):
    block, calls, extra = blocks_of(unet)[FIRST], [], object()
    block.attn1.__class__ = with_more_arguments(type(block.attn1), calls)

    def body(x, context=None):
        y = block.norm1(x)
        block.attn1(y, None, None, extra, 5, scale=extra)
        block.attn1(y, context=y, mask=None, shared=y, scale=7)
        # As in sgm's blocks.
        block.attn1(y, context=None, additional_tokens=None, n_times_crossframe_attn_in_self=0)
        return x

    monkeypatch.setattr(block, "_forward", body)
    with tome.attach(unet, whole()):
        unet(*make_inputs())
    first, second, sgms = calls
    assert all(call[0].shape == (2, 128, 32) for call in calls)
    assert first[1:] == (None, None, (extra, 5), {"scale": extra})
    assert sgms[1:] == (
        None,
        None,
        (),
        {"additional_tokens": None, "n_times_crossframe_attn_in_self": 0},
    )
    assert second[1] is second[0]
    assert second[4]["scale"] == 7


def test_each_method_leaves_arguments_by_other_names(
    unet, whole, make_inputs, blocks_of, monkeypatch, method
):
    block, extra, keywords = blocks_of(unet)[FIRST], object(), []
    usual = type(block.attn1).forward

    def forward(self, x, context=None, mask=None, **named):
        keywords.append(named)
        return usual(self, x, context, mask)

    def body(x, context=None):
        block.attn1(block.norm1(x), scale=extra)
        return x

    monkeypatch.setattr(type(block.attn1), "forward", forward)
    monkeypatch.setattr(block, "_forward", body)
    with tome.attach(unet, whole(method=method)) as merging:
        unet(*make_inputs())
    assert {layer.name: layer for layer in merging.report().layers}[FIRST].merged_calls == 1
    assert {"scale": extra} in keywords


# When: steps, schedules, and the draw.


@pytest.mark.parametrize(
    ("late_ratio", "schedule", "total", "ratios"),
    [
        (0.1, "linear", 4, [0.7, 0.5, 0.3, 0.1, 0.1]),
        (0.0, "step", 5, [0.7, 0.7, 0, 0, 0]),
        (0.1, "linear", 1, [0.7]),
        (0.1, "linear", None, [0.7] * 3),
    ],
)
def test_the_ratio_follows_the_schedule(
    unet, whole, make_inputs, watch, late_ratio, schedule, total, ratios
):
    """And may switch merging off; without a known total, and in a single step, it is the early one."""
    settings = whole(ratio=0.7, late_ratio=late_ratio, schedule=schedule, switch_at=0.5)
    with tome.attach(unet, settings) as merging, watch(unet) as inputs_of:
        for step, ratio in enumerate(ratios):
            merging.set_step(step, total)
            unet(*make_inputs())
            assert merging.report().ratio == pytest.approx(ratio)
    assert [x.shape[1] for x in inputs_of[FIRST]] == [
        256 - int(256 * ratio + 1e-6) for ratio in ratios
    ]
    merged_steps = len([ratio for ratio in ratios if ratio])
    assert (merging.report().steps, merging.report().merged_steps) == (len(ratios), merged_steps)


def test_without_set_step_the_ratio_is_the_early_one(unet, whole, make_inputs, watch):
    with (
        tome.attach(unet, whole(ratio=0.5, late_ratio=0.25, schedule="linear")),
        watch(unet) as inputs_of,
    ):
        for _ in range(3):
            unet(*make_inputs())
    assert [x.shape[1] for x in inputs_of[FIRST]] == [128] * 3


def test_without_set_step_every_pass_counts_as_the_next_step(unet, whole, make_inputs):
    inputs = make_inputs()
    with tome.attach(unet, whole()) as merging:
        counted = [unet(*inputs) for _ in range(3)]
        assert (merging.report().steps, merging.report().merged_steps) == (3, 3)
    with tome.attach(unet, whole()) as merging:
        for step in (2, 0, 1):
            merging.set_step(step)
            assert torch.equal(unet(*inputs), counted[step])
    assert not torch.equal(counted[0], counted[1])


def test_two_passes_of_one_step_share_its_draw_and_count_once(unet, whole, make_inputs):
    """A sampler's second evaluation, or a half of guidance, does not begin another step."""
    inputs = make_inputs()
    with tome.attach(unet, whole()) as merging:
        merging.set_step(4, 20)
        assert torch.equal(unet(*inputs), unet(*inputs))
        assert (merging.report().steps, merging.report().merged_steps) == (1, 1)


def test_parts_of_a_batch_run_apart_give_what_they_give_together(unet, whole, make_inputs, record):
    """The halves of guidance, say, or one of several pictures."""
    latent, timesteps, context = make_inputs(batch=4)
    with tome.attach(unet, whole(max_downsample=2)) as merging:
        merging.set_step(7, 20)
        together, apart = unet(latent, timesteps, context), []
        for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
            with record(unet) as calls:
                apart.append(unet(latent[part], timesteps[part], context[part]))
            for call in calls.values():
                assert_merged(call, merging.settings, step=7)
    torch.testing.assert_close(torch.cat(apart), together, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"partition": "uniform"}, {"shared_draw": False}, {"window": 4}], ids=str
)
def test_merging_neither_reads_nor_moves_random_state(unet, small_settings, make_inputs, options):
    inputs, outputs = make_inputs(), []
    for seed in (1, 2):
        for seed_of in (torch.manual_seed, random.seed, np.random.seed):
            seed_of(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()
        make_partition.cache_clear()
        with tome.attach(unet, small_settings(max_downsample=2, **options)) as merging:
            for step in (0, 5):
                merging.set_step(step, 20)
                outputs.append(unet(*inputs))
        assert merging.report().merged_steps == 2
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert all(
            np.array_equal(now, then)
            for now, then in zip(np.random.get_state(), before[2], strict=True)
        )
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


# On any device, in training, in lower precision.


@pytest.mark.parametrize("has_bags", [True, False], ids=["bags", "scan"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": None},
        {"window": 4},
        {"partition": "corner"},
        {"shared_draw": False},
        {"schedule": "linear"},
    ],
    ids=str,
)
def test_a_pass_waits_for_no_device_and_sums_in_a_fixed_order(
    make_unet, small_settings, make_inputs, operations, monkeypatch, options, has_bags
):
    """The meta device has shapes alone: whatever reads a value raises there."""
    if has_bags:
        monkeypatch.setattr(token_map, "BAG_DEVICES", {"meta"})
    unet, inputs = make_unet().to("meta"), [each.to("meta") for each in make_inputs()]
    with (
        tome.attach(unet, small_settings(max_downsample=2, **options)) as merging,
        operations() as operations_run,
    ):
        for step in range(2):
            merging.set_step(step, 20)
            output = unet(*inputs)
    assert output.shape == (2, 4, 16, 16)
    assert len(merging.report().merged_layers) == 7
    assert any(name.startswith("_embedding_bag") for name in operations_run.names) == has_bags
    # On a GPU these add in whatever order the threads come.
    in_any_order = ("index_add", "scatter_add", "scatter_reduce")
    assert [
        name for name in operations_run.names if name.lstrip("_").startswith(in_any_order)
    ] == []


def test_gradients_flow_through_a_merged_pass(make_unet, small_settings, make_inputs, method):
    unet = make_unet().requires_grad_()
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*make_inputs()).square().mean().backward()
    assert len(merging.report().merged_layers) == 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in unet.parameters())


@pytest.mark.filterwarnings("ignore:.*autocast.*")
def test_under_gradient_checkpointing_a_pass_stays_unmerged_and_its_gradient_is_right(
    make_unet, whole, make_inputs
):
    latent, *others = make_inputs()
    gradients = []
    for use_checkpoint in (False, True):
        unet, x = (
            make_unet(use_checkpoint=use_checkpoint).requires_grad_(),
            latent.clone().requires_grad_(),
        )
        with tome.attach(unet, whole()) if use_checkpoint else contextlib.nullcontext() as merging:
            unet(x, *others).square().mean().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in unet.parameters())])
    assert "gradient checkpointing" in merging.report().summary
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-3, atol=1e-5)


def test_a_merged_layer_that_backward_runs_again_is_refused(make_unet, whole, make_inputs):
    unet, inputs = make_unet().requires_grad_(), make_inputs()
    with tome.attach(unet, whole()):
        output = torch.utils.checkpoint.checkpoint(unet, *inputs, use_reentrant=False)
        with pytest.raises(RuntimeError, match="gradient checkpointing runs it again in backward"):
            output.mean().backward()


# Beside others: threads, copies, other extensions' code, devices that lack something.


def test_threads_that_run_at_once_have_a_sampling_each(unet, small_settings, make_inputs, method):
    inputs = [make_inputs(size, seed=seed) for seed, size in enumerate([(16, 16), (12, 20)])]
    with tome.attach(
        unet, small_settings(method=method, ratio=0.6, late_ratio=0.1, schedule="linear")
    ) as merging:

        def run(number):
            outputs = []
            for step in range(4):
                merging.set_step(step if number else 3 - step, 4)
                outputs.append(unet(*inputs[number]))
            return outputs

        alone = [run(0), run(1)]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, [0, 1]))
    for right, outputs in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(right, outputs, strict=True))


def test_a_copy_of_a_merging_model_does_not_merge_and_can_be_cleaned(
    unet, small_settings, make_inputs, hook_dicts, method
):
    before, inputs = hook_dicts(unet), make_inputs()
    unmerged = unet(*inputs)
    with tome.attach(unet, small_settings(method=method)):
        theirs = copy.deepcopy(unet)
        assert torch.equal(theirs(*inputs), unmerged)
        tome.remove_patch(theirs)
        assert {name for name, held in hook_dicts(theirs).items() if held} == set()
        assert not torch.equal(unet(*inputs), unmerged)
    assert hook_dicts(unet) == before


def foreign_forward(inner, x, *args, **kwargs):
    return inner(x, *args, **kwargs)


@pytest.mark.parametrize(
    "where", ["attn1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "attn1.to_out.0"]
)
def test_a_layer_with_anothers_hook_in_its_attention_is_left_to_it(
    unet, small_settings, make_inputs, blocks_of, where, method
):
    inputs, calls = make_inputs(), []
    part = blocks_of(unet)[FIRST].get_submodule(where)
    handle = part.register_forward_hook(
        lambda module, args, output: calls.append((args[0], output))
    )
    unet(*inputs)
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*inputs)
        layers = {layer.name: layer for layer in merging.report().layers}
        assert layers[FIRST].reason == f"left to {__name__}, which hooks it"
        assert layers[FIRST].conflict in merging.report().summary
        assert all(torch.equal(a, b) for a, b in zip(*calls, strict=True))
        handle.remove()
        unet(*inputs)
        assert {layer.name: layer for layer in merging.report().layers}[FIRST].merged_calls == 1


def test_a_layer_with_anothers_forward_is_left_to_it(
    unet, small_settings, make_inputs, blocks_of, method
):
    attention = blocks_of(unet)[FIRST].attn1
    attention.forward = functools.partial(foreign_forward, attention.forward)
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*make_inputs())
    layers = {layer.name: layer for layer in merging.report().layers}
    assert layers[FIRST].reason == f"left to {__name__}, which replaces its forward"
    assert len(merging.report().merged_layers) == 2


def test_a_forward_that_wraps_the_layers_own_is_named_by_its_own_module_until_it_is_put_back(
    unet, small_settings, make_inputs, blocks_of
):
    attention = blocks_of(unet)[FIRST].attn1
    before = attention.forward
    attention.forward = functools.wraps(before)(lambda *args, **kwargs: before(*args, **kwargs))
    with tome.attach(unet, small_settings()) as merging:
        unet(*make_inputs())
        assert (
            f"1 left out: left to {__name__}, which replaces its forward"
            in merging.report().summary
        )
        attention.forward = before
        unet(*make_inputs())
    assert {layer.name: layer for layer in merging.report().layers}[FIRST].merged_calls == 1


@pytest.mark.parametrize("is_whole", [False, True], ids=["fewer", "whole"])
def test_an_attention_that_gives_something_else_costs_no_picture(
    unet, small_settings, make_inputs, blocks_of, monkeypatch, is_whole, method
):
    kind, inputs, unmerged = type(blocks_of(unet)[FIRST].attn1), make_inputs(), unet(*make_inputs())
    usual = kind.forward

    def odd(self, x, context=None, mask=None):
        output = usual(self, x, context, mask)
        is_merged = 128 in (x.shape[1], -1 if context is None else context.shape[1])
        return output if not is_merged else output.new_zeros(2, 256 if is_whole else 7, 32)

    monkeypatch.setattr(kind, "forward", odd)
    with tome.attach(unet, small_settings(method=method)) as merging:
        first, second = unet(*inputs), unet(*inputs)
    assert torch.equal(first, unmerged) == (not is_whole)
    assert torch.equal(second, unmerged) == (not is_whole)
    left = [layer.reason for layer in merging.report().layers if layer.level == 1]
    assert left == 3 * [None if is_whole else "its attention returned an unexpected shape"]


def test_a_device_that_lacks_an_operation_costs_no_picture(
    unet, small_settings, make_inputs, monkeypatch, method
):
    inputs = make_inputs()
    unmerged = unet(*inputs)

    def lacking(*args, **kwargs):
        raise NotImplementedError(
            "The operator 'aten::searchsorted.Tensor' is not implemented for this device.\nMore"
        )

    with tome.attach(unet, small_settings(method=method)) as merging:
        monkeypatch.setattr(torch, "searchsorted", lacking)
        assert torch.equal(unet(*inputs), unmerged)
        monkeypatch.undo()
        assert torch.equal(unet(*inputs), unmerged)
    assert merging.report().summary == (
        "nothing merged: merging failed: NotImplementedError: "
        "The operator 'aten::searchsorted.Tensor' is not implemented for this device."
    )
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*inputs)
    assert len(merging.report().merged_layers) == 3


def test_the_input_of_attention_may_come_by_keyword(drive):
    def body(block, x, context):
        return block.attn1(x=block.norm1(x)) + x

    assert drive(body).merged_calls == 1


@pytest.mark.parametrize("how", ["torch.compile(unet)", "unet.compile()"])
def test_a_compiled_model_makes_its_picture_and_the_reason_is_said(unet, whole, make_inputs, how):
    inputs, unmerged = make_inputs(), unet(*make_inputs())
    if how == "unet.compile()":
        if not hasattr(unet, "compile"):
            pytest.skip("this torch compiles no module in place")
        unet.compile(backend="eager")
        compiled = unet
    else:
        compiled = torch.compile(unet, backend="eager")
    with tome.attach(compiled, whole()) as merging:
        torch.testing.assert_close(compiled(*inputs), unmerged)
    assert merging.report().summary == (
        "nothing merged: this model is compiled (torch.compile), and hooks can't reach into that"
    )
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_a_pass_without_gradients_leaves_the_next_one_its_own(make_unet, whole, make_inputs, mode):
    """What is kept of a grid must not be bound to the mode that it was first seen in."""
    unet, size = make_unet().requires_grad_(), (18, 14) if mode is torch.no_grad else (14, 18)
    with tome.attach(unet, whole()) as merging:
        merging.set_step(0)
        with mode():
            output = unet(*make_inputs(size))
        again = unet(*make_inputs(size))
        again.mean().backward()
    assert torch.equal(output, again.detach())


def test_a_pass_in_autocast_is_merged_too(unet, whole, make_inputs):
    with tome.attach(unet, whole()) as merging, torch.autocast("cpu", dtype=torch.bfloat16):
        output = unet(*make_inputs())
    assert output.isfinite().all()
    assert {layer.merged_tokens for layer in merging.report().merged_layers} == {128}


def test_a_picture_of_few_steps_keeps_more_tokens_and_says_why_nothing_merged(
    unet, small_settings, make_inputs, watch
):
    inputs = make_inputs()
    with tome.attach(unet, small_settings(ratio=0.75, full_steps=20)) as merging:
        # The last four of twenty are as long as all of twenty; four of four are not.
        for steps, ratio in (({"schedule_steps": 20}, 0.75), ({}, 1 - 0.25 * 5 ** (2 / 3))):
            merging.set_step(0, 4, **steps)
            assert merging.passes.step.ratio == pytest.approx(ratio)
            unet(*inputs)
    with tome.attach(unet, small_settings(ratio=0.5, full_steps=20)) as merging:
        merging.set_step(0, 2)
        unet(*inputs)
    assert "a picture of 2 steps keeps more tokens than one of 20" in merging.report().summary
