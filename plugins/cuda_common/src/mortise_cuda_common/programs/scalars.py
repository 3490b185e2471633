"""Single integers of a running program: Python's, but as wide as the chip's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from mortise_cuda_common.programs import dtypes

if TYPE_CHECKING:
    from mortise_cuda_common.programs.dtypes import Dtype


class Int32(int):
    """One 32-bit integer, for ``if``, ``while``, ``range`` and arithmetic.

    A constant is a Python integer without a width; one that comes out of memory or is passed to a
    program has this one. What no longer fits is an error here, where a chip would go on with its
    lowest 32 bits.
    """

    dtype: ClassVar[Dtype] = dtypes.int32
    bits: ClassVar[int] = 32

    def to(self, dtype: Dtype) -> Any:
        """The same number in another format."""
        if dtype is dtypes.int64:
            return Int64(self)
        if dtype is dtypes.int32:
            return Int32.checked(int(self))
        from mortise_cuda_common.programs.values import scalar

        return scalar(int(self), dtype)

    @classmethod
    def checked(cls, number: int) -> Self:
        """A number that must fit.

        Raises:
            OverflowError: it does not.
        """
        if not -(1 << (cls.bits - 1)) <= number < 1 << (cls.bits - 1):
            raise OverflowError(
                f"{number} is more than the {cls.bits} bits that a Triton program computes it in"
            )
        return cls(number)

    def __add__(self, other: Any) -> Any:
        return _computed(int.__add__, self, other)

    def __radd__(self, other: Any) -> Any:
        return _computed(int.__add__, self, other)

    def __sub__(self, other: Any) -> Any:
        return _computed(int.__sub__, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _computed(int.__rsub__, self, other)

    def __mul__(self, other: Any) -> Any:
        return _computed(int.__mul__, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _computed(int.__mul__, self, other)

    def __floordiv__(self, other: Any) -> Any:
        return _computed(_quotient, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _computed(lambda one, two: _quotient(two, one), self, other)

    def __mod__(self, other: Any) -> Any:
        return _computed(_remainder, self, other)

    def __rmod__(self, other: Any) -> Any:
        return _computed(lambda one, two: _remainder(two, one), self, other)

    def __and__(self, other: Any) -> Any:
        return _computed(int.__and__, self, other)

    def __rand__(self, other: Any) -> Any:
        return _computed(int.__and__, self, other)

    def __or__(self, other: Any) -> Any:
        return _computed(int.__or__, self, other)

    def __ror__(self, other: Any) -> Any:
        return _computed(int.__or__, self, other)

    def __xor__(self, other: Any) -> Any:
        return _computed(int.__xor__, self, other)

    def __lshift__(self, other: Any) -> Any:
        return _computed(int.__lshift__, self, other)

    def __rshift__(self, other: Any) -> Any:
        return _computed(int.__rshift__, self, other)

    def __neg__(self) -> Any:
        return self.checked(-int(self))

    def __truediv__(self, other: Any) -> Any:
        from mortise_cuda_common.programs.values import scalar

        return scalar(int(self), dtypes.float32) / other


class Int64(Int32):
    """One 64-bit integer; whatever it is computed with becomes one."""

    dtype = dtypes.int64
    bits = 64


def _computed(operation: Any, one: Int32, other: Any) -> Any:
    if isinstance(other, int):
        wide = isinstance(one, Int64) or isinstance(other, Int64)
        return (Int64 if wide else Int32).checked(operation(int(one), int(other)))
    if isinstance(other, float):
        from mortise_cuda_common.programs.values import scalar

        return _of_floats(operation, scalar(int(one), dtypes.float32), other)
    return NotImplemented


def _of_floats(operation: Any, one: Any, other: float) -> Any:
    if operation is int.__add__:
        return one + other
    if operation is int.__sub__:
        return one - other
    if operation is int.__rsub__:
        return other - one
    if operation is int.__mul__:
        return one * other
    raise TypeError("Triton has no such operation of an integer and a floating-point number")


def _quotient(dividend: int, divisor: int) -> int:
    """Rounded to zero, as chips divide."""
    quotient = abs(dividend) // abs(divisor)
    return quotient if (dividend < 0) == (divisor < 0) else -quotient


def _remainder(dividend: int, divisor: int) -> int:
    """With the sign of the dividend, as chips have it."""
    return dividend - divisor * _quotient(dividend, divisor)
