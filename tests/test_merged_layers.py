"""Which layers merge, by which map, and the reasons of the others."""

import pytest
import torch
from layer_calls import FIRST, SD1, assert_merged, assert_unmerged, recorded
from torch import nn
from torch.nn import functional as F

import tomesd_core as tome


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 4)},
        {"partition": "corner"},
        {"partition": "alternating"},
        {"shared_draw": False},
        {"window": 4},
    ],
    ids=str,
)
def test_attention_sees_tokens_merged_by_the_similarity_of_the_blocks_input(
    unet, small_settings, make_inputs, options
):
    settings = small_settings(max_downsample=2, **{"window": None, **options})
    with tome.attach(unet, settings) as merging, recorded(unet) as calls:
        merging.set_step(3)
        unet(*make_inputs((16, 12)))
    for call in calls.values():
        assert_merged(call, settings, step=3)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_linear_in_transformer": True},
        {"in_channels": 9},
        {"transformer_depth": 2, "context_dim": [8, 8]},
    ],
    ids=["sd1", "sd2", "inpainting", "two blocks"],
)
def test_any_unet_and_any_batch(make_unet, whole, make_inputs, options, batch):
    unet, settings = make_unet(**options), whole()
    latent, timesteps, context = make_inputs(batch=batch, channels=options.get("in_channels", 4))
    with tome.attach(unet, settings) as merging, recorded(unet) as calls:
        unet(latent, timesteps, [context, context])
    merged = {layer.name for layer in merging.report().merged_layers}
    assert merged == {layer.name for layer in merging.report().layers if layer.level == 1}
    for name, call in calls.items():
        assert_merged(call, settings) if name in merged else assert_unmerged(call)


@pytest.mark.parametrize("max_downsample", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("latent", "batch"),
    [((32, 48), 1), ((65, 33), 2), ((61, 37), 1), ((8, 8), 2), ((9, 11), 2), ((40, 13), 2)],
    ids=str,
)
def test_layers_merge_up_to_max_downsample_at_any_size(
    make_unet, small_settings, make_inputs, odd_sizes, latent, batch, max_downsample
):
    unet = make_unet(**SD1, num_heads=1)
    settings = small_settings(ratio=0.7, max_downsample=max_downsample)
    with tome.attach(unet, settings) as merging, recorded(unet) as calls:
        unet(*make_inputs(latent, batch))
    report = merging.report()
    assert [layer.level for layer in report.layers] == [1, 2, 4, 8, 4, 4, 2, 2, 1, 1]
    for layer in report.layers:
        rows, columns = grid = tuple(-(-side // layer.level) for side in latent)
        assert calls[layer.name].grid == grid
        if layer.level <= max_downsample and min(grid) > 1:
            assert_merged(calls[layer.name], settings)
            assert layer.tokens == rows * columns
            assert layer.merged_tokens == calls[layer.name].q.shape[1]
        else:
            assert_unmerged(calls[layer.name])
            assert f"max downsample {max_downsample}" in layer.reason or min(grid) == 1


def test_layers_with_fewer_than_min_tokens_are_not_merged(unet, whole, inputs):
    for least, merged in ((64, 7), (65, 3), (256, 3), (257, 0)):
        with tome.attach(unet, whole(max_downsample=2, min_tokens=least)) as merging:
            unet(*inputs)
        layers = merging.report().layers
        assert sum(layer.merged_calls > 0 for layer in layers) == merged
        for layer in layers:
            assert layer.merged_calls or f"min tokens {least}" in layer.reason


class Resized(nn.Module):
    """A UNet entry that runs at another size and is scaled back, as other extensions wrap it."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, h, emb, context):
        return F.interpolate(self.inner(F.interpolate(h, self.size), emb, context), h.shape[-2:])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("size", [(8, 8), (8, 10), (7, 9)])
def test_a_resized_layer_is_merged_on_the_grid_that_it_sees(unet, whole, inputs, size, when):
    settings, resized = whole(max_downsample=2), Resized(unet.input_blocks[1], size)
    if when == "before":
        unet.input_blocks[1] = resized
    with tome.attach(unet, settings) as merging:
        unet.input_blocks[1] = resized
        for step, (grid, level) in enumerate([(size, 2), ((16, 16), 1)]):
            resized.size = grid
            with recorded(unet) as calls:
                unet(*inputs)
            (call,) = (call for name, call in calls.items() if name.startswith("input_blocks.1."))
            assert call.grid == grid
            for each in calls.values():
                assert_merged(each, settings, step)
            assert [layer.level for layer in merging.report().layers] == [level, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "options",
    [{"attention_resolutions": [2, 4]}, {"disable_self_attentions": [True, False, False]}],
    ids=["no attention", "no self-attention"],
)
@pytest.mark.parametrize(("max_downsample", "merged"), [(1, {2}), (4, {2, 4})])
def test_without_self_attention_at_max_downsample_the_finest_level_with_it_merges(
    make_unet, whole, inputs, options, max_downsample, merged
):
    unet = make_unet(**{"attention_resolutions": [1, 2, 4], "channel_mult": (1, 1, 1), **options})
    settings = whole(max_downsample=max_downsample)
    with tome.attach(unet, settings) as merging, recorded(unet) as calls:
        unet(*inputs)
    report = merging.report()
    for layer in report.layers:
        if layer.level in merged:
            assert_merged(calls[layer.name], settings)
        else:
            assert_unmerged(calls[layer.name])
            assert ("disable_self_attn" in layer.reason) == (layer.level == 1)
    assert {layer.level for layer in report.merged_layers} == merged
    if max_downsample == 1:
        (note,) = report.notes
        assert "level 1" in note and "2" in note and note in str(report)
    else:
        assert report.notes == []


@pytest.mark.filterwarnings("ignore:.*autocast.*")
def test_a_model_without_mergeable_layers_runs_and_the_report_has_the_reason(
    make_unet, whole, inputs, hook_dicts
):
    model, inputs = make_unet(use_spatial_transformer=False, context_dim=None), inputs[:2]
    unmerged, before = model(*inputs), hook_dicts(model)
    with tome.attach(model, whole()) as merging:
        merging.set_step(0, 2)
        assert torch.equal(model(*inputs), unmerged)
    report = merging.report()
    assert report.merged_layers == []
    (note,) = report.notes
    assert "no self-attention layers" in note and note in report.summary
    assert hook_dicts(model) == before


def test_a_unet_whose_blocks_never_run_works_and_the_report_has_the_reason(
    unet, whole, inputs, monkeypatch
):
    monkeypatch.setattr(unet, "forward", lambda x, timesteps, context: x + 1)
    with tome.attach(unet, whole()) as merging:
        assert torch.equal(unet(*inputs), inputs[0] + 1)
    (note,) = merging.report().notes
    assert "did not run" in note


def test_a_reason_given_by_leave_out_keeps_a_layer_unmerged(unet, whole, inputs):
    leave_out = {unet.get_submodule(FIRST).attn1: "another extension tiles it"}.get
    with tome.attach(unet, whole(), leave_out) as merging, recorded(unet) as calls:
        unet(*inputs)
    layers = {layer.name: layer for layer in merging.report().layers}
    assert layers[FIRST].reason == layers[FIRST].conflict == "another extension tiles it"
    assert [layer.name for layer in layers.values() if layer.conflict] == [FIRST]
    assert "another extension tiles it" in merging.report().summary
    assert_unmerged(calls[FIRST])
    assert len(merging.report().merged_layers) == 2


def test_a_ratio_that_removes_nothing_changes_no_bit(unet, whole, inputs, unmerged):
    with tome.attach(unet, whole(ratio=0)) as merging:
        assert torch.equal(unet(*inputs), unmerged)
    assert "ratio 0" in merging.report().layers[0].reason
    assert merging.report().summary.startswith("nothing merged: ")


def test_any_way_to_call_the_unet_merges_the_same(unet, whole, inputs):
    latent, timesteps, context = inputs
    ways = [
        lambda: unet(latent, timesteps, context),
        lambda: unet(x=latent, timesteps=timesteps, context=context),
        lambda: unet.forward(latent, timesteps, context),
    ]
    outputs = []
    for call in ways:
        with tome.attach(unet, whole()) as merging:
            merging.set_step(2)
            outputs.append(call())
        assert len(merging.report().merged_layers) == 3
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with tome.attach(unet, whole()) as merging:  # Without a step.
        ways[-1]()
    assert len(merging.report().merged_layers) == 3
