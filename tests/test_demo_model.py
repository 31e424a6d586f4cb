"""The tiny models: words, shapes, predictions, and the shipped weights."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("ldm")

from lab.bench.models import attention
from lab.demo.model import MODELS, WEIGHTS, TinyModel, split_words
from lab.demo.train import Recipe
from lab.demo.training_pictures import REGIONS

SMALL = {
    "image_size": 8,
    "channel_mult": [1, 1],
    "attention_resolutions": [1, 2],
    "context_dim": 32,
}


@pytest.fixture(scope="module")
def small():
    return TinyModel.random(1, words=("cat", "face", "red", "apple"), **SMALL)


@pytest.fixture(scope="module")
def shipped():
    return TinyModel.load("emoji")


@pytest.fixture(scope="module")
def photos():
    return TinyModel.load("photos")


def test_words_are_split_without_punctuation_or_case():
    assert split_words("  Cat-FACE, t_rex & café! ") == ["cat", "face", "t", "rex", "café"]
    assert split_words(" ,. ") == []


def test_unknown_words_are_named_and_skipped(small):
    assert small.unknown_words("A red DRAGON, a cat") == ["a", "dragon"]
    assert small.unknown_words("red apple") == small.unknown_words("") == []
    with_unknown, without = small.encode_prompts(["red dragon cat", "red cat"])
    assert torch.equal(with_unknown, without)


def test_prompts_have_different_encodings(small):
    prompts = ["cat", "face", "cat face", "face cat", ""]
    context = small.encode_prompts(prompts)
    assert context.shape == (5, small.shape["prompt_length"], 32)
    for i in range(5):
        for j in range(i):
            assert (context[i] - context[j]).abs().max() > 1e-3, (prompts[i], prompts[j])
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
    assert eps.shape == x.shape
    assert torch.isfinite(eps).all()
    for other in (
        small.apply_model(x.flip(-1), t, context),
        small.apply_model(x, t.flip(0), context),
        small.apply_model(x, t, context.flip(0)),
    ):
        assert (other - eps).abs().max() > 1e-4
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
    first, again, other = (TinyModel.random(seed, **SMALL).state_dict() for seed in (3, 3, 4))
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
    assert loaded.words == small.words
    assert loaded.shape == small.shape
    assert not loaded.training
    x, t = torch.ones(1, *small.image_shape), torch.tensor([500])
    prompt = ["red apple"]
    expected = small.apply_model(x, t, small.encode_prompts(prompt))
    got = loaded.apply_model(x, t, loaded.encode_prompts(prompt))
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
    if name == "emoji":
        assert "Microsoft" in text
        assert "emoji-data" in text
    else:
        assert not [file for file, _, _ in REGIONS if file not in text]


def test_shipped_model_knows_its_captions(shipped):
    assert {"cat face", "red apple", "green apple"} <= set(shipped.captions)
    assert not [word for caption in shipped.captions for word in shipped.unknown_words(caption)]
    assert (
        max(len(split_words(caption)) for caption in shipped.captions)
        <= shipped.shape["prompt_length"]
    )
    assert shipped.unknown_words("a cat on a skateboard") == ["a", "on", "skateboard"]


def pictures_of(model, prompts, side, steps):
    """RGB in [0, 1], by ldm's own sampler."""
    from ldm.models.diffusion.plms import PLMSSampler

    shape = (3, side, side)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for seed in range(len(prompts))
    ]
    # Plain attention over 64×64 tokens would take most of the time.
    with attention(model, "sdp"):
        x, _ = PLMSSampler(model).sample(
            S=steps,
            batch_size=len(prompts),
            shape=shape,
            conditioning=model.encode_prompts(prompts),
            unconditional_conditioning=model.encode_prompts([""] * len(prompts)),
            unconditional_guidance_scale=3.0,
            x_T=torch.stack(noise),
            verbose=False,
        )
    return model.to_rgb(x)


@pytest.mark.parametrize(
    ("name", "side", "steps", "prompts"),
    [
        ("emoji", 32, 4, ["cat face", "red apple", "green apple"]),
        ("photos", 32, 4, ["cat fur", "galaxies", "wooden table"]),
        ("photos", 64, 2, ["cat fur", "galaxies"]),
    ],
)
def test_pictures_of_a_prompt_resemble_each_other(request, name, side, steps, prompts):
    model = request.getfixturevalue({"emoji": "shipped", "photos": "photos"}[name])
    rgb = pictures_of(model, prompts * 2, side, steps)
    blocks = torch.nn.functional.adaptive_avg_pool2d(rgb, 4).flatten(1)
    distances = torch.cdist(blocks, blocks).fill_diagonal_(float("inf"))
    numbers = list(range(len(prompts) * 2))
    assert distances.argmin(1).tolist() == numbers[len(prompts) :] + numbers[: len(prompts)]


def test_the_model_of_photographs_knows_its_captions_and_its_photographs(photos):
    assert photos.captions == [caption for _, caption, _ in REGIONS]
    assert not [word for caption in photos.captions for word in photos.unknown_words(caption)]
    training = json.loads((WEIGHTS / "photos" / "tiny.json").read_text(encoding="utf-8"))[
        "training"
    ]
    assert training["recipe"].keys() == vars(Recipe()).keys()
    assert sorted(training["pictures"]) == sorted(
        {f"scikit-image: {file}" for file, _, _ in REGIONS}
    )
