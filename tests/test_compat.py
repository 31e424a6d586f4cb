import inspect

import pytest
import tomesd
import torch
from torch import nn

import tomesd_core as tome


class Model(nn.Module):
    """A model with `.model.diffusion_model`, as scripts have it."""

    def __init__(self, unet):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = unet


@pytest.fixture
def run(make_unet, make_inputs, watch):
    """Run a pass of a patched UNet; return its output and the tokens per layer."""

    def running(apply_patch, size=(16, 16), batch=2, is_linear=False, **options):
        unet = make_unet(use_linear_in_transformer=is_linear)
        model = Model(unet)
        assert apply_patch(model, **options) is model
        with watch(unet) as inputs_of:
            output = unet(*make_inputs(size, batch))
        return output, {name: [x.shape[1] for x in inputs] for name, inputs in inputs_of.items()}

    return running


def test_names_order_and_defaults_are_tomesds():
    def names(function):
        return [
            (each.name, each.default, each.kind)
            for each in inspect.signature(function).parameters.values()
        ]

    assert names(tome.apply_patch) == names(tomesd.apply_patch)
    assert names(tome.remove_patch) == names(tomesd.remove_patch)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((16, 16), {}),
        ((16, 16), {"ratio": 0.75}),
        ((16, 16), {"ratio": 0.1, "max_downsample": 2}),
        ((12, 20), {"ratio": 0.6, "max_downsample": 8}),
        ((12, 20), {"ratio": 0.4, "sx": 4, "sy": 2}),
        ((14, 18), {"ratio": 0.3, "sx": 1, "sy": 3, "max_downsample": 2}),
        ((13, 17), {"max_downsample": 2}),
        ((16, 16), {"merge_attn": False}),
        ((16, 16), {"max_downsample": 2, "is_linear": True}),
    ],
    ids=str,
)
def test_with_corners_a_whole_pass_equals_tomesds(run, odd_sizes, size, options):
    ours, our_tokens = run(tome.apply_patch, size, use_rand=False, **options)
    theirs, their_tokens = run(tomesd.apply_patch, size, use_rand=False, **options)
    assert our_tokens == their_tokens
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_with_random_dst_the_token_counts_are_tomesds(run, ratio, batch):
    options = {"size": (16, 12), "batch": batch, "ratio": ratio, "max_downsample": 2}
    assert run(tome.apply_patch, **options)[1] == run(tomesd.apply_patch, **options)[1]


def test_the_random_choice_stays_on_for_odd_batches(run):
    assert not torch.equal(
        run(tome.apply_patch, batch=1)[0], run(tome.apply_patch, batch=1, use_rand=False)[0]
    )
    assert torch.equal(run(tome.apply_patch, batch=1)[0], run(tome.apply_patch, batch=1)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.9}, ["0.9", "0.75", "2×2"]),
        ({"ratio": 0.8, "sx": 4, "sy": 1}, ["0.8", "0.75", "1×4"]),
    ],
)
def test_a_ratio_over_the_maximum_is_capped_with_a_warning(run, options, words):
    with pytest.warns(UserWarning) as caught:
        ours, tokens = run(tome.apply_patch, use_rand=False, **options)
    (warning,) = caught
    assert all(word in str(warning.message) for word in words) and warning.filename == __file__
    theirs, their_tokens = run(tomesd.apply_patch, use_rand=False, **options)
    assert tokens == their_tokens
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_a_ratio_in_range_warns_of_nothing(make_unet, recwarn):
    tome.apply_patch(make_unet(), ratio=0.75)
    tome.apply_patch(make_unet(), ratio=0.9, sx=4, sy=4)
    assert recwarn.list == []


@pytest.mark.parametrize("ratio", [-0.1, float("nan"), None, "abc"], ids=str)
def test_an_invalid_ratio_is_refused(make_unet, ratio):
    with pytest.raises((ValueError, TypeError)):
        tome.apply_patch(make_unet(), ratio=ratio)


@pytest.mark.parametrize("name", ["merge_crossattn", "merge_mlp"])
def test_merging_anything_but_self_attention_is_refused(make_unet, hook_dicts, name):
    unet = make_unet()
    before = hook_dicts(unet)
    with pytest.raises(ValueError, match=f"{name} .*only self-attention"):
        tome.apply_patch(unet, **{name: True})
    assert hook_dicts(unet) == before


@pytest.mark.parametrize(
    "remove", [tome.remove_patch, lambda model: tome.apply_patch(model, merge_attn=False)]
)
def test_removing_restores_the_output_and_twice_is_harmless(
    make_unet, make_inputs, hook_dicts, remove
):
    model, inputs = Model(make_unet()), make_inputs()
    unet, before = model.model.diffusion_model, hook_dicts(model)
    unmerged = unet(*inputs)
    tome.apply_patch(model)
    assert not torch.equal(unet(*inputs), unmerged)
    for _ in range(2):
        assert remove(model) is model
        assert hook_dicts(model) == before
        assert torch.equal(unet(*inputs), unmerged)
