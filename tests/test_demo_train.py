"""Training the tiny model: on a few made-up pictures, small enough for a test."""

import signal

import pytest
import torch

pytest.importorskip("ldm")

from lab.demo import train
from lab.demo.model import FeatureNet, TinyModel

SMALL = {"image_size": 8, "channel_mult": [1, 1], "attention_resolutions": [1, 2], "context_dim": 32}
RECIPE = train.Recipe(batch=6, warmup=5, lr=2e-3)


@pytest.fixture(scope="module")
def pictures():
    colours = {"red square": (255, 0, 0), "green square": (0, 160, 0), "blue square": (0, 0, 255), "night": (0, 0, 0)}
    rgb = torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)
    for picture, colour in zip(rgb, colours.values(), strict=True):
        picture[:, 2:6, 2:6] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
    return train.Pictures(list(colours), rgb)


def steps_of(training, count):
    return [training.train_step(train.learning_rate(training.recipe, training.step, 8)) for _ in range(count)]


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_resumed_equals_uninterrupted(pictures, tmp_path):
    whole = train.Training(pictures, RECIPE, SMALL)
    expected = steps_of(whole, 4)
    part = train.Training(pictures, RECIPE, SMALL)
    losses = steps_of(part, 2)
    part.save(tmp_path / "checkpoint.pt")
    torch.rand(3)  # whatever else draws random numbers
    rest = train.Training.resume(tmp_path / "checkpoint.pt", pictures)
    losses += steps_of(rest, 2)
    assert losses == expected
    assert rest.step == 4
    assert same(whole.model.state_dict(), rest.model.state_dict())
    assert same(whole.average, rest.average)
    assert not same(whole.average, part.average)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_batches_depend_on_seed_and_step_alone(pictures):
    model = TinyModel.random(0, words=pictures.words, **SMALL)
    first, again = (train.draw_batch(pictures, model, RECIPE, 7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for recipe, step in ((RECIPE, 8), (train.Recipe(batch=6, seed=1), 7)):
        assert not torch.equal(train.draw_batch(pictures, model, recipe, step)[3], first[3])


def test_learning_rate_rises_stays_and_falls():
    recipe = train.Recipe(lr=1.0, warmup=10, decay_part=0.5)
    rates = [train.learning_rate(recipe, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:51] == [1.0] * 41
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-6)


def test_run_ends_saves_and_goes_on(pictures, tmp_path):
    training = train.Training(pictures, RECIPE, SMALL)
    assert train.run(training, tmp_path, steps=3)
    resumed = train.Training.resume(tmp_path / "checkpoint.pt", pictures)
    assert train.run(resumed, tmp_path, steps=5)
    assert resumed.step == train.Training.resume(tmp_path / "checkpoint.pt", pictures).step == 5
    assert [line[:8] for line in (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()] == [
        "step 3/3",
        "step 5/5",
    ]


def test_sigterm_ends_the_run_after_its_step_and_saves(pictures, tmp_path, monkeypatch):
    training = train.Training(pictures, RECIPE, SMALL)
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
    training = train.Training(pictures, RECIPE, SMALL)
    steps_of(training, 1)
    (tmp_path / "train.log").write_text("".join(f"line {i}\n" for i in range(40)), encoding="utf-8")
    FeatureNet(4).save(tmp_path / "features.safetensors")
    train.export(training, tmp_path, tmp_path / "train.log")
    model = TinyModel.load(tmp_path / "tiny.safetensors")
    assert model.captions == pictures.captions
    for name, value in model.state_dict().items():
        assert torch.equal(value, training.average[name].half().float())
    assert (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()[0] == "line 20"
