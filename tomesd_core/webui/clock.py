"""Seconds on a clock, once the device of the model has done its work."""

from __future__ import annotations

import inspect
import time

import torch
from modules import devices


def now() -> float:
    """Waits for the device, and reads the clock."""
    wait_for(devices.device)
    return time.perf_counter()


def wait_for(device: torch.device) -> None:
    """Returns once `device` has done what it was given."""
    if device.type == "cpu":
        return
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is None:
        # DirectML, say: what is read back comes behind all that was queued before.
        torch.zeros(1, device=device).cpu()
    elif inspect.signature(synchronize).parameters:
        # Without a device, CUDA and XPU take the current one, which --device-id does not change.
        synchronize(device)
    else:
        synchronize()
