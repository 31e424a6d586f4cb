"""Reasons not to merge a call of attention."""

from __future__ import annotations

NO_LAYERS = "this model has no self-attention layers that can be merged"

MEMORY_ERRORS = (
    "out of memory",
    "out_of_memory",
    "out_of_device_memory",
    "allocate memory",
    "not enough memory",
    "not enough gpu video memory",
)
"""Out-of-memory messages of CUDA, ROCm, MPS, XPU, DirectML and the CPU, in lower case."""


class NotMerged(Exception):
    """A call of attention isn't merged. The message is the reason, for people.

    `by_ratio`: the step's ratio removes nothing there, which a schedule may intend.
    """

    def __init__(self, reason: str, by_ratio: bool = False) -> None:
        super().__init__(reason)
        self.by_ratio = by_ratio


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` reports a lack of device or host memory."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in MEMORY_ERRORS
    )


def in_a_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
