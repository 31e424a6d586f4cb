"""A host with small random models and an extension that records what it is called for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lab.demo.model import TinyModel
from lab.host import Host, start

EXTENSION = Path(__file__).parent / "extension"


class TestModel(TinyModel):
    """A tiny model whose encoded prompts get longer with the prompt: prompts of two lengths can't share a batch."""

    __test__ = False

    def encode_prompts(self, prompts):
        encoded = super().encode_prompts(prompts)
        return encoded.repeat(1, 2, 1) if any("long" in prompt for prompt in prompts) else encoded


def small_model(seed: int = 0, **shape: object) -> TinyModel:
    """Two levels, both with attention; an evaluation of 16×16 takes a few milliseconds."""
    return TestModel.random(seed, words=["cat", "dog", "long"], model_channels=32, channel_mult=[1, 1], **shape)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., TinyModel]:
    """`small_model`, for tests that start a host of their own."""
    return small_model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads, and on a busy machine much slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The host, with two checkpoints of one architecture and one of another."""
    models = {"base": small_model(0), "twin": small_model(1), "other": small_model(2, num_res_blocks=2)}
    with start(models, EXTENSION, tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def recorded(host: Host) -> Iterator[ModuleType]:
    """The recorder's notes, empty; the host as it was started."""
    from modules import errors, shared

    shared.opts.data.update({key: info.default for key, info in shared.opts.data_labels.items()})
    errors.exception_records.clear()
    assert host.app  # making it calls every script's `ui`
    module = sys.modules["recorded"]
    module.clear()
    yield module
    module.clear()


@pytest.fixture
def generate(host: Host, recorded: ModuleType) -> Callable:
    """Generates something small; fields as for the API."""

    def run(tab: str = "txt2img", **request: object):
        defaults = {"prompt": "cat", "steps": 2, "width": 16, "height": 16, "seed": 1, "sampler_name": "Euler"}
        return getattr(host, tab)(**{**defaults, **request})

    return run
