"""The extension in the miniature host, with small random models; after every test nothing of it may be left."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from in_host import HALVED, REQUEST, hooked, other_script, pixels, running, script_args
from torch import nn

from lab.demo.model import TinyModel
from lab.host import Host, start


def small_model(seed: int, **shape: Any) -> TinyModel:
    return TinyModel.random(seed, channel_mult=[1, 1], attention_resolutions=[1], **shape)


class Joint(nn.Module):
    """A model without a SpatialTransformer, as SD3's is."""

    in_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1)])

    def forward(self, x, timesteps, context):
        return self.joint_blocks[0](x)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads, and on a busy machine much slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, nn.Module]:
    """Two checkpoints of one shape, which share a module in memory; one of another shape; one without transformers."""
    joint = small_model(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        joint.model.diffusion_model = Joint().requires_grad_(False)
    return {"base": small_model(0), "twin": small_model(1), "other": small_model(2, num_res_blocks=2), "joint": joint}


@pytest.fixture(scope="session")
def loaded() -> weakref.WeakSet:
    """Every model that the host ever loaded and that is still alive."""
    return weakref.WeakSet()


@pytest.fixture(scope="module")
def host(checkpoints, loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The host with this extension. One a module: there is one host a process, and other tests start theirs."""

    def load(name: str) -> nn.Module:
        model = copy.deepcopy(checkpoints[name])
        loaded.add(model)
        return model

    models = {name: lambda name=name: load(name) for name in checkpoints}
    with start(models, data_path=tmp_path_factory.mktemp("host")) as host:
        assert host.app  # calls every script's `ui` as WebUI does with --api
        yield host


@pytest.fixture
def generation(host) -> ModuleType:
    return running("webui.generation")


@pytest.fixture
def make(host) -> Callable[..., Any]:
    """Makes a small picture; `tome` are the script's arguments, the others the API's fields."""

    def run(tome: list[Any] | None = None, tab: str = "txt2img", **request: Any):
        if tome is not None:
            request["alwayson_scripts"] = {"ToMe": {"args": tome}}
        return getattr(host, tab)(**{**REQUEST, **request})

    return run


@pytest.fixture
def make_p(host) -> Callable[..., Any]:
    """What `process_images` takes, for generations that no request makes; `tome=None` is one without scripts."""

    def build(tome: list[Any] | None, **fields: Any):
        from modules import processing, scripts, shared

        p = processing.StableDiffusionProcessingTxt2Img(**{**REQUEST, **fields})
        if tome is not None:
            p.is_api = True
            p.scripts, p.script_args = scripts.scripts_txt2img, script_args(host, tome)
        shared.state.begin()
        return p

    return build


@pytest.fixture(scope="module")
def plain(host) -> list[bytes]:
    """The picture of `REQUEST` from the first checkpoint, made before anything was merged."""
    return pixels(host.txt2img(**REQUEST))


@pytest.fixture(scope="module")
def merged(host, plain) -> list[bytes]:
    """The same picture, half its tokens merged."""
    picture = pixels(host.txt2img(**REQUEST, alwayson_scripts={"ToMe": {"args": HALVED}}))
    assert picture != plain
    return picture


@pytest.fixture
def add_script(host) -> Iterator[Callable[..., None]]:
    """Adds another extension's script until the test's end; see `other_script`."""
    with contextlib.ExitStack() as stack:
        yield lambda first=False, **methods: stack.enter_context(other_script(first, **methods))


@pytest.fixture
def on_denoised(host) -> Iterator[Callable[[Callable], None]]:
    """Registers a function that is called after every evaluation of the model, until the test's end."""
    from modules import script_callbacks

    registered = []

    def register(function: Callable) -> None:
        registered.append(function)
        script_callbacks.on_cfg_denoised(function)

    yield register
    for function in registered:
        script_callbacks.remove_callbacks_for_function(function)


@pytest.fixture
def ratios(generation, on_denoised) -> list[float | None]:
    """The ratio of every evaluation of the model; None where nothing was attached."""
    seen: list[float | None] = []

    def note(_: Any) -> None:
        merging = generation._running and generation._running._merging
        seen.append(merging.report().ratio if merging else None)

    on_denoised(note)
    return seen


@pytest.fixture
def attention(host) -> Iterator[SimpleNamespace]:
    """What reaches self-attention, whoever calls it: the UNet of each call, and how many keys its first layer sees."""
    seen = SimpleNamespace(tokens=[], unets=[], layer=None)
    keys: set[nn.Module] = set()

    def before(module: nn.Module, args: tuple) -> None:
        # Called before the module's own hooks.
        if hasattr(module, "input_blocks"):
            seen.unets.append(module)
            seen.tokens.append(0)
            seen.layer = None
            keys.update(block.attn1.to_k for block in module.modules() if hasattr(block, "attn1"))
        elif module in keys and seen.layer in (None, module):
            # The largest: a layer may first be asked, with a few tokens, how it splits its heads.
            seen.layer, seen.tokens[-1] = module, max(seen.tokens[-1], args[0].shape[1])

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    yield seen
    handle.remove()


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the extension logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("ToMe")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


@pytest.fixture(scope="module")
def one_step(host, plain) -> list[bytes]:
    """The picture of `REQUEST` in one step, which is what every test ends with."""
    return pixels(host.txt2img(**{**REQUEST, "steps": 1}))


def default_options() -> None:
    from modules import shared

    shared.opts.data.update({key: info.default for key, info in shared.opts.data_labels.items()})


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test in the host: no exception of ours, no hook on any model, no wrapped `sample`, off as it was."""
    if "host" not in request.fixturenames:
        yield
        return
    host, loaded, one_step = (request.getfixturevalue(name) for name in ("host", "loaded", "one_step"))
    generation = request.getfixturevalue("generation")
    from modules import errors

    default_options()
    errors.exception_records.clear()
    seen: list[Any] = []
    with other_script(first=True, before_process=seen.append):
        yield
    frames = [frame for record in errors.exception_records for frame, _ in record["traceback"]]
    assert [frame for frame in frames if "tome.py" in frame or f"tomesd_core{os.sep}webui" in frame] == []
    assert generation._running is None
    assert {name for model in loaded for name in hooked(model)} == set()
    assert [p.sample for p in seen if "sample" in vars(p)] == []
    default_options()
    if not seen:
        return
    processed = host.txt2img(**{**REQUEST, "steps": 1})
    assert pixels(processed) == one_step
    assert "ToMe" not in processed.infotexts[0]
    assert host.sd_model.sd_checkpoint_info.model_name == "base"
