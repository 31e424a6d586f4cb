"""Stands in for `modules.devices`: one device, no autocasting, and WebUI's check for NaNs."""

from __future__ import annotations

import contextlib

import torch

cpu = torch.device("cpu")
device = cpu
dtype = dtype_unet = dtype_vae = torch.float32


class NansException(Exception):
    """A tensor came out of the model as NaNs."""


def test_for_nans(x: torch.Tensor, where: str) -> None:
    """Raises `NansException` when the first element is NaN; like WebUI, it looks at no other."""
    if torch.isnan(x[(0,) * x.dim()]):
        raise NansException(f"A tensor with NaNs was produced in {where}.")


test_for_nans.__test__ = False  # the name is WebUI's, and no test


def torch_gc() -> None:
    """Frees cached device memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def autocast(disable: bool = False) -> contextlib.AbstractContextManager:
    """A context in which WebUI would autocast."""
    return contextlib.nullcontext()
