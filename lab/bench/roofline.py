"""A GPU without one: the operations of code on meta tensors, and their times by a roofline.

On PyTorch's meta device tensors have shapes and no values; every operation is recorded. How many
kernels CUDA launches for it is read off ATen's sources. Every time is an estimate: the larger of an
operation's bytes over the card's bandwidth, its products over the card's rate, and 2.5 µs a launch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tomesd_core.proportional import WIDTHS

LAUNCH_SECONDS, KERNEL_SECONDS, BANDWIDTH_SHARE = 2.5e-6, 5e-6, 0.8


@dataclasses.dataclass(frozen=True)
class Card:
    """What a GPU does, in bytes and operations a second: the makers' data sheets, and published
    measurements."""

    bandwidth: float
    products: float
    """Dense fp16 products with fp32 sums, as matrices of this size reach it."""
    attention: dict[int, float]
    """FlashAttention 2's forward pass, by the size of heads that its kernels have."""


CARDS = {
    "RTX 4090": Card(1.008e12, 132e12, {64: 161e12, 96: 163e12, 128: 163e12, 192: 150e12}),
    "A100": Card(2.039e12, 225e12, {64: 177e12, 96: 190e12, 128: 203e12, 192: 190e12}),
    "H200": Card(4.8e12, 593e12, {64: 320e12, 96: 345e12, 128: 368e12, 192: 330e12}),
    "RTX 3060": Card(0.36e12, 20.4e12, {64: 24.5e12, 96: 24.5e12, 128: 24.5e12, 192: 22e12}),
}

FUSED = "fused_attention"
"""On the meta device PyTorch would take its fused attention apart: this operation stands for it."""

VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "transpose",
        "t",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
    ),
    *(
        "alias",
        "detach",
        "as_strided",
        "unfold",
        "narrow",
        "split",
        "_reshape_alias",
        "empty",
        "empty_like",
    ),
    *(
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "diagonal",
        "lift_fresh",
        "split_with_sizes",
        "chunk",
    ),
    *("unbind",),
}
READING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "equal",
    "is_nonzero",
}
"""Operations whose result the CPU waits for."""
CLONING = {"constant_pad_nd", "scatter", "index_put", "masked_fill"}
"""Operations of two kernels: a fill or a copy, and their own."""
SHORT_ROW = 4096
"""Rows up to this length are sorted by one block; longer ones by radix, a pass for each byte."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Shape and bytes of a tensor that went through an operation."""

    shape: tuple[int, ...]
    bytes: int
    """A dimension of stride 0 has none."""

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """What is kept of a tensor."""
        sides = (side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        return cls(tuple(tensor.shape), math.prod(sides) * tensor.element_size())

    @property
    def count(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on the device."""

    name: str
    launches: int
    inputs: list[Operand]
    outputs: list[Operand]

    @property
    def bytes(self) -> int:
        """What it reads and writes."""
        written = sum(each.bytes for each in self.outputs)
        # Some read the rows that they take, not all.
        takes_rows = self.name in ("index_select", "gather", "index")
        read = self.inputs[1:] if takes_rows else self.inputs
        return written * (1 + takes_rows) + sum(each.bytes for each in read)

    def seconds(self, card: Card) -> float:
        """About how long it takes."""
        ins, outs = self.inputs, self.outputs
        if self.name == FUSED:
            (items, heads, queries, size), keys = ins[0].shape, ins[1].shape[2]
            wide = next(width for width in WIDTHS if size <= width)
            rate = card.attention.get(wide, card.attention[64])
            rate *= (
                0.88 if min(queries, keys) <= 1024 else 0.95 if min(queries, keys) <= 2048 else 1
            )
            moved = 4 * items * heads * size * (queries + keys)
            work = 4 * items * heads * queries * keys * wide / rate
            return max(work, moved / card.bandwidth / BANDWIDTH_SHARE) + KERNEL_SECONDS
        products = 0
        if self.name in ("mm", "addmm", "bmm", "baddbmm"):
            products = 2 * outs[0].count * ins[-1].shape[-2]
        elif self.name == "convolution":
            products = 2 * outs[0].count * math.prod(ins[1].shape[1:])
        return max(
            self.launches * LAUNCH_SECONDS,
            self.bytes / card.bandwidth / BANDWIDTH_SHARE,
            products / card.products,
        )


class Recorder(TorchDispatchMode):
    """Records, while open, operations on the meta device, what the CPU would wait for, and the peak
    of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.waits: list[str] = []
        self.peak = 0
        """The most bytes of results that lived at once."""
        self._living: dict[StorageWeakRef, int] = {}

    @property
    def launches(self) -> int:
        """Kernels that CUDA would launch."""
        return sum(operation.launches for operation in self.operations)

    @property
    def bytes(self) -> int:
        """What all operations read and write."""
        return sum(operation.bytes for operation in self.operations)

    def seconds(self, card: Card) -> float:
        """About how long all of them take, where the GPU is what is waited for."""
        return sum(operation.seconds(card) for operation in self.operations)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        outputs, inputs = _tensors([results]), _tensors([*args, *(kwargs or {}).values()])
        devices = {tensor.device.type for tensor in inputs + outputs if tensor.ndim}
        if (name in READING and devices != {"cpu"}) or len(devices) > 1:
            self.waits.append(name)
        if devices != {"cpu"} and (launches := _launches(name, args, outputs)):
            self.operations.append(
                Operation(name, launches, *([*map(Operand.of, each)] for each in (inputs, outputs)))
            )
        if devices != {"cpu"}:
            self._note_memory(inputs, outputs)
        return results

    def _note_memory(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        given = {StorageWeakRef(each.untyped_storage()) for each in inputs}
        for each in outputs:
            storage = each.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in given:
                self._living[reference] = storage.nbytes()
        self._living = {one: size for one, size in self._living.items() if not one.expired()}
        self.peak = max(self.peak, sum(self._living.values()))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the values, and in lists of them."""
    each = (
        one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])
    )
    return [one for one in each if isinstance(one, Tensor)]


def _launches(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """How many kernels CUDA launches for an operation."""
    if name in VIEWS or (outputs and all(tensor.numel() == 0 for tensor in outputs)):
        return 0
    if name in CLONING:
        return 2
    if name in ("sort", "argsort"):
        values = args[0]
        numbers = [
            each for each in args[1:] if isinstance(each, int) and not isinstance(each, bool)
        ]
        length = values.shape[numbers[0] if numbers else -1]
        if length <= SHORT_ROW:
            return 4
        return values.element_size() + (4 if values.numel() == length else 11)
    return 7 if name == "scatter_reduce" else 1
