"""Training a tiny model on a few made-up pictures."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image

from lab.bench.pictures import TINY_SHAPE
from lab.demo import train, training_pictures
from lab.demo.model import TinyModel

RECIPE = train.Recipe(batch=6)


@pytest.fixture(scope="module")
def pictures():
    captions = ["red square", "green square", "blue square", "night"]
    colours = torch.tensor([(255, 0, 0), (0, 160, 0), (0, 0, 255), (0, 0, 0)], dtype=torch.uint8)
    return train.Pictures(captions, [colours.view(4, 3, 1, 1).expand(-1, -1, 8, 8)])


@pytest.fixture(scope="module")
def both_sizes(pictures):
    """Each picture twice, in two sizes."""
    rgb = pictures.rgb[0].repeat(2, 1, 1, 1)
    return train.Pictures(pictures.captions * 2, [rgb, rgb.repeat(1, 1, 2, 2)])


def steps_of(training, count):
    return [training.train_step(1e-3) for _ in range(count)]


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_resumed_equals_uninterrupted(pictures, tmp_path):
    whole = train.Training(pictures, RECIPE, TINY_SHAPE)
    expected = steps_of(whole, 4)
    part = train.Training(pictures, RECIPE, TINY_SHAPE)
    losses = steps_of(part, 2)
    part.save(tmp_path / "checkpoint.pt")
    torch.rand(3)  # Other code draws random numbers too.
    rest = train.Training.resume(tmp_path / "checkpoint.pt", pictures)
    assert losses + steps_of(rest, 2) == expected and rest.step == 4
    assert same(whole.model.state_dict(), rest.model.state_dict())
    assert same(whole.average, rest.average)
    assert not same(whole.average, part.average)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_batches_depend_on_seed_and_step_alone(pictures):
    model = TinyModel.random(0, words=pictures.words, **TINY_SHAPE)
    first, again = (train.draw_batch(pictures, model, RECIPE, 7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for recipe, step in ((RECIPE, 8), (train.Recipe(batch=6, seed=1), 7)):
        assert not torch.equal(train.draw_batch(pictures, model, recipe, step)[3], first[3])


def test_the_learning_rate_rises_stays_and_falls():
    recipe = train.Recipe(lr=1.0, warmup=10, decay_part=0.5)
    rates = [train.learning_rate(recipe, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:51] == [1.0] * 41
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-6)


def test_a_run_ends_saves_and_continues(pictures, tmp_path):
    training = train.Training(pictures, RECIPE, TINY_SHAPE)
    assert train.run(training, tmp_path, steps=3)
    resumed = train.Training.resume(tmp_path / "checkpoint.pt", pictures)
    assert train.run(resumed, tmp_path, steps=5)
    assert resumed.step == train.Training.resume(tmp_path / "checkpoint.pt", pictures).step == 5
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line[:8] for line in lines] == ["step 3/3", "step 5/5"]


def test_sigterm_ends_the_run_after_its_step_and_saves(pictures, tmp_path, monkeypatch):
    training = train.Training(pictures, RECIPE, TINY_SHAPE)
    step = train.Training.train_step

    def interrupted(self, lr):
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, lr)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train.Training, "train_step", interrupted)
    assert not train.run(training, tmp_path, steps=1000)
    assert signal.getsignal(signal.SIGTERM) is before
    assert train.Training.resume(tmp_path / "checkpoint.pt", pictures).step == 2


def test_export_writes_what_load_reads(pictures, tmp_path):
    training = train.Training(pictures, RECIPE, TINY_SHAPE)
    steps_of(training, 1)
    (tmp_path / "train.log").write_text("".join(f"line {i}\n" for i in range(40)), encoding="utf-8")
    train.export(training, tmp_path, tmp_path / "train.log", pictures="four squares")
    model = TinyModel.read(tmp_path / "tiny.safetensors")
    assert '"pictures": "four squares"' in (tmp_path / "tiny.json").read_text(encoding="utf-8")
    assert model.captions == pictures.captions
    for name, value in model.state_dict().items():
        assert torch.equal(value, training.average[name].half().float())
    assert (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()[0] == "line 20"


def test_sizes_alternate_with_equal_pixels_and_each_picture_once_per_epoch(both_sizes):
    recipe = train.Recipe(batch=8)
    model = TinyModel.random(0, words=both_sizes.words, **TINY_SHAPE)
    batches = [train.draw_batch(both_sizes, model, recipe, step)[0] for step in range(8)]
    assert [batch.shape for batch in batches] == [(8, 3, 8, 8), (2, 3, 16, 16)] * 4
    # Eight pictures are four colours twice: one batch of small ones, four of large ones.
    for epoch in (batches[0], torch.cat(batches[1::2])):
        middles = [tuple(picture[:, 4, 4].tolist()) for picture in epoch]
        assert sorted(middles.count(middle) for middle in set(middles)) == [2] * 4


def test_both_sizes_are_trained_and_captions_are_stored_once(both_sizes, tmp_path):
    training = train.Training(both_sizes, train.Recipe(batch=8), TINY_SHAPE)
    assert training.model.captions == both_sizes.captions[:4]
    shapes = []
    training.model.model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    losses = steps_of(training, 2)
    assert sorted(shapes) == [(1, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2
    # The first loss is about 1: the shards' mean, not their sum.
    assert 0.3 < losses[0] < 1.2 and 0.3 < losses[1] < 1.2
    training.save(tmp_path / "checkpoint.pt")
    resumed = train.Training.resume(tmp_path / "checkpoint.pt", both_sizes)
    assert resumed.model.captions == both_sizes.captions[:4]


def test_crops_lie_in_their_boxes_at_several_scales_and_agree_across_sizes(tmp_path, monkeypatch):
    down, across = np.mgrid[:100, :200].astype(np.uint8)
    photograph = np.dstack([across, down, np.full_like(across, 7)])
    Image.fromarray(photograph).save(tmp_path / "ramp.png")
    boxes = ((0, 0, 100, 100), (104, 4, 196, 98))
    regions = (("ramp.png", "a ramp", boxes), ("ramp.png", "it", boxes[1:]))
    monkeypatch.setattr(training_pictures, "REGIONS", regions)
    crops = training_pictures.load_photographs(tmp_path, crops=20, sizes=(8, 16))
    assert crops.captions == ["a ramp"] * 20 + ["it"] * 20 and crops.names == ["a ramp", "it"]
    small, large = crops.rgb
    assert small.shape == (40, 3, 8, 8) and large.shape == (40, 3, 16, 16)
    assert (small[:, 2] == 7).all()
    halved = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (small - halved).abs().max() <= 2
    for number, crop in enumerate(large):
        left, top, right, bottom = boxes[number % 2 if number < 20 else 1]
        assert left <= crop[0].min() and crop[0].max() < right
        assert top <= crop[1].min() and crop[1].max() < bottom
    sides = (large[:, 0, 0, -1].int() - large[:, 0, 0, 0]).tolist()
    assert 40 < min(sides) < 55 < 80 < max(sides)
    again = training_pictures.load_photographs(tmp_path, crops=20, sizes=(8, 16))
    assert all(torch.equal(one, other) for one, other in zip(crops.rgb, again.rgb, strict=True))


def test_the_photographs_are_in_scikit_images_package():
    skimage = pytest.importorskip("skimage")
    crops = training_pictures.load_photographs(crops=1)
    count = len(training_pictures.REGIONS)
    assert [size.shape for size in crops.rgb] == [(count, 3, 32, 32), (count, 3, 64, 64)]
    assert len(crops.names) == count
    # The boxes lie inside the photographs.
    for file, caption, boxes in training_pictures.REGIONS:
        width, height = Image.open(f"{skimage.data_dir}/{file}").size
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height, caption


def test_a_missing_scikit_image_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="scikit-image"):
        training_pictures.load_photographs()
    with pytest.raises(SystemExit):
        train.main(["emoji", "--out", str(tmp_path)])
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_is_used_where_the_cpu_supports_it(pictures, monkeypatch, tmp_path, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    training = train.Training(pictures, train.Recipe(batch=6), TINY_SHAPE)
    dtypes = set()
    training.model.model.diffusion_model.out[-1].register_forward_hook(
        lambda *args: dtypes.add(args[-1].dtype)
    )
    training.train_step(1e-3)
    assert dtypes == {torch.bfloat16 if has_bf16 else torch.float32}
    # A run resumed on another machine keeps its dtype.
    training.save(tmp_path / "checkpoint.pt")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not has_bf16)
    assert train.Training.resume(tmp_path / "checkpoint.pt", pictures).recipe.bf16 == has_bf16
