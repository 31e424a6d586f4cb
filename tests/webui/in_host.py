"""Requests and helpers of the tests in the stand-in for WebUI."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageChops
from torch import nn

from lab.host import Host
from tomesd_core.plan import tokens_removed
from tomesd_core.settings import FIELDS

ROOT = Path(__file__).parents[2]

SIDE = 32
"""Side of the pictures: 1024 tokens at level 1, the fewest that are worth merging."""

REQUEST = {
    "prompt": "cat",
    "steps": 2,
    "width": SIDE,
    "height": SIDE,
    "seed": 1,
    "sampler_name": "Euler",
}
SMALL = {"steps": 1, "width": 16, "height": 16}
HALVED = [True, 0.5, 0.2, "constant", 0.5, 1, 0, "both passes", 1, "paper"]
"""Arguments of the script that merge half of the tokens."""
HIRES = {"enable_hr": True, "hr_scale": 1.125, "denoising_strength": 0.6}
HIRES_TOKENS = 36 * 36

KEYS = [setting.infotext for setting in FIELDS.values() if setting.infotext]


def script_module(extension: Path = ROOT) -> ModuleType:
    """The script file of this project or of a copy, as the host has executed it."""
    from modules import scripts

    file = extension / "scripts" / "tome.py"
    return next(data.module for data in scripts.scripts_data if Path(data.path) == file)


def running(name: str, extension: Path = ROOT) -> ModuleType:
    """A module of the extension in the host, by its name in `tomesd_core`."""
    return importlib.import_module(f"{script_module(extension).PACKAGE}.{name}")


def imported(package: str) -> dict[str, ModuleType]:
    """The modules of a package that are imported, by name."""
    return {name: each for name, each in sys.modules.items() if name.split(".")[0] == package}


def arguments(
    ratio=0.5,
    late=0.2,
    schedule="constant",
    switch_at=0.5,
    level=1,
    least=0,
    apply_to="both passes",
):
    """Arguments of the script, with the method of `HALVED`."""
    return [True, ratio, late, schedule, switch_at, level, least, apply_to, 1, "paper"]


def keys_of(processed: Any) -> dict[str, Any]:
    """The extension's parameters of a picture, which must read back from its text."""
    from modules import infotext_utils

    parameters = processed.extra_generation_params
    keys = {key: value for key, value in parameters.items() if key.startswith("ToMe")}
    for text in processed.infotexts:
        read = infotext_utils.parse_generation_parameters(text)
        assert {key: str(value) for key, value in keys.items()} == {
            key: value for key, value in read.items() if "ToMe" in key
        }
    return keys


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Over all pixels and channels, from 0 to 255."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def fail(*_: Any, **__: Any) -> None:
    raise ValueError("on purpose")


def pixels(processed: Any) -> list[bytes]:
    return [image.tobytes() for image in processed.images]


def left(ratio: float, tokens: int = SIDE * SIDE) -> int:
    """Number of tokens that a ratio leaves."""
    return tokens - tokens_removed(tokens, ratio, rounded=True)


HALF, FULL = left(0.5), left(0.0)


@contextlib.contextmanager
def failing_unet(host: Host, at: int = 2, error: Exception | None = None) -> Iterator[None]:
    """Let the UNet raise in its call number `at`."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == at:
            raise error or ValueError("on purpose")

    handle = host.sd_model.model.diffusion_model.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def hooked(model: nn.Module) -> list[str]:
    """The hook dictionaries of a model that aren't empty."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and value
    ]


@contextlib.contextmanager
def other_script(first: bool = False, **methods: Callable) -> Iterator[None]:
    """Add another extension's script to both tabs: functions by callback; `first` runs it first."""
    from modules import scripts

    kind = type(
        "Other", (scripts.Script,), {name: staticmethod(method) for name, method in methods.items()}
    )
    runners = scripts.scripts_txt2img, scripts.scripts_img2img
    added = [kind() for _ in runners]
    for runner, script in zip(runners, added, strict=True):
        script.filename, script.args_from, script.args_to = "other.py", 0, 0
        runner.alwayson_scripts.insert(0 if first else len(runner.alwayson_scripts), script)
    try:
        yield
    finally:
        for runner, script in zip(runners, added, strict=True):
            runner.alwayson_scripts.remove(script)


def element_events(page: Any, elem_id: str) -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """The functions that a page calls at an element's events, each with its input components."""
    (element,) = (number for number, block in page.blocks.items() if block.elem_id == elem_id)
    for event, function in zip(page.dependencies, page.fns, strict=True):
        targets = [each[0] if isinstance(each, list) else each for each in event["targets"]]
        if function.fn is not None and element in targets:
            yield function.fn, [page.blocks[number] for number in event["inputs"]]


def wrapper(log: list[str]) -> Callable[..., None]:
    """A callback that wraps `p.sample` and unwraps it after sampling, as other extensions do."""

    def wrap(p, *_, **__):
        before, own = p.sample, vars(p).get("sample")

        def sample(*args, **kwargs):
            log.append("begins")
            try:
                return before(*args, **kwargs)
            finally:
                log.append("ends")
                if own is None:
                    del p.sample
                else:
                    p.sample = own

        p.sample = sample

    return wrap
