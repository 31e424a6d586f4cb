"""The extension in the stand-in for WebUI, with small random models; nothing of it may stay."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from in_host import HALVED, REQUEST, SMALL, hooked, other_script, pixels, running
from torch import nn

from lab.demo.model import TinyModel
from lab.host import Host
from tomesd_core.webui import presets


def small_model(seed: int, **shape: Any) -> TinyModel:
    return TinyModel.random(seed, channel_mult=[1, 1], attention_resolutions=[1], **shape)


class Joint(nn.Conv2d):
    """A model without a SpatialTransformer, like SD3."""

    def forward(self, x, timesteps, context):
        return super().forward(x)


@pytest.fixture(scope="session")
def checkpoints(one_thread) -> dict[str, nn.Module]:
    """Two checkpoints of one shape, one of another, and one without transformers."""
    joint = small_model(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        joint.model.diffusion_model = Joint(3, 3, 3, padding=1).requires_grad_(False)
    return {
        "base": small_model(0),
        "twin": small_model(1),
        "other": small_model(2, num_res_blocks=2),
        "joint": joint,
    }


@pytest.fixture(scope="session")
def loaded() -> weakref.WeakSet:
    """Models that the host loaded and that are still alive."""
    return weakref.WeakSet()


@pytest.fixture(scope="session")
def models(checkpoints, loaded) -> dict[str, Callable[[], nn.Module]]:
    """Functions that load the checkpoints."""

    def load(name: str) -> nn.Module:
        model = copy.deepcopy(checkpoints[name])
        loaded.add(model)
        return model

    return {name: functools.partial(load, name) for name in checkpoints}


@pytest.fixture(scope="module")
def host(models) -> Iterator[Host]:
    """The host with this extension; one per module, since a process can have one host at a time."""
    with Host(models) as host:
        yield host


@pytest.fixture
def sampling(host) -> ModuleType:
    return running("webui.sampling")


def of_any_steps(tome: list[Any] | None) -> list[Any] | None:
    """An object's ratio holds for pictures of few steps too."""
    return [{"full_steps": 1, **tome[0]}, *tome[1:]] if tome and isinstance(tome[0], dict) else tome


@pytest.fixture(scope="module")
def make(host) -> Callable[..., Any]:
    """Make a small picture from the script's arguments and fields of `p`."""
    from modules import processing

    def run(tome: list[Any] | None = None, tab: str = "txt2img", **fields: Any):
        with contextlib.closing(host.make_p(of_any_steps(tome), tab, **{**REQUEST, **fields})) as p:
            return processing.process_images(p)

    return run


@pytest.fixture
def make_p(host) -> Callable[..., Any]:
    """Make a `p`, without scripts if `tome` is None."""

    def build(tome: list[Any] | None, **fields: Any):
        p = host.make_p(of_any_steps(tome), **{**REQUEST, **fields})
        if tome is None:
            p.scripts = None
        return p

    return build


@pytest.fixture
def process(host) -> Callable[..., Any]:
    """`process_images`, for a `p` of `make_p`."""
    from modules import processing

    return processing.process_images


@pytest.fixture(scope="module")
def plain(make) -> list[bytes]:
    """The picture of `REQUEST`, made before anything was merged."""
    return pixels(make())


@pytest.fixture(scope="module")
def merged(make, plain) -> list[bytes]:
    """The picture of `REQUEST` with half of its tokens merged."""
    picture = pixels(make(HALVED))
    assert picture != plain
    return picture


@pytest.fixture
def presets_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The presets' file, in the test's folder."""
    monkeypatch.setattr(presets, "PATH", tmp_path / "presets.json")
    return presets.PATH


@pytest.fixture
def add_script(host) -> Iterator[Callable[..., None]]:
    """Add another extension's script for this test; see `other_script`."""
    with contextlib.ExitStack() as stack:
        yield lambda first=False, **methods: stack.enter_context(other_script(first, **methods))


@pytest.fixture
def on_denoised(host) -> Iterator[Callable[[Callable], None]]:
    """Register a function for this test that runs after every evaluation of the model."""
    from modules import script_callbacks

    registered = []

    def register(function: Callable) -> None:
        registered.append(function)
        script_callbacks.on_cfg_denoised(function)

    yield register
    for function in registered:
        script_callbacks.remove_callbacks_for_function(function)


@pytest.fixture
def at_evaluation(on_denoised) -> Callable[[int, Callable[[], Any]], None]:
    """Run an action once, after the evaluation of the model of this number, from 1."""

    def register(number: int, action: Callable[[], Any]) -> None:
        evaluations = itertools.count(1)
        on_denoised(lambda _: action() if next(evaluations) == number else None)

    return register


@pytest.fixture
def own_merging(host) -> dict[str, Any]:
    """Switch WebUI's own token merging on for every pass; return the options."""
    pytest.importorskip("tomesd")
    from modules import shared

    for name in ("token_merging_ratio", "token_merging_ratio_img2img", "token_merging_ratio_hr"):
        shared.opts.data[name] = 0.4
    return dict(shared.opts.data)


@pytest.fixture
def rounds(host: Host, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that times steps, with the fewest rounds."""
    module = running("webui.rounds")
    monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(module, "MOST_SECONDS", 0)
    return module


@pytest.fixture
def measure(rounds: ModuleType) -> Iterator[ModuleType]:
    """The module; afterwards no task waits and no lock is held."""
    from modules import call_queue, progress, shared

    yield running("webui.measure")
    assert progress.pending_tasks == {} and progress.current_task is None
    assert not call_queue.queue_lock.locked()
    assert (shared.state.job, shared.state.interrupted, shared.state.skipped) == ("", False, False)


@pytest.fixture
def task(request: pytest.FixtureRequest) -> str:
    """The id of a measurement, as the page makes one: each test has its own."""
    return f"task({request.node.name})"


@pytest.fixture
def attention(host) -> Iterator[SimpleNamespace]:
    """The UNet of each evaluation, and the number of keys in its first layer."""
    record = SimpleNamespace(tokens=[], unets=[], layer=None)
    keys: set[nn.Module] = set()

    def before(module: nn.Module, args: tuple) -> None:
        # Runs before the module's own hooks.
        if hasattr(module, "input_blocks"):
            record.unets.append(module)
            record.tokens.append(0)
            record.layer = None
            keys.update(block.attn1.to_k for block in module.modules() if hasattr(block, "attn1"))
        elif module in keys and record.layer in (None, module):
            # The largest: the layer's heads may be probed on a few tokens first.
            record.layer, record.tokens[-1] = module, max(record.tokens[-1], args[0].shape[1])

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    yield record
    handle.remove()


@pytest.fixture(scope="module")
def small(make, plain) -> list[bytes]:
    """The picture of `SMALL`, which follows every test."""
    return pixels(make(**SMALL))


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test no exception, hook or wrapper of the extension is left, and off is off."""
    if "host" not in request.fixturenames:
        yield
        return
    names = ("host", "make", "loaded", "small", "sampling")
    host, make, loaded, small, sampling = (request.getfixturevalue(name) for name in names)
    from modules import errors, shared

    shared.opts.reset()
    errors.exceptions.clear()
    sampling.stop()
    ps: list[Any] = []
    with other_script(first=True, before_process=ps.append):
        yield
    files = [
        frame.filename
        for error in errors.exceptions
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    assert [
        file for file in files if "tome.py" in file or f"tomesd_core{os.sep}webui" in file
    ] == []
    assert {name for model in loaded for name in hooked(model)} == set()
    assert [p.sample for p in ps if "sample" in vars(p)] == []
    shared.opts.reset()
    if not ps:
        return
    processed = make(**SMALL)
    assert pixels(processed) == small
    assert "ToMe" not in processed.infotexts[0]
    assert sampling.settings_in_use() is None
    assert host.sd_model.sd_checkpoint_info.model_name == "base"
