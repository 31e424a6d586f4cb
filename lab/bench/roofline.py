"""Operations of code on meta tensors, and their times on a GPU by a roofline model.

On PyTorch's meta device tensors have shapes and no values, and every operation is recorded. The
number of kernels that CUDA launches is from ATen's sources. Every time is an estimate: the largest
of an operation's bytes over the card's bandwidth, its products over the card's rate, and 2.5 µs per
launch.
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
    """A GPU's bytes and operations per second, by data sheets and published measurements."""

    bandwidth: float
    products: float
    """Dense fp16 products with fp32 sums, as reached by matrices of this size."""
    attention: dict[int, float]
    """FlashAttention 2's forward pass by its kernels' head size."""


CARDS = {
    "RTX 4090": Card(1.008e12, 132e12, {64: 161e12, 96: 163e12, 128: 163e12, 192: 150e12}),
    "A100": Card(2.039e12, 225e12, {64: 177e12, 96: 190e12, 128: 203e12, 192: 190e12}),
    "H200": Card(4.8e12, 593e12, {64: 320e12, 96: 345e12, 128: 368e12, 192: 330e12}),
    "RTX 3060": Card(0.36e12, 20.4e12, {64: 24.5e12, 96: 24.5e12, 128: 24.5e12, 192: 22e12}),
}

FUSED = "fused_attention"
"""Represents fused attention, which PyTorch decomposes on the meta device."""

_VIEWS = """
_reshape_alias _unsafe_view alias as_strided chunk detach diagonal empty empty_like empty_strided
expand lift_fresh narrow new_empty new_empty_strided permute select slice split split_with_sizes
squeeze t transpose unbind unfold unsqueeze view
"""
VIEWS = set(_VIEWS.split())
"""Operations that launch no kernel."""
READING = {"_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero"}
READING |= {"unique_consecutive"}
"""Operations that make the CPU wait for their result."""
CLONING = {"constant_pad_nd", "scatter", "index_put", "masked_fill"}
"""Operations of two kernels: a fill or a copy, and their own."""
SHORT_ROW = 4096
"""Longest row that one block sorts; longer ones take a radix pass per byte."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Shape and bytes of an operation's tensor."""

    shape: tuple[int, ...]
    bytes: int
    """Dimensions of stride 0 have none."""

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """Shape and bytes of `tensor`."""
        sides = (side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        return cls(tuple(tensor.shape), math.prod(sides) * tensor.element_size())

    @property
    def count(self) -> int:
        """Number of elements."""
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
        """Bytes read and written."""
        written = sum(each.bytes for each in self.outputs)
        # These read only the rows that they take.
        takes_rows = self.name in ("index_select", "gather", "index")
        read = self.inputs[1:] if takes_rows else self.inputs
        return written * (1 + takes_rows) + sum(each.bytes for each in read)

    def seconds(self, card: Card) -> float:
        """Estimated time."""
        ins, outs = self.inputs, self.outputs
        if self.name == FUSED:
            (items, heads, queries, size), keys = ins[0].shape, ins[1].shape[2]
            wide = next(width for width in WIDTHS if size <= width)
            shorter = min(queries, keys)
            rate = card.attention.get(wide, card.attention[64])
            rate *= 0.88 if shorter <= 1024 else 0.95 if shorter <= 2048 else 1
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
    """While open, records operations on the meta device, waits of the CPU, and the memory peak."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.waits: list[str] = []
        self.peak = 0
        """Most bytes of results alive at once."""
        self._living: dict[StorageWeakRef, int] = {}

    @property
    def launches(self) -> int:
        """Number of kernels that CUDA would launch."""
        return sum(operation.launches for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Bytes read and written by all operations."""
        return sum(operation.bytes for operation in self.operations)

    def seconds(self, card: Card) -> float:
        """Estimated time of all operations, if the CPU keeps the GPU busy."""
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
            operands = ([*map(Operand.of, each)] for each in (inputs, outputs))
            self.operations.append(Operation(name, launches, *operands))
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
    """Tensors among the values, and in lists of them."""
    each = (
        one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])
    )
    return [one for one in each if isinstance(one, Tensor)]


def _launches(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    """Number of kernels that CUDA launches for an operation."""
    if name in VIEWS or (outputs and all(tensor.numel() == 0 for tensor in outputs)):
        return 0
    if name in CLONING:
        return 2
    if name in ("sort", "argsort"):
        values = args[0]
        dims = [each for each in args[1:] if type(each) is int]
        length = values.shape[dims[0] if dims else -1]
        if length <= SHORT_ROW:
            return 4
        return values.element_size() + (4 if values.numel() == length else 11)
    return 7 if name == "scatter_reduce" else 1
