"""Pointers of running programs into tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.apart import Apart
from mortise_cuda_common.programs.dtypes import Form
from mortise_cuda_common.programs.integers import Integers
from mortise_cuda_common.programs.values import Value, aligned

if TYPE_CHECKING:
    from mortise_cuda_common.programs.dtypes import Dtype

MOST_LANES: Final = 2**18
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
