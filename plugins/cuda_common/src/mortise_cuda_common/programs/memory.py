"""Memory of running programs: pointers into tensors, and what reads and writes through them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.apart import Apart
from mortise_cuda_common.programs.dtypes import Form
from mortise_cuda_common.programs.integers import Integers
from mortise_cuda_common.programs.values import (
    Value,
    aligned,
    cast,
    from_raw,
    plain_value,
    result,
    to_raw,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise_cuda_common.programs.dtypes import Dtype
    from mortise_cuda_common.programs.together import Writes

MOST_LANES: Final = 2**20
"""Addresses of one block of programs that run at once, so that blocks stay near the processor."""


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
        offsets: int64 ``[P, *block]``, one for each lane of each program, P being 1 where all
            have the same; None is a single address that all have.
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
        return [] if self.offsets is None else list(self.offsets.shape[1:])

    def __add__(self, further: Any) -> Pointer:
        if isinstance(further, (Value, Integers)):
            if further.dtype.form is Form.FLOAT:
                raise TypeError("an address plus a floating-point number is none")
            data = further.data
            offsets = data if data.dtype is torch.int64 else data.to(torch.int64)
            if self.offsets is not None:
                offsets = torch.add(*aligned(self.offsets, offsets))
            _check_lanes(offsets)
            return Pointer(self.memory, self.element, self.base, offsets)
        return Pointer(self.memory, self.element, self.base + int(further), self.offsets)

    __radd__ = __add__

    def __sub__(self, further: Any) -> Pointer:
        pointer: Pointer = self + -further
        return pointer

    def __getitem__(self, key: Any) -> Pointer:
        if self.offsets is None:
            raise IndexError("a single address has no dimensions")
        places = key if isinstance(key, tuple) else (key,)
        offsets = self.offsets[(slice(None), *places)]
        return Pointer(self.memory, self.element, self.base, offsets)

    def lanes(self) -> torch.Tensor:
        """The address of each lane, ``[P, *block]``."""
        if self.offsets is None:
            return torch.tensor([self.base])
        lanes: torch.Tensor = self.offsets + self.base if self.base else self.offsets
        return lanes


def _check_lanes(offsets: torch.Tensor) -> None:
    """Have fewer programs go on together where they have too many addresses.

    Raises:
        Apart: they have.
    """
    programs = offsets.shape[0]
    if programs > 1 and offsets.numel() > MOST_LANES:
        fewer = max(1, programs * MOST_LANES // offsets.numel())
        raise Apart([place // fewer for place in range(programs)])


class Memory:
    """What programs reach by pointers.

    Args:
        writes: keeps what several programs write; None for one, which writes at once.
    """

    __slots__ = ("_writes",)

    def __init__(self, writes: Writes | None) -> None:
        self._writes = writes

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Any:
        """Numbers from memory.

        Args:
            pointer: where they are.
            mask: which lanes are read; all by default.
            other: what the other lanes get; they are poison by default.
            hints: how a chip caches it.

        Raises:
            IndexError: a lane that is read lies outside of the tensor.
        """
        if mask is None and other is not None:
            raise ValueError("`other` cannot be provided without `mask`")
        if self._writes is not None:
            self._writes.note_read(pointer.memory)
        if not pointer.shape and isinstance(mask, Value) and mask.data.dim() > 1:
            raise ValueError("a block masks no single address")
        if pointer.offsets is None and not isinstance(mask, Value):
            return _load_one(pointer, mask, other)
        there = None if mask is None else plain_value(mask).data
        if there is not None and bool(there.all()):
            there = None
        return _load_block(pointer, there, other)

    def store(self, pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> None:
        """Numbers to memory.

        Args:
            pointer: where to.
            value: which; cast to what is there.
            mask: which lanes are written; all by default.
            hints: how a chip caches it.

        Raises:
            IndexError: a lane that is written lies outside of the tensor.
        """
        offsets, raw = _lanes_to_write(pointer, _raw_for(pointer.element, value), mask)
        if not offsets.numel():
            return
        if self._writes is None:
            pointer.memory.index_copy_(0, offsets, raw)
        else:
            self._writes.add(pointer.memory, offsets, raw)

    def atomic_add(self, pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> Any:
        """Add to memory, and give what was there; programs do it one after the other here."""
        if self._writes is not None:
            raise self._writes.alone()
        before = self.load(pointer, mask=mask)
        element = pointer.element
        if element.is_float8 or element.is_widened:
            raise TypeError(f"{element} is not added in memory")
        offsets, raw = _lanes_to_write(pointer, _raw_for(element, value), mask)
        there = pointer.memory.view(element.kept_as)
        there.index_add_(0, offsets, raw.view(element.kept_as))
        return before


def _raw_for(element: Dtype, value: Any) -> torch.Tensor:
    numbers = plain_value(value)
    if numbers.dtype is not element:
        numbers = plain_value(cast(numbers, element))
    return to_raw(numbers)


def _load_block(pointer: Pointer, there: torch.Tensor | None, other: Any) -> Any:
    element, memory = pointer.element, pointer.memory
    offsets = pointer.lanes()
    if there is None:
        return result(from_raw(_gathered(memory, offsets), element), element)
    offsets, there = torch.broadcast_tensors(*aligned(offsets, there))
    if not memory.numel():
        raw = torch.zeros(offsets.shape, dtype=memory.dtype)
        _refuse(bool(there.any()), pointer)
    else:
        raw = _gathered(memory, torch.where(there, offsets, 0))
    filling = _filling(element, other)
    if isinstance(filling, torch.Tensor):
        _, filling = aligned(raw, filling)
    raw = torch.where(there, raw, filling)
    return result(from_raw(raw, element), element)


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
    if mask is not None and not mask:
        raw = torch.as_tensor(_filling(element, other), dtype=pointer.memory.dtype)
        return result(from_raw(raw.reshape(1), element), element)
    _refuse(not 0 <= pointer.base < pointer.memory.shape[0], pointer)
    return result(from_raw(pointer.memory[pointer.base].reshape(1), element), element)


def _lanes_to_write(
    pointer: Pointer, raw: torch.Tensor, mask: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Addresses ``[N]`` of lanes that are written, and the bits for them."""
    offsets = pointer.lanes()
    there = None if mask is None else plain_value(mask).data
    if there is not None and bool(there.all()):
        there = None
    programs = max(one.shape[0] for one in (offsets, raw, there) if one is not None)
    wide = (programs, *offsets.shape[1:])
    offsets, raw = offsets.expand(wide), _as_wide(raw, wide)
    if there is None:
        offsets, raw = offsets.reshape(-1), raw.reshape(-1)
    else:
        there = _as_wide(there, wide)
        offsets, raw = offsets[there], raw[there]
    if offsets.numel():
        least, most = torch.aminmax(offsets)
        _refuse(int(least) < 0 or int(most) >= pointer.memory.shape[0], pointer)
    return offsets, raw


def _as_wide(block: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if block.dim() < len(shape):
        block = block.reshape(block.shape[0], *(1,) * (len(shape) - block.dim()), *block.shape[1:])
    try:
        return block.expand(shape)
    except RuntimeError:
        shapes = f"{list(block.shape[1:])} for {list(shape[1:])}"
        raise ValueError(f"a block of {shapes} addresses") from None


def _refuse(outside: bool, pointer: Pointer) -> None:
    if outside:
        raise IndexError(_OUTSIDE.format(pointer.memory.shape[0]))


_OUTSIDE = "a Triton program reads or writes outside of a tensor of {} numbers"
