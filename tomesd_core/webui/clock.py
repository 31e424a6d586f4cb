"""A clock that waits for the device."""

from __future__ import annotations

import inspect
import time

import torch
from modules import devices


def now() -> float:
    """Wait for the model's device, and read the clock."""
    wait_for(devices.device)
    return time.perf_counter()


def wait_for(device: torch.device) -> None:
    """Return once `device` has finished its queued work."""
    if device.type == "cpu":
        return
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is None:
        # DirectML, for example: a read comes after everything queued before it.
        torch.zeros(1, device=device).cpu()
    elif inspect.signature(synchronize).parameters:
        # Without a device, CUDA and XPU use the current one, which --device-id doesn't change.
        synchronize(device)
    else:
        synchronize()
