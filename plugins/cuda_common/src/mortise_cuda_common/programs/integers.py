"""Single integers of several running programs, one of each."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.apart import Apart, decided
from mortise_cuda_common.programs.scalars import Int64

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise_cuda_common.programs.dtypes import Dtype

_MOST: Final = 2.0**62
"""Sizes up to this are told from those that need more than 64 bits by float64."""


class Integers:
    """What ``Int32`` and ``Int64`` are for one program; where programs differ, they go apart.

    Attributes:
        data: int64 ``[P]``.
        dtype: int32 or int64.
    """

    __slots__ = ("data", "dtype")
    # Python's own comparison is by numbers.
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: torch.Tensor, dtype: Dtype) -> None:
        self.data = data
        self.dtype = dtype

    def to(self, dtype: Dtype) -> Any:
        """The same numbers in another format."""
        if dtype is dtypes.int64:
            return Integers(self.data, dtype)
        if dtype is dtypes.int32:
            return _checked(self.data, dtype)
        if dtype.form is dtypes.Form.INTEGER:
            raise Apart(range(self.data.shape[0]))
        from mortise_cuda_common.programs.values import cast, plain_value

        return cast(plain_value(self), dtype)

    def __bool__(self) -> bool:
        return bool(decided(self.data != 0))

    def __index__(self) -> int:
        return decided(self.data)

    __int__ = __index__

    def __add__(self, other: Any) -> Any:
        return _computed(operator.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _computed(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _computed(_less_from, self, other)

    def __mul__(self, other: Any) -> Any:
        return _computed(operator.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self.to(dtypes.float32) / other

    def __floordiv__(self, other: Any) -> Any:
        return _computed(_quotient, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _computed(lambda one, two: _quotient(two, one), self, other)

    def __mod__(self, other: Any) -> Any:
        return _computed(_remainder, self, other)

    def __rmod__(self, other: Any) -> Any:
        return _computed(lambda one, two: _remainder(two, one), self, other)

    def __and__(self, other: Any) -> Any:
        return _computed(operator.and_, self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return _computed(operator.or_, self, other)

    __ror__ = __or__

    def __neg__(self) -> Any:
        return _checked(-self.data, self.dtype)

    def __abs__(self) -> Any:
        return _checked(self.data.abs(), self.dtype)

    def __lt__(self, other: Any) -> Any:
        return _compared(operator.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return _compared(operator.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return _compared(operator.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return _compared(operator.ge, self, other)

    def __eq__(self, other: Any) -> Any:
        return _compared(operator.eq, self, other)

    def __ne__(self, other: Any) -> Any:
        return _compared(operator.ne, self, other)


def _computed(operation: Callable[[Any, Any], Any], one: Integers, other: Any) -> Any:
    number: Any
    if isinstance(other, Integers):
        number, wide = other.data, other.dtype is dtypes.int64
    elif isinstance(other, int):
        number, wide = int(other), isinstance(other, Int64)
    elif isinstance(other, float) and operation in _OF_FLOATS:
        return operation(one.to(dtypes.float32), other)
    else:
        return NotImplemented
    dtype = dtypes.int64 if wide else one.dtype
    if dtype is dtypes.int64 and operation in _OF_FLOATS:
        about = operation(one.data.to(torch.float64), _as_float(number))
        if float(about.abs().max()) > _MOST:
            raise Apart(range(one.data.shape[0]))
    return _checked(operation(one.data, number), dtype)


def _as_float(number: Any) -> Any:
    return number.to(torch.float64) if isinstance(number, torch.Tensor) else float(number)


def _checked(data: torch.Tensor, dtype: Dtype) -> Integers:
    """Numbers that must fit: where one does not, each program runs alone until it says so."""
    if dtype is dtypes.int32:
        least, most = torch.aminmax(data)
        if int(least) < -(2**31) or int(most) >= 2**31:
            raise Apart(range(data.shape[0]))
    return Integers(data, dtype)


def _compared(operation: Callable[[Any, Any], Any], one: Integers, other: Any) -> Any:
    from mortise_cuda_common.programs.values import Value

    if isinstance(other, Integers):
        return Value(operation(one.data, other.data), dtypes.int1)
    if isinstance(other, int):
        return Value(operation(one.data, int(other)), dtypes.int1)
    if isinstance(other, float):
        return operation(one.to(dtypes.float32), other)
    return NotImplemented


def _less_from(subtrahend: Any, minuend: Any) -> Any:
    return minuend - subtrahend


def _quotient(dividend: Any, divisor: Any) -> torch.Tensor:
    """Rounded to zero, as chips divide."""
    return torch.div(torch.as_tensor(dividend), divisor, rounding_mode="trunc")


def _remainder(dividend: Any, divisor: Any) -> torch.Tensor:
    """With the sign of the dividend, as chips have it."""
    return torch.fmod(torch.as_tensor(dividend), divisor)


_OF_FLOATS: Final = (operator.add, operator.sub, operator.mul, _less_from)
"""What an integer and a floating-point number have in common, and what outgrows 64 bits."""
