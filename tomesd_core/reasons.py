"""Why a call of attention isn't merged."""

from __future__ import annotations

MEMORY_ERRORS = (
    "out of memory",
    "out_of_memory",
    "out_of_device_memory",
    "allocate memory",
    "not enough memory",
    "not enough gpu video memory",
)
"""What errors of CUDA, ROCm, MPS, XPU, DirectML and the CPU say, in lower case."""


class NotMerged(Exception):
    """A call of attention isn't merged. The message is the reason, for people.

    `by_ratio`: the step's own ratio removes nothing there, as a schedule may want it.
    """

    def __init__(self, reason: str, by_ratio: bool = False) -> None:
        super().__init__(reason)
        self.by_ratio = by_ratio


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the CPU, has too little memory left."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in MEMORY_ERRORS
    )


def in_a_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
