import pytest
from torch import nn

from tomesd_core import MergeSettings
from tomesd_core.plan import coarsest_level
from tomesd_core.unet import find_layers, find_unet, measured_level

SD1 = {"attention_resolutions": [1, 2, 4], "channel_mult": (1, 1, 1, 1)}


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


def test_layers_are_found_by_structure_whatever_the_classes(make_unet):
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn1 = nn.LayerNorm(4), nn.Linear(4, 4)

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer_blocks = nn.ModuleList([Anything(), Anything()])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = Stage()

    assert levels_of(Model()) == {
        "stage.transformer_blocks.0": None,
        "stage.transformer_blocks.1": None,
    }
    assert levels_of(Stage()) == {"transformer_blocks.0": None, "transformer_blocks.1": None}


@pytest.mark.parametrize("lacking", ["norm1", "attn1"])
def test_blocks_of_another_structure_are_no_layers(lacking):
    block = nn.Module()
    for name in {"norm1", "attn1"} - {lacking}:
        setattr(block, name, nn.Linear(4, 4))
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList([block])
    assert find_layers(model) == []
    model = nn.Module()
    model.transformer_blocks = [block]
    assert find_layers(model) == []


def test_the_unet_is_found_in_a_model_or_is_the_model(make_unet):
    unet, wrapper = make_unet(), type("StableDiffusion", (), {})()
    wrapper.model = type("DiffusionWrapper", (), {"diffusion_model": unet})()
    assert find_unet(wrapper) is unet
    assert find_unet(unet) is unet


@pytest.mark.parametrize(
    "model",
    [None, "unet", object(), type("Model", (), {"model": None})()],
    ids=["none", "text", "object", "model of none"],
)
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
            grid = rows, columns
            for level in (1, 2, 4, 8):
                assert measured_level((rows, columns), grid, level) == level, (rows, columns, grid)
                if min(rows, columns) > 11:
                    assert measured_level((rows, columns), grid) == level, (rows, columns, grid)
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
