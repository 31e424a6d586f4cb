"""Small ldm UNets with random weights, and the fixtures of the core's tests."""

from __future__ import annotations

import contextlib
import logging
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tomesd_core as tome

# A background process may inherit an ignored SIGINT, and so would the servers that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads, and on a busy machine much slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_settings() -> Callable[..., tome.MergeSettings]:
    """Make settings that merge small layers too; by default one ratio, matched in every step."""

    def make(**values: Any) -> tome.MergeSettings:
        simple = {
            "ratio": 0.5,
            "schedule": "constant",
            "method": "paper",
            "full_steps": 1,
            "skip_unprofitable": False,
        }
        return tome.MergeSettings(**{**simple, **values})

    return make


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., nn.Module]:
    """Build an ldm UNet: by default two levels, with 3 layers at level 1 and 4 at level 2."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    def make(seed: int = 0, **options: Any) -> nn.Module:
        config = {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": 1,
            "attention_resolutions": [1, 2],
            "channel_mult": (1, 1),
            "num_heads": 2,
            "use_spatial_transformer": True,
            "context_dim": 8,
            "legacy": False,
            "use_checkpoint": False,
            **options,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNetModel(**config)
            # ldm zeroes the last layer of each block: a merged pass would equal an unmerged one.
            for parameter in unet.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                else:
                    parameter.data += 0.05 * torch.randn_like(parameter)
        return unet.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., tuple[Tensor, ...]]:
    """Make the arguments of one pass: latent, timesteps and context."""

    def make(
        size: tuple[int, int] = (16, 16), batch: int = 2, channels: int = 4, seed: int = 1
    ) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(batch, channels, *size, generator=generator)
        return latent, torch.full((batch,), 500), torch.randn(batch, 5, 8, generator=generator)

    return make


@pytest.fixture
def inputs(make_inputs: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return make_inputs()


@pytest.fixture
def unet(make_unet: Callable[..., nn.Module]) -> nn.Module:
    return make_unet()


@pytest.fixture
def unmerged(unet: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a pass without merging."""
    return unet(*inputs)


@pytest.fixture(params=tome.settings.METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def whole(small_settings: Callable[..., tome.MergeSettings]) -> Callable[..., tome.MergeSettings]:
    """Make settings that match over the whole image, in the tokens' own precision."""
    return lambda **values: small_settings(window=None, **values)


@pytest.fixture
def odd_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ldm UNets take odd latents as WebUI does, by resizing to the skip connection."""
    from ldm.modules.diffusionmodules import openaimodel

    def cat(tensors: list[Tensor], *args: Any, **options: Any) -> Tensor:
        h, skip = tensors
        if h.shape[-2:] != skip.shape[-2:]:
            h = nn.functional.interpolate(h, skip.shape[-2:], mode="nearest")
        return torch.cat([h, skip], *args, **options)

    monkeypatch.setattr(openaimodel, "th", types.SimpleNamespace(**{**vars(torch), "cat": cat}))


@pytest.fixture(scope="session")
def blocks_of() -> Callable[[nn.Module], dict[str, Any]]:
    """Transformer blocks of a UNet, by name."""
    return lambda unet: {
        name: module for name, module in unet.named_modules() if hasattr(module, "attn1")
    }


@pytest.fixture(scope="session")
def watch(blocks_of: Callable) -> Callable[..., contextlib.AbstractContextManager]:
    """Record the inputs of each block's `to_q` while open, by block name."""

    @contextlib.contextmanager
    def watching(unet: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        inputs: dict[str, list[Tensor]] = {name: [] for name in blocks_of(unet)}
        with contextlib.ExitStack() as handles:
            for name, block in blocks_of(unet).items():
                handles.enter_context(
                    block.attn1.to_q.register_forward_pre_hook(
                        lambda _, args, name=name: inputs[name].append(args[0])
                    )
                )
            yield inputs

    return watching


@pytest.fixture(scope="session")
def hook_dicts() -> Callable[[nn.Module], dict[str, dict]]:
    """Copy every hook dictionary of every module."""
    return lambda model: {
        f"{name}.{key}": dict(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and isinstance(value, dict)
    }


class Operations(TorchDispatchMode):
    """Names of the operations that run while it is open, and bytes of the largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func).removeprefix("aten."))
        if func is torch.ops.aten.bitwise_xor.Tensor and isinstance(args[1], int):
            func = torch.ops.aten.bitwise_xor.Scalar  # torch 2.1 dispatches the wrong overload.
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return results


@pytest.fixture(scope="session")
def operations() -> type[Operations]:
    return Operations


class Crossings(Operations):
    """Only those operations that mix or cross devices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [each for each in [*args, results] if isinstance(each, Tensor) and each.ndim]
        if len({tensor.device.type for tensor in tensors}) < 2:
            self.names.pop()
        return results


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> type[Crossings]:
    """`Crossings` for a UNet on the meta device, with probes answered without a value."""
    from tomesd_core import layer_hooks
    from tomesd_core.proportional import Heads

    def known(attention: Any, x: Tensor, *_: Any) -> Heads:
        size = x.shape[-1] // attention.heads
        return Heads(attention.heads, size, size + 8, (size + 8) ** -0.5)

    monkeypatch.setattr(layer_hooks, "probe_heads", known)
    return Crossings


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Messages that the extension logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("ToMe")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)
