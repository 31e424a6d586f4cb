"""UNets and pipelines of diffusers: merged by the same hooks, and equal to tomesd."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate
import diffusers
import pytest
import tomesd
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from torch import nn

import tomesd_core as tome
from tomesd_core.settings import METHODS
from tomesd_core.unet import find_layers

PROCESSORS = {
    "2.0": attention_processor.AttnProcessor2_0,
    "1": attention_processor.AttnProcessor,
    "sliced": lambda: attention_processor.SlicedAttnProcessor(2),
    "xFormers": attention_processor.XFormersAttnProcessor,
}
SHAPES = ("sd15", "sd2", "sdxl", "inpainting")


def memory_efficient_attention(q, k, v, attn_bias=None, op=None, scale=None):
    """xFormers' kernel, which needs CUDA: heads are batch items, and it takes any head size."""
    assert all(one.ndim == 3 and one.is_contiguous() for one in (q, k, v))
    assert len({len(one) for one in (q, k, v)}) == 1 and k.shape[1] == v.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    return PROCESSORS[request.param]()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("sd15", {(1, 4, 32), (2, 4, 64)}),
        ("sd2", {(1, 4, 32), (2, 8, 64)}),
        ("sdxl", {(2, 8, 64)}),
        ("inpainting", {(1, 4, 32), (2, 4, 64)}),
    ],
)
def test_layers_have_level_heads_and_channels_and_come_in_the_order_in_which_they_run(
    make_unet, run, shape, expected
):
    unet, ran = make_unet(shape), []
    layers = find_layers(unet)
    assert {(layer.level, layer.heads, layer.channels) for layer in layers} == expected
    for layer in layers:
        layer.block.attn1.register_forward_pre_hook(lambda *_, name=layer.name: ran.append(name))
    run(unet)
    assert ran == [layer.name for layer in layers]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_off_and_after_detach_outputs_are_bitwise_the_same(
    make_unet, run, settings, processor, method, shape
):
    unet = make_unet(shape)
    unet.set_attn_processor(processor)
    off = run(unet)
    with tome.attach(unet, settings(method, max_downsample=2)) as merging:
        on = run(unet)
    report = merging.report()
    assert len(report.merged_layers) == len(report.layers) and not torch.equal(on, off)
    assert torch.equal(run(unet), off)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize("method", ["keys", "tokens"])
@pytest.mark.parametrize("size", [(32, 32), (34, 30)], ids=str)
def test_equal_tokens_merge_exactly(make_unet, run, settings, processor, method, size):
    unet = make_unet(norm_num_groups=1)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            # Zero padding would make the tokens at the edge differ.
            module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    unet.set_attn_processor(processor)
    off = run(unet, size, equal=True)
    with tome.attach(unet, settings(method, 0.75)) as merging:
        on = run(unet, size, equal=True)
    assert len(merging.report().merged_layers) == 3
    torch.testing.assert_close(on, off, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", SHAPES)
def test_apply_patch_equals_tomesd(make_unet, run, processor, ratio, shape):
    unet = make_unet(shape)
    unet.set_attn_processor(processor)
    coarsest = 2 if shape == "sdxl" else 1
    tomesd.apply_patch(unet, ratio=ratio, use_rand=False, max_downsample=coarsest)
    theirs = run(unet)
    tomesd.remove_patch(unet)
    tome.apply_patch(unet, ratio=ratio, use_rand=False, max_downsample=coarsest)
    ours = run(unet)
    tome.remove_patch(unet)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(run(unet), ours, atol=1e-4)


SIZE = {"height": 64, "width": 64}
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MASKED = {**SIZE, "image": IMAGE, "mask_image": (IMAGE[:, :1] > 0.5).float()}


@pytest.mark.parametrize(
    ("kind", "shape", "inputs"),
    [
        ("StableDiffusionPipeline", "sd15", SIZE),
        ("StableDiffusionXLPipeline", "sdxl", SIZE),
        ("StableDiffusionImg2ImgPipeline", "sd15", {"image": IMAGE, "strength": 1.0}),
        ("StableDiffusionInpaintPipeline", "inpainting", MASKED),
        ("StableDiffusionControlNetPipeline", "sd15", {"image": IMAGE}),
    ],
)
def test_a_pipeline_merges_and_makes_the_same_picture_afterwards(
    make_pipeline, picture, settings, kind, shape, inputs
):
    pipeline = make_pipeline(kind, shape)
    off = picture(pipeline, **inputs)
    linear = settings("keys", 0.9375, late_ratio=0.5, schedule="linear")
    with tome.attach(pipeline, linear) as merging:
        merged = {**inputs, "callback_on_step_end": merging.on_step_end}
        first, second = picture(pipeline, **merged), picture(pipeline, **merged)
    report = merging.report()
    assert report.merged_steps == report.steps == 8 and not torch.equal(first, off)
    assert torch.equal(first, second), "the second picture starts at the first step too"
    change = report.merged_layers[0]
    assert (change.fewest_tokens, change.most_tokens) == (change.tokens // 16, change.tokens // 2)
    assert torch.equal(picture(pipeline, **inputs), off)


def test_a_pipeline_of_few_steps_keeps_more_tokens(make_pipeline, picture, settings):
    pipeline = make_pipeline()
    with tome.attach(pipeline, settings("keys", 0.9375, full_steps=20)) as merging:
        merging.set_step(0, 4)
        picture(pipeline, callback_on_step_end=merging.on_step_end)
    change = merging.report().merged_layers[0]
    assert change.fewest_tokens == change.most_tokens
    assert change.most_tokens == pytest.approx(change.tokens / 16 * 5 ** (2 / 3), abs=16)


class Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


def test_a_transformer_model_and_its_pipeline_are_refused():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
    )
    for each in (model, Pipeline(model)):
        with pytest.raises(TypeError, match="no UNet"):
            tome.attach(each)


CPU = torch.device("cpu")
OFFLOAD = {
    "all": lambda unet: accelerate.cpu_offload(unet, CPU, offload_buffers=True),
    "blocks": lambda unet: unet.enable_group_offload(CPU, CPU, "block_level", 1),
    "leaves": lambda unet: unet.enable_group_offload(CPU, CPU, "leaf_level"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", OFFLOAD)
def test_offload_hooks_stay_and_merging_works_next_to_them(make_unet, run, settings, method, how):
    if how != "all" and not hasattr(diffusers.ModelMixin, "enable_group_offload"):
        pytest.skip("this diffusers has no group offload")
    unet = make_unet()
    off = run(unet)
    with tome.attach(unet, settings(method)):
        on = run(unet)
    OFFLOAD[how](unet)
    assert torch.equal(run(unet), off)
    with tome.attach(unet, settings(method)) as merging:
        torch.testing.assert_close(run(unet), on, rtol=0, atol=1e-6)
    assert len(merging.report().merged_layers) == 3 and torch.equal(run(unet), off)


def test_a_compiled_block_is_not_merged(make_unet, run, settings):
    unet = make_unet()
    find_layers(unet)[0].block.compile(backend="eager")
    with tome.attach(unet, settings()) as merging:
        run(unet)
    first, *others = merging.report().layers
    assert "compiled" in first.reason and not first.merged_calls
    assert any(other.merged_calls for other in others)
