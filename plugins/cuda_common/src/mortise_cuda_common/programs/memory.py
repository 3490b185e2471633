"""What running programs read and write through their pointers."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.dtypes import Form
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
    from mortise_cuda_common.programs.pointers import Pointer
    from mortise_cuda_common.programs.together import Writes


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
    element = pointer.element
    raw = _gathered(pointer, there)
    if there is not None:
        raw, there = aligned(raw, there)
        filling = _filling(element, other)
        if isinstance(filling, torch.Tensor):
            raw, filling = aligned(raw, filling)
        # Of whole numbers a product with truths is many times as fast as a choice.
        is_zero = not isinstance(filling, torch.Tensor) and filling == 0
        raw = raw * there if is_zero else torch.where(there, raw, filling)
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


def _gathered(pointer: Pointer, there: torch.Tensor | None) -> torch.Tensor:
    """Bits of every lane; any where nothing is."""
    memory, base = pointer.memory, pointer.base
    if pointer.offsets is not None and 0 <= base < memory.shape[0]:
        try:
            return _selected(memory[base:], pointer.offsets)
        except (IndexError, RuntimeError):
            # A lane lies outside of what is behind the base: it may be masked off, or before it.
            pass
    lanes = pointer.lanes()
    if there is not None:
        lanes, there = torch.broadcast_tensors(*aligned(lanes, there))
        if not memory.numel() and not bool(there.any()):
            return torch.zeros(lanes.shape, dtype=memory.dtype)
        lanes = lanes * there
    try:
        return _selected(memory, lanes)
    except (IndexError, RuntimeError) as refused:
        raise IndexError(_OUTSIDE.format(memory.shape[0])) from refused


def _selected(memory: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.index_select(memory, 0, offsets.reshape(-1)).view(offsets.shape)


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
        lanes = there.reshape(-1).nonzero().view(-1)
        offsets, raw = (one.reshape(-1).index_select(0, lanes) for one in (offsets, raw))
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
