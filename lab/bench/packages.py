"""The packages that the benchmark needs and the library doesn't."""

from __future__ import annotations

import importlib
import types

INSTALL = {
    "ca_tome": "pip install --no-deps ca-tome==0.1.3",
    "ldm": "pip install einops omegaconf pillow tqdm && pip install --no-deps stable-diffusion-sdkit==2.1.5",
    "diffusers": "pip install diffusers",
    "matplotlib": "pip install matplotlib",
    "psutil": "pip install psutil",
    "requests": "pip install requests",
    "safetensors": "pip install safetensors",
    "skimage": "pip install scikit-image",
    "tomesd": "pip install tomesd==0.1.3",
    "tqdm": "pip install tqdm",
}
"""By top-level module: the command that installs it."""


class MissingPackage(RuntimeError):
    """A package is not installed; the message says how to install it."""


def require(name: str) -> types.ModuleType:
    """Imports a module of a package in `INSTALL`. Raises `MissingPackage` where it, or what it
    needs, is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackage(f"{error}. {package} is needed: {INSTALL[package]}") from error
