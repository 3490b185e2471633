"""The number formats of the Triton language, and what comes of two of them, as in triton 3.6."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


class Form(IntEnum):
    """What a format holds, in the order in which one form takes over another."""

    BOOLEAN = 0
    INTEGER = 1
    FLOAT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Dtype:
    """One number format; there is one object of each.

    Args:
        name: as Triton's signatures write it.
        kept_as: torch's dtype that values have between operations; it computes like the format,
            or, of an unsigned one that torch does not compute with, is one with room for it.
        stored_as: torch's dtype of one number in memory.
        bits: of one number in memory.
        form: what it holds.
        signed: whether an integer is.
    """

    name: str
    kept_as: torch.dtype
    stored_as: torch.dtype
    bits: int
    form: Form
    signed: bool = True

    @property
    def element_ty(self) -> Dtype:
        """Itself: a value's format is that of its elements."""
        return self

    @property
    def primitive_bitwidth(self) -> int:
        """Bits of one number."""
        return self.bits

    @property
    def is_float8(self) -> bool:
        """Whether it is stored and multiplied only."""
        return self.form is Form.FLOAT and self.bits == 8

    @property
    def is_widened(self) -> bool:
        """Whether values are kept in a wider dtype than the one that is stored."""
        return self.kept_as.itemsize * 8 > self.bits and self.form is Form.INTEGER

    def is_floating(self) -> bool:
        """Whether it is a floating-point format."""
        return self.form is Form.FLOAT

    def is_int(self) -> bool:
        """Whether it is an integer format, booleans included."""
        return self.form is not Form.FLOAT

    def __repr__(self) -> str:
        return self.name


int1: Final = Dtype("i1", torch.bool, torch.bool, 8, Form.BOOLEAN)
int8: Final = Dtype("i8", torch.int8, torch.int8, 8, Form.INTEGER)
int16: Final = Dtype("i16", torch.int16, torch.int16, 16, Form.INTEGER)
int32: Final = Dtype("i32", torch.int32, torch.int32, 32, Form.INTEGER)
int64: Final = Dtype("i64", torch.int64, torch.int64, 64, Form.INTEGER)
uint8: Final = Dtype("u8", torch.uint8, torch.uint8, 8, Form.INTEGER, signed=False)
uint16: Final = Dtype("u16", torch.int32, torch.uint16, 16, Form.INTEGER, signed=False)
uint32: Final = Dtype("u32", torch.int64, torch.uint32, 32, Form.INTEGER, signed=False)
float8e4nv: Final = Dtype("fp8e4nv", torch.float8_e4m3fn, torch.float8_e4m3fn, 8, Form.FLOAT)
float8e5: Final = Dtype("fp8e5", torch.float8_e5m2, torch.float8_e5m2, 8, Form.FLOAT)
float16: Final = Dtype("fp16", torch.float16, torch.float16, 16, Form.FLOAT)
bfloat16: Final = Dtype("bf16", torch.bfloat16, torch.bfloat16, 16, Form.FLOAT)
float32: Final = Dtype("fp32", torch.float32, torch.float32, 32, Form.FLOAT)
float64: Final = Dtype("fp64", torch.float64, torch.float64, 64, Form.FLOAT)

ALL: Final = (
    int1,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    float8e4nv,
    float8e5,
    float16,
    bfloat16,
    float32,
    float64,
)
OF_TORCH: Final[Mapping[torch.dtype, Dtype]] = MappingProxyType({one.stored_as: one for one in ALL})
"""Triton's format of each dtype of torch."""
RAW: Final[Mapping[int, torch.dtype]] = MappingProxyType(
    {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
)
"""Integers that stand for the bits of a number of so many bytes."""


def promoted(one: Dtype, other: Dtype, *, divides: bool = False) -> Dtype:
    """The format that two values are computed in (``computation_type_impl``, triton 3.6).

    Raises:
        TypeError: one is an 8-bit floating-point format, and the other another one.
    """
    pair = (one, other)
    for floating in (float64, float32):
        if floating in pair:
            return floating
    if float16 in pair:
        return float32 if divides else float16
    if bfloat16 in pair:
        return bfloat16 if one is other and not divides else float32
    if one is other:
        return one
    if Form.FLOAT in (one.form, other.form):
        raise TypeError(f"Triton computes nothing of {one} and {other}: cast them")
    return _promoted_integers(one, other)


def _promoted_integers(one: Dtype, other: Dtype) -> Dtype:
    if Form.BOOLEAN in (one.form, other.form):
        return other if one.form is Form.BOOLEAN else one
    if one.signed == other.signed:
        return one if one.bits > other.bits else other
    unsigned, signed = (other, one) if one.signed else (one, other)
    return unsigned if unsigned.bits >= signed.bits else signed
