"""Packages that the benchmark needs and the library doesn't."""

from __future__ import annotations

import importlib
import types

INSTALL = {
    "ca_tome": "pip install --no-deps ca-tome==0.1.3",
    "diffusers": "pip install diffusers",
    "ldm": "pip install einops omegaconf pillow tqdm && "
    "pip install --no-deps stable-diffusion-sdkit==2.1.5",
    "matplotlib": "pip install matplotlib",
    "psutil": "pip install psutil",
    "requests": "pip install requests",
    "safetensors": "pip install safetensors",
    "skimage": "pip install scikit-image",
    "tomesd": "pip install tomesd==0.1.3",
    "tqdm": "pip install tqdm",
}


class MissingPackage(RuntimeError):
    """A package is missing; the message says how to install it."""


def require(name: str) -> types.ModuleType:
    """Import a module of a package in `INSTALL`.

    Raises `MissingPackage` if it or one of its dependencies is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackage(f"{error}. {package} is needed: {INSTALL[package]}") from error
