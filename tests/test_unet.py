from types import SimpleNamespace

import pytest
from layer_calls import SD1
from torch import nn

from tomesd_core import MergeSettings
from tomesd_core.plan import coarsest_level
from tomesd_core.unet import find_layers, find_unet, measured_level


def levels_of(unet):
    return {layer.name: layer.level for layer in find_layers(unet)}


@pytest.mark.parametrize(
    "options", [{}, {"resblock_updown": True}, {"use_linear_in_transformer": True}], ids=str
)
def test_every_self_attention_layer_is_found_with_its_level(make_unet, options):
    assert levels_of(make_unet(**SD1, **options)) == {
        "input_blocks.1.1.transformer_blocks.0": 1,
        "input_blocks.3.1.transformer_blocks.0": 2,
        "input_blocks.5.1.transformer_blocks.0": 4,
        "middle_block.1.transformer_blocks.0": 8,
        "output_blocks.2.1.transformer_blocks.0": 4,
        "output_blocks.3.1.transformer_blocks.0": 4,
        "output_blocks.4.1.transformer_blocks.0": 2,
        "output_blocks.5.1.transformer_blocks.0": 2,
        "output_blocks.6.1.transformer_blocks.0": 1,
        "output_blocks.7.1.transformer_blocks.0": 1,
    }


def test_every_block_of_a_transformer_is_a_layer(make_unet, blocks_of):
    unet = make_unet(transformer_depth=2, context_dim=[8, 8])
    layers = find_layers(unet)
    assert {layer.name: layer.block for layer in layers} == blocks_of(unet)
    assert len(layers) == 14
    assert all(layer.block in layer.transformer.transformer_blocks for layer in layers)


def test_the_coarsest_level_is_max_downsample_or_a_coarser_unets_finest(make_unet):
    def coarsest(max_downsample=1, **options):
        settings = MergeSettings(max_downsample=max_downsample)
        return coarsest_level(settings, find_layers(make_unet(**options)))

    assert coarsest() == 1 and coarsest(4) == 4
    assert coarsest(attention_resolutions=[2]) == 2
    assert coarsest(disable_self_attentions=[True, False]) == 2
    assert coarsest_level(MergeSettings(), []) == 1


def test_layers_without_self_attention_are_marked(make_unet):
    layers = find_layers(make_unet(disable_self_attentions=[True, False]))
    assert [layer.is_self_attention for layer in layers] == [layer.level == 2 for layer in layers]


def model_of(**parts):
    """A model with these parts."""
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def test_layers_are_found_by_structure_whatever_the_classes():
    block = model_of(norm1=nn.LayerNorm(4), attn1=nn.Linear(4, 4))
    stage = model_of(transformer_blocks=nn.ModuleList([block]))
    assert levels_of(stage) == {"transformer_blocks.0": None}
    assert levels_of(model_of(stage=stage)) == {"stage.transformer_blocks.0": None}
    assert levels_of(model_of(transformer_blocks=[block])) == {}
    for name in ("norm1", "attn1"):
        lacking = model_of(**{name: nn.Linear(4, 4)})
        assert levels_of(model_of(transformer_blocks=nn.ModuleList([lacking]))) == {}


def test_the_unet_is_found_in_a_model_or_is_the_model(make_unet):
    unet = make_unet()
    assert find_unet(SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))) is unet
    assert find_unet(unet) is unet


@pytest.mark.parametrize("model", [None, "unet", object(), type("Model", (), {"model": None})()])
def test_a_model_without_a_unet_is_refused_with_its_type(model):
    with pytest.raises(TypeError, match=type(model).__name__):
        find_unet(model)


@pytest.mark.parametrize("base", ["ModelMixin", "DiffusionPipeline"])
def test_a_diffusers_model_without_a_unet_is_refused(base):
    diffusers = type("SD3Transformer2DModel", (type(base, (nn.Module,), {}),), {})
    with pytest.raises(TypeError, match="SD3Transformer2DModel; transformers"):
        find_unet(diffusers())


def test_the_measured_level_is_the_structures_for_sizes_that_halve():
    """From 64 pixels to 1024. Without the structure, tiny sizes are ambiguous."""
    for rows in range(8, 129):
        for columns in {8, 9, rows, 64, 75, 128}:
            latent = grid = rows, columns
            for level in (1, 2, 4, 8):
                assert measured_level(latent, grid, level) == level, (latent, grid)
                if min(latent) > 11:
                    assert measured_level(latent, grid) == level, (latent, grid)
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2


@pytest.mark.parametrize(
    ("latent", "grid", "level"),
    [
        ((64, 64), (16, 16), 4),
        ((65, 33), (32, 16), 2),
        ((64, 64), (40, 40), 2),
        ((64, 64), (128, 128), 1),
    ],
)
def test_the_measured_level_of_another_size_is_the_nearest(latent, grid, level):
    """Average pooling rounds down, and resizing inside the UNet may have any factor."""
    for expected in (None, 1, 2, 4, 8):
        assert measured_level(latent, grid, expected) == level
