"""The tiny models: words, shapes, predictions, and the shipped weights."""

import functools
import json

import pytest
import torch
from PIL import Image

from lab.bench.models import attention
from lab.bench.pictures import TINY_SHAPE
from lab.bench.samplers import SAMPLERS, Guidance
from lab.demo.model import MODELS, WEIGHTS, TinyModel, split_words
from lab.demo.train import Recipe
from lab.demo.training_pictures import REGIONS

shipped = functools.cache(TinyModel.load)


@pytest.fixture(scope="module")
def small():
    return TinyModel.random(1, **TINY_SHAPE)


def test_words_are_split_without_punctuation_or_case():
    assert split_words("  Cat-FACE, t_rex & café! ") == ["cat", "face", "t", "rex", "café"]
    assert split_words(" ,. ") == []


def test_unknown_words_are_named_and_skipped(small):
    assert small.unknown_words("A red DRAGON, a cat") == ["a", "dragon"]
    assert small.unknown_words("red apple") == small.unknown_words("") == []
    with_unknown, without = small.encode_prompts(["red dragon cat", "red cat"])
    assert torch.equal(with_unknown, without)


def test_prompts_have_different_encodings(small):
    context = small.encode_prompts(["cat", "face", "cat face", "face cat", ""])
    assert context.shape == (5, small.shape["prompt_length"], 32)
    assert torch.pdist(context.flatten(1), p=float("inf")).min() > 1e-3
    # Alone or in a batch: the same.
    assert torch.allclose(small.encode_prompts(["cat face"])[0], context[2], atol=1e-6)


def test_a_prompt_that_is_too_long_keeps_its_first_words(small):
    length = small.shape["prompt_length"]
    assert small.tokenize(["cat " * length + "apple"]).tolist() == [[1] * length]


def test_the_prediction_depends_on_picture_step_and_prompt(small):
    x = torch.randn(2, *small.image_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 900])
    context = small.encode_prompts(["cat", "apple"])
    eps = small.apply_model(x, t, context)
    assert eps.shape == x.shape and eps.isfinite().all()
    for other in ((x.flip(-1), t, context), (x, t.flip(0), context), (x, t, context.flip(0))):
        assert (small.apply_model(*other) - eps).abs().max() > 1e-4
    assert torch.equal(small.apply_model(x, t, {"c_crossattn": [context]}), eps)
    assert torch.equal(small.apply_model(x, t, [context]), eps)


def test_between_two_steps_the_noise_level_is_k_diffusions(small):
    """Its samplers pass fractional steps."""
    x, context = torch.ones(3, *small.image_shape), small.encode_prompts(["cat"] * 3)
    whole = torch.tensor([0, 400, 999])
    as_float, as_int = (small.apply_model(x, t, context) for t in (whole.float(), whole))
    assert torch.allclose(as_float, as_int, atol=1e-4)
    log_sigma = 0.5 * ((1 - small.alphas_cumprod) / small.alphas_cumprod).log()
    between = torch.lerp(log_sigma[400], log_sigma[401], 0.25).expand(3)
    alpha = torch.sigmoid(-2 * between)[:, None, None, None]
    t = torch.full((3,), 400.25)
    expected = alpha.sqrt() * small.velocity(x, t, context) + (1 - alpha).sqrt() * x
    assert torch.allclose(small.apply_model(x, t, context), expected, atol=1e-5)


def test_random_depends_on_its_seed_and_keeps_the_global_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (TinyModel.random(seed, **TINY_SHAPE).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["text.word.weight"], other["text.word.weight"])
    # ldm's zero layers would make every test of merging pass.
    assert all(value.any() for name, value in first.items() if value.ndim > 1)


def test_pictures_survive_the_round_trip(small):
    image = Image.effect_noise((8, 8), 80).convert("RGB")
    assert small.to_images(small.from_images([image, image]))[1].tobytes() == image.tobytes()
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert small.to_images(small.from_images([clear]))[0].getpixel((3, 3)) == (255, 255, 255)
    assert small.to_images(torch.full((1, 3, 8, 8), 99.0))[0].getpixel((0, 0)) == (255, 255, 255)


def test_saved_and_loaded_it_predicts_the_same(small, tmp_path):
    small.save(tmp_path / "m.safetensors", steps=7)
    loaded = TinyModel.read(tmp_path / "m.safetensors")
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["steps"] == 7
    assert (loaded.words, loaded.shape) == (small.words, small.shape) and not loaded.training
    x, t = torch.ones(1, *small.image_shape), torch.tensor([500])
    expected, got = (
        model.apply_model(x, t, model.encode_prompts(["red apple"])) for model in (small, loaded)
    )
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()  # fp16 on disk
    (tmp_path / "m.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.json"):
        TinyModel.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_shipped_files_are_small_and_attributed(name):
    sizes = {file.name: file.stat().st_size for file in (WEIGHTS / name).iterdir()}
    assert sizes["tiny.safetensors"] <= 10_000_000
    assert {"tiny.json", "LICENSE", "train.log"} <= set(sizes)
    text = (WEIGHTS / name / "LICENSE").read_text(encoding="utf-8")
    sources = {"emoji": ["Microsoft", "emoji-data"], "photos": [file for file, _, _ in REGIONS]}
    assert not [source for source in sources[name] if source not in text]


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_knows_every_word_of_its_captions(name):
    model = shipped(name)
    assert not [word for caption in model.captions for word in model.unknown_words(caption)]
    longest = max(len(split_words(caption)) for caption in model.captions)
    assert longest <= model.shape["prompt_length"]


def test_shipped_models_know_their_own_pictures():
    assert {"cat face", "red apple", "green apple"} <= set(shipped("emoji").captions)
    assert shipped("emoji").unknown_words("a cat on a skateboard") == ["a", "on", "skateboard"]
    assert shipped("photos").captions == [caption for _, caption, _ in REGIONS]
    metadata = json.loads((WEIGHTS / "photos" / "tiny.json").read_text(encoding="utf-8"))
    training = metadata["training"]
    assert training["recipe"].keys() == vars(Recipe()).keys()
    files = {f"scikit-image: {file}" for file, _, _ in REGIONS}
    assert sorted(training["pictures"]) == sorted(files)


@pytest.mark.parametrize(
    ("name", "side", "steps", "prompts"),
    [
        ("emoji", 32, 4, ["cat face", "red apple", "green apple"]),
        ("photos", 32, 4, ["cat fur", "galaxies", "wooden table"]),
        ("photos", 64, 2, ["cat fur", "galaxies"]),
    ],
)
def test_pictures_of_a_prompt_resemble_each_other(name, side, steps, prompts):
    model, count = shipped(name), len(prompts)
    noise = torch.randn(2 * count, 3, side, side, generator=torch.Generator().manual_seed(0))
    contexts = (model.encode_prompts(some) for some in (prompts * 2, [""] * 2 * count))
    # Plain attention over 64×64 tokens would take most of the time.
    with attention(model, "sdp"):
        x = SAMPLERS["PLMS"](model, noise, Guidance(*contexts, 3.0), steps, lambda step: None)
    blocks = torch.nn.functional.adaptive_avg_pool2d(model.to_rgb(x), 4).flatten(1)
    distances = torch.cdist(blocks, blocks).fill_diagonal_(float("inf"))
    numbers = list(range(2 * count))
    assert distances.argmin(1).tolist() == numbers[count:] + numbers[:count]
