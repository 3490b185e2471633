"""Blocks of numbers of running programs: torch's tensors, computed with as the chip's are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.apart import Apart, decided
from mortise_cuda_common.programs.dtypes import Form, promoted
from mortise_cuda_common.programs.integers import Integers
from mortise_cuda_common.programs.scalars import Int32, Int64

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise_cuda_common.programs.dtypes import Dtype

MOST_E4M3: Final = 448.0
FEW_NUMBERS: Final = 4096
"""Fewer than this are cast by torch: a table has 256."""


class Value:
    """A block of numbers of one format, or a single one, of each program; nothing changes it.

    Attributes:
        data: the numbers ``[P, *block]`` of programs that run at once; P is 1 where all of them
            have the same, and where one program runs.
        dtype: their format.
    """

    __slots__ = ("data", "dtype")
    # Python's own comparison is by numbers.
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: torch.Tensor, dtype: Dtype) -> None:
        self.data = data
        self.dtype = dtype

    @property
    def shape(self) -> list[int]:
        """Numbers along each dimension."""
        return list(self.data.shape[1:])

    @property
    def numel(self) -> int:
        """Numbers of the block."""
        return math.prod(self.data.shape[1:])

    @property
    def T(self) -> Value:  # noqa: N802 - Triton's name
        """The block ``[M, N]`` as ``[N, M]``."""
        return self.trans()

    def to(
        self, dtype: Dtype, fp_downcast_rounding: str | None = None, bitcast: bool = False
    ) -> Any:
        """The same numbers, or the same bits, in another format."""
        if fp_downcast_rounding not in {None, "rtne"}:
            raise ValueError(f"rounding {fp_downcast_rounding!r} is not emulated")
        return bits_as(self, dtype) if bitcast else cast(self, dtype)

    def trans(self, *dims: int) -> Value:
        """Its dimensions in another order; the last two in turn by default."""
        if not dims and self.data.dim() < 3:
            raise ValueError(f"a block of {self.shape} has no two dimensions to turn")
        places = (0, *(axis_of(one) for one in dims))
        return Value(self.data.permute(places) if dims else self.data.mT, self.dtype)

    def reshape(self, *shape: Any) -> Value:
        """The same numbers in another shape."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return Value(self.data.reshape(self.data.shape[0], *sizes), self.dtype)

    def __getitem__(self, key: Any) -> Value:
        places = key if isinstance(key, tuple) else (key,)
        if any(one is not None and one != slice(None) for one in places):
            raise IndexError("Triton indexes blocks by None and : only")
        return Value(self.data[(slice(None), *places)], self.dtype)

    def __bool__(self) -> bool:
        if self.data.dim() > 1:
            raise ValueError("a block of numbers is neither true nor false")
        return bool(decided(self.data != 0))

    def __index__(self) -> int:
        if self.data.dim() > 1 or self.dtype.form is Form.FLOAT:
            raise TypeError("only a single integer counts")
        return decided(self.data)

    def __add__(self, other: Any) -> Any:
        return computed(torch.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return computed(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return computed(torch.sub, value_of(other, self), self)

    def __mul__(self, other: Any) -> Any:
        return computed(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return divided(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return divided(value_of(other, self), self)

    def __floordiv__(self, other: Any) -> Any:
        return _whole(_quotient, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _whole(_quotient, value_of(other, self), self)

    def __mod__(self, other: Any) -> Any:
        return computed(torch.fmod, self, other, divides=True)

    def __rmod__(self, other: Any) -> Any:
        return computed(torch.fmod, value_of(other, self), self, divides=True)

    def __and__(self, other: Any) -> Any:
        return _whole(torch.bitwise_and, self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return _whole(torch.bitwise_or, self, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> Any:
        return _whole(torch.bitwise_xor, self, other)

    __rxor__ = __xor__

    def __lshift__(self, other: Any) -> Any:
        return _whole(torch.bitwise_left_shift, self, other)

    def __rlshift__(self, other: Any) -> Any:
        return _whole(torch.bitwise_left_shift, value_of(other, self), self)

    def __rshift__(self, other: Any) -> Any:
        return _whole(torch.bitwise_right_shift, self, other)

    def __rrshift__(self, other: Any) -> Any:
        return _whole(torch.bitwise_right_shift, value_of(other, self), self)

    def __invert__(self) -> Value:
        if self.dtype.form is Form.FLOAT:
            raise TypeError(f"{self.dtype} has no bits to turn")
        turned: Value = _fitting(torch.bitwise_not(self.data), self.dtype)
        return turned

    def __neg__(self) -> Value:
        negative: Value = _fitting(torch.neg(self.data), self.dtype)
        return negative

    def __lt__(self, other: Any) -> Any:
        return compared(torch.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return compared(torch.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return compared(torch.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return compared(torch.ge, self, other)

    def __eq__(self, other: Any) -> Any:
        return compared(torch.eq, self, other)

    def __ne__(self, other: Any) -> Any:
        return compared(torch.ne, self, other)


def scalar(number: float, dtype: Dtype) -> Any:
    """A single number: of Python where it is an integer to count with, else a block of none."""
    if dtype is dtypes.int32:
        return Int32.checked(int(number))
    if dtype is dtypes.int64:
        return Int64.checked(int(number))
    return Value(torch.tensor([number], dtype=dtype.kept_as), dtype)


def result(data: torch.Tensor, dtype: Dtype) -> Any:
    """What an operation gave: a single signed integer or truth becomes Python's.

    Args:
        data: ``[P, *block]``; of several programs it becomes ``Integers``, and truths stay.
        dtype: their format.
    """
    if data.dim() > 1 or dtype.form is Form.FLOAT or dtype is dtypes.uint32:
        return Value(data, dtype)
    if data.shape[0] > 1:
        if dtype.form is Form.BOOLEAN:
            return Value(data, dtype)
        width = dtypes.int64 if dtype is dtypes.int64 else dtypes.int32
        return Integers(data.to(torch.int64), width)
    if dtype.form is Form.BOOLEAN:
        return bool(data)
    return (Int64 if dtype is dtypes.int64 else Int32)(int(data))


def value_of(number: Any, beside: Value) -> Value:
    """A number as one of the format that it takes on beside a value."""
    if isinstance(number, Value):
        return number
    _, other, dtype = _operands(beside, number)
    return Value(torch.as_tensor(other).to(dtype.kept_as).reshape(-1), dtype)


def plain_value(number: Any) -> Value:
    """A number as a value of the format that it has by itself."""
    if isinstance(number, Value):
        return number
    if isinstance(number, Integers):
        return Value(number.data.to(number.dtype.kept_as), number.dtype)
    if isinstance(number, bool):
        return Value(torch.tensor([number]), dtypes.int1)
    if isinstance(number, float):
        return Value(torch.tensor([number], dtype=torch.float32), dtypes.float32)
    wide = isinstance(number, Int64) or not -(2**31) <= number < 2**31
    dtype = dtypes.int64 if wide else dtypes.int32
    return Value(torch.tensor([int(number)], dtype=dtype.kept_as), dtype)


def axis_of(axis: int) -> int:
    """The dimension of ``data`` that one of a block is."""
    return axis if axis < 0 else axis + 1


def aligned(*blocks: torch.Tensor) -> list[torch.Tensor]:
    """Numbers ``[P, *block]`` with as many dimensions each: a block lacks its first ones."""
    dims = max(one.dim() for one in blocks)
    return [
        one
        if one.dim() == dims or one.shape[0] == 1
        else one.reshape(one.shape[0], *(1,) * (dims - one.dim()), *one.shape[1:])
        for one in blocks
    ]


def _operands(one: Value, other: Any, *, divides: bool = False) -> tuple[Any, Any, Dtype]:
    """Both in the format that they are computed in."""
    dtype = one.dtype
    kind = type(other)
    if kind is Value:
        if other.dtype is not dtype or divides:
            dtype = promoted(dtype, other.dtype, divides=divides)
            return kept(one, dtype), kept(other, dtype), dtype
        to_compute(dtype)
        return one.data, other.data, dtype
    if kind is int:
        result = dtypes.int32 if dtype is dtypes.int1 else dtype
        if result.form is Form.INTEGER:
            _check_constant(other, result)
    elif kind is float:
        result = dtype if dtype.form is Form.FLOAT else dtypes.float32
    elif kind is Int32 or kind is Int64:
        # A number of the program, unlike a constant, has a width.
        result = dtype if dtype.form is Form.FLOAT else promoted(dtype, other.dtype)
        other = int(other)
    elif kind is Integers:
        result = dtype if dtype.form is Form.FLOAT else promoted(dtype, other.dtype)
        if result.bits < 32:
            # Beside short numbers torch keeps a single one as it is.
            raise Apart(range(other.data.shape[0]))
        other = other.data.to(result.kept_as)
    elif kind is bool:
        result = dtype
    else:
        return NotImplemented, NotImplemented, dtype
    if divides and result.bits == 16 and result.form is Form.FLOAT:
        result = dtypes.float32
    to_compute(result)
    return kept(one, result), other, result


def _check_constant(number: int, dtype: Dtype) -> None:
    low = -(1 << (dtype.bits - 1)) if dtype.signed else 0
    high = (1 << (dtype.bits - 1 if dtype.signed else dtype.bits)) - 1
    if not low <= number <= high:
        raise ValueError(f"Scalar {number} is out of range for type {dtype}")


def to_compute(dtype: Dtype) -> None:
    """Refuse what no unit of a chip computes with by itself."""
    if dtype.is_float8:
        raise TypeError(f"{dtype} is multiplied by tl.dot only: cast it")


def kept(value: Value, dtype: Dtype) -> torch.Tensor:
    """The numbers of a value in another format."""
    return value.data if value.dtype is dtype else cast(value, dtype).data


def computed(
    operation: Callable[..., torch.Tensor], one: Value, other: Any, *, divides: bool = False
) -> Any:
    """An operation of two numbers each, in the format that both are promoted to."""
    left, right, dtype = _operands(one, other, divides=divides)
    if left is NotImplemented:
        return NotImplemented
    return _fitting(_applied(operation, left, right), dtype)


def _applied(operation: Callable[..., torch.Tensor], left: torch.Tensor, right: Any) -> Any:
    if isinstance(right, torch.Tensor) and left.dim() != right.dim():
        left, right = aligned(left, right)
    return operation(left, right)


def compared(operation: Callable[..., torch.Tensor], one: Value, other: Any) -> Any:
    """A comparison of two numbers each."""
    left, right, _ = _operands(one, other)
    if left is NotImplemented:
        return NotImplemented
    return result(_applied(operation, left, right), dtypes.int1)


def divided(one: Value, other: Any) -> Any:
    """A quotient that is not whole; of integers one of float32."""
    left = one if one.dtype.form is Form.FLOAT else cast(one, dtypes.float32)
    if isinstance(other, Value) and other.dtype.form is not Form.FLOAT:
        other = cast(other, left.dtype)
    return computed(torch.div, left, other, divides=True)


def _whole(operation: Callable[..., torch.Tensor], one: Value, other: Any) -> Any:
    is_float = isinstance(other, float) or (
        isinstance(other, Value) and other.dtype.form is Form.FLOAT
    )
    if one.dtype.form is Form.FLOAT or is_float:
        raise TypeError("Triton has this operation of integers only")
    return computed(operation, one, other)


def _quotient(dividend: Any, divisor: Any) -> torch.Tensor:
    """Rounded to zero, as chips divide."""
    return torch.div(dividend, divisor, rounding_mode="trunc")


def _fitting(data: torch.Tensor, dtype: Dtype) -> Any:
    """As many bits as the format has."""
    if dtype.is_widened:
        data = torch.bitwise_and(data, (1 << dtype.bits) - 1)
    return result(data, dtype)


def cast(value: Value, dtype: Dtype) -> Any:
    """The same numbers in another format, rounded to the nearest, ties to even.

    Raises:
        ValueError: a number is more than 448 and becomes e4m3: chips and versions of torch do
            different things to it, so a program limits it first.
        TypeError: an integer becomes an 8-bit floating-point number, or one an integer.
    """
    source = value.dtype
    if source is dtype:
        return value
    if Form.FLOAT not in (source.form, dtype.form) or source.form is not dtype.form:
        return _cast_of_integers(value, dtype)
    data = value.data
    if dtype is dtypes.float8e4nv and data.numel():
        _check_e4m3(data)
    if dtype.is_float8 and data.dtype is not torch.float32:
        data = data.to(torch.float32)
    if dtype is dtypes.float32:
        return Value(as_float32(data), dtype)
    return Value(data.to(dtype.kept_as), dtype)


def _check_e4m3(data: torch.Tensor) -> None:
    least, most = (float(one) for one in torch.aminmax(data))
    if least >= -MOST_E4M3 and most <= MOST_E4M3:
        return
    # NaN is not more than anything, and stays what it is.
    size = float(torch.nan_to_num(data.to(torch.float32), nan=0.0).abs().max())
    if size > MOST_E4M3:
        raise ValueError(f"{size} is more than 448, the most that e4m3 holds: limit it")


def as_float32(numbers: torch.Tensor) -> torch.Tensor:
    """Floating-point numbers in float32; of many e4m3 by a table, which torch's own cast is not."""
    if numbers.dtype is not torch.float8_e4m3fn or numbers.numel() < FEW_NUMBERS:
        return numbers.to(torch.float32)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    codes = numbers.contiguous().view(torch.uint8).reshape(-1)
    return table.index_select(0, codes.to(torch.int32)).view(numbers.shape)


def _cast_of_integers(value: Value, dtype: Dtype) -> Any:
    if value.dtype.is_float8 or dtype.is_float8:
        raise TypeError(f"Triton casts no {value.dtype} to {dtype}")
    if dtype.form is Form.BOOLEAN:
        return result(value.data != 0, dtype)
    if dtype.form is Form.FLOAT:
        return Value(value.data.to(dtype.kept_as), dtype)
    data = value.data
    if data.dtype.is_floating_point:
        data = torch.trunc(data).to(torch.int64)
    data = data.to(torch.int64) if dtype.is_widened else data
    data = data.to(dtype.kept_as) if not dtype.is_widened else data
    if dtype.is_widened:
        data = torch.bitwise_and(data, (1 << dtype.bits) - 1).to(dtype.kept_as)
    return result(data, dtype)


def bits_as(value: Value, dtype: Dtype) -> Any:
    """The same bits in another format of as many."""
    if value.dtype.bits != dtype.bits:
        raise TypeError(f"{value.dtype} has not as many bits as {dtype}")
    return result(from_raw(to_raw(value), dtype), dtype)


def to_raw(value: Value) -> torch.Tensor:
    """The bits of a value, as signed integers (bytes: unsigned) of its width."""
    raw = dtypes.RAW[value.dtype.bits // 8]
    if value.dtype.is_widened:
        return value.data.to(raw)
    return value.data.contiguous().view(raw)


def from_raw(raw: torch.Tensor, dtype: Dtype) -> torch.Tensor:
    """The numbers that bits stand for."""
    if dtype.is_widened:
        return torch.bitwise_and(raw.to(dtype.kept_as), (1 << dtype.bits) - 1)
    return raw.view(dtype.kept_as)
