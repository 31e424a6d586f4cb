"""What the tests in the stand-in for WebUI share."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lab.host import Host
from tomesd_core.plan import tokens_removed
from tomesd_core.settings import FIELDS

ROOT = Path(__file__).parents[2]

SIDE = 32
"""Of the pictures: 1024 tokens at level 1, 256 at level 2; fewer than 1024 would not be worth
merging."""

REQUEST = {
    "prompt": "cat",
    "steps": 2,
    "width": SIDE,
    "height": SIDE,
    "seed": 1,
    "sampler_name": "Euler",
}
HALVED = [True, 0.5, 0.2, "constant", 0.5, 1, 0, "both passes", 1, "paper"]
"""The script's arguments that merge half of the tokens, matched anew in every step."""
HIRES = {"enable_hr": True, "hr_scale": 1.125, "denoising_strength": 0.6}
HIRES_TOKENS = 36 * 36

KEYS = [setting.infotext for setting in FIELDS.values() if setting.infotext]


def script_module() -> ModuleType:
    """The script file of this project as the host has executed it."""
    from modules import scripts

    return next(
        data.module
        for data in scripts.scripts_data
        if Path(data.path) == ROOT / "scripts" / "tome.py"
    )


def running(name: str) -> ModuleType:
    """A module of the package as the extension in the host runs it, by its name in `tomesd_core`."""
    return importlib.import_module(f"{script_module().PACKAGE}.{name}")


def pixels(processed: Any) -> list[bytes]:
    return [image.tobytes() for image in processed.images]


def left(ratio: float, tokens: int = SIDE * SIDE) -> int:
    """How many tokens a ratio leaves."""
    return tokens - tokens_removed(tokens, ratio, rounded=True)


def run(code, *arguments, cwd=ROOT, **env):
    """Runs Python code in a process of its own, with this project's folder first on its path."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONIOENCODING")
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done


@contextlib.contextmanager
def failing_unet(host: Host, at: int = 2) -> Iterator[None]:
    """The UNet raises in its call number `at`."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == at:
            raise ValueError("on purpose")

    handle = host.sd_model.model.diffusion_model.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def hooked(model: nn.Module) -> list[str]:
    """The modules of a model that have a hook of any kind."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and value
    ]


@contextlib.contextmanager
def other_script(first: bool = False, **methods: Callable) -> Iterator[None]:
    """Another extension's script on both tabs: functions by the callback's name; `first` puts it
    before all others."""
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
