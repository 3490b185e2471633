"""Memory of a running program: pointers into tensors, and what reads and writes through them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.dtypes import Form
from mortise_cuda_common.programs.values import (
    Value,
    cast,
    from_raw,
    plain_value,
    result,
    to_raw,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise_cuda_common.programs.dtypes import Dtype


class PointerType:
    """The type of a pointer.

    Attributes:
        element_ty: the format of what it points to.
    """

    __slots__ = ("element_ty",)

    def __init__(self, element_ty: Dtype) -> None:
        self.element_ty = element_ty

    def is_ptr(self) -> bool:
        """It is."""
        return True


class Pointer:
    """Addresses in the memory of one tensor, counted in its numbers; nothing changes it.

    Attributes:
        memory: bits of everything from the tensor's first number up to its last one.
        element: the format of the numbers.
        base: what all addresses have in common.
        offsets: int64, one for each lane; None is a single address.
    """

    __slots__ = ("base", "element", "memory", "offsets")

    def __init__(
        self, memory: torch.Tensor, element: Dtype, base: int = 0, offsets: Any = None
    ) -> None:
        self.memory = memory
        self.element = element
        self.base = base
        self.offsets = offsets

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        """To the first number of a tensor."""
        element = dtypes.OF_TORCH[tensor.dtype]
        extent = 0
        if tensor.numel():
            reach = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in reach)
        flat = tensor.detach().as_strided((extent,), (1,))
        return cls(flat.view(dtypes.RAW[element.bits // 8]), element)

    @property
    def dtype(self) -> PointerType:
        """Its type."""
        return PointerType(self.element)

    @property
    def shape(self) -> list[int]:
        """Addresses along each dimension."""
        return [] if self.offsets is None else list(self.offsets.shape)

    def __add__(self, further: Any) -> Pointer:
        if isinstance(further, Value):
            if further.dtype.form is Form.FLOAT:
                raise TypeError("an address plus a floating-point number is none")
            data = further.data
            offsets = data if data.dtype is torch.int64 else data.to(torch.int64)
            if self.offsets is not None:
                offsets = self.offsets + offsets
            return Pointer(self.memory, self.element, self.base, offsets)
        return Pointer(self.memory, self.element, self.base + int(further), self.offsets)

    __radd__ = __add__

    def __sub__(self, further: Any) -> Pointer:
        pointer: Pointer = self + -further
        return pointer

    def __getitem__(self, key: Any) -> Pointer:
        if self.offsets is None:
            raise IndexError("a single address has no dimensions")
        return Pointer(self.memory, self.element, self.base, self.offsets[key])

    def lanes(self) -> torch.Tensor:
        """The address of each lane."""
        if self.offsets is None:
            return torch.tensor(self.base)
        lanes: torch.Tensor = self.offsets + self.base if self.base else self.offsets
        return lanes


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Any:
    """Numbers from memory.

    Args:
        pointer: where they are.
        mask: which lanes are read; all by default.
        other: what the other lanes get; they are poison by default.
        hints: how a chip caches it.

    Raises:
        IndexError: a lane that is read lies outside of the tensor.
    """
    element = pointer.element
    if mask is None and other is not None:
        raise ValueError("`other` cannot be provided without `mask`")
    if pointer.offsets is None:
        return _load_one(pointer, mask, other)
    offsets = pointer.lanes()
    if mask is None:
        return Value(from_raw(_gathered(pointer.memory, offsets), element), element)
    offsets, there = torch.broadcast_tensors(offsets, plain_value(mask).data)
    if not pointer.memory.numel():
        raw = torch.zeros(offsets.shape, dtype=pointer.memory.dtype)
        _refuse(bool(there.any()), pointer)
    else:
        raw = _gathered(pointer.memory, torch.where(there, offsets, 0))
    raw = torch.where(there, raw, _filling(element, other))
    return Value(from_raw(raw, element), element)


def store(pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> None:
    """Numbers to memory.

    Args:
        pointer: where to.
        value: which; cast to what is there.
        mask: which lanes are written; all by default.
        hints: how a chip caches it.

    Raises:
        IndexError: a lane that is written lies outside of the tensor.
    """
    element = pointer.element
    numbers = plain_value(value)
    if numbers.dtype is not element:
        numbers = plain_value(cast(numbers, element))
    offsets, raw = _lanes_to_write(pointer, to_raw(numbers), mask)
    if not offsets.numel():
        return
    _refuse(int(offsets.min()) < 0 or int(offsets.max()) >= pointer.memory.shape[0], pointer)
    pointer.memory.index_copy_(0, offsets, raw)


def atomic_add(pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> Any:
    """Add to memory, and give what was there; programs do it one after the other here."""
    before = load(pointer, mask=mask)
    element = pointer.element
    numbers = plain_value(value)
    numbers = plain_value(cast(numbers, element)) if numbers.dtype is not element else numbers
    if element.is_float8 or element.is_widened:
        raise TypeError(f"{element} is not added in memory")
    offsets, raw = _lanes_to_write(pointer, to_raw(numbers), mask)
    if offsets.numel():
        _refuse(int(offsets.min()) < 0 or int(offsets.max()) >= pointer.memory.shape[0], pointer)
        there = pointer.memory.view(element.kept_as)
        there.index_add_(0, offsets, raw.view(element.kept_as))
    return before


def _poison(dtype: Dtype) -> int:
    if dtype.form is Form.FLOAT:
        nan = Value(torch.full((1,), float("nan"), dtype=dtype.kept_as), dtype)
        return int(to_raw(nan))
    if dtype.form is Form.BOOLEAN:
        return 1
    return 0x80 if dtype.bits == 8 else int(torch.iinfo(dtypes.RAW[dtype.bits // 8]).min)


POISON: Final[Mapping[Dtype, int]] = MappingProxyType({one: _poison(one) for one in dtypes.ALL})
"""Bits of what stands in lanes that nothing was read for: NaN, or the smallest integer."""


def _filling(element: Dtype, other: Any) -> Any:
    if other is None:
        return POISON[element]
    if not isinstance(other, Value) and other == 0:
        return 0
    return to_raw(plain_value(cast(plain_value(other), element)))


def _gathered(memory: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    try:
        return torch.index_select(memory, 0, offsets.reshape(-1)).view(offsets.shape)
    except (IndexError, RuntimeError) as refused:
        raise IndexError(_OUTSIDE.format(memory.shape[0])) from refused


def _load_one(pointer: Pointer, mask: Any, other: Any) -> Any:
    element = pointer.element
    if isinstance(mask, Value) and mask.data.dim():
        raise ValueError("a block masks no single address")
    if mask is not None and not mask:
        raw = torch.as_tensor(_filling(element, other), dtype=pointer.memory.dtype)
        return result(from_raw(raw.reshape(()), element), element)
    _refuse(not 0 <= pointer.base < pointer.memory.shape[0], pointer)
    return result(from_raw(pointer.memory[pointer.base], element), element)


def _lanes_to_write(
    pointer: Pointer, raw: torch.Tensor, mask: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = pointer.lanes()
    raw = _as_wide(raw, offsets)
    if mask is None:
        return offsets.reshape(-1), raw.reshape(-1)
    there = _as_wide(plain_value(mask).data, offsets)
    if bool(there.all()):
        return offsets.reshape(-1), raw.reshape(-1)
    return offsets[there], raw[there]


def _as_wide(block: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    try:
        return block.expand(offsets.shape)
    except RuntimeError:
        shapes = f"{list(block.shape)} for {list(offsets.shape)}"
        raise ValueError(f"a block of {shapes} addresses") from None


def _refuse(outside: bool, pointer: Pointer) -> None:
    if outside:
        raise IndexError(_OUTSIDE.format(pointer.memory.shape[0]))


_OUTSIDE = "a Triton program reads or writes outside of a tensor of {} numbers"
