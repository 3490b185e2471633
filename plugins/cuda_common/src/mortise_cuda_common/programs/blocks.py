"""What the Triton language makes of whole blocks: shapes, choices, reductions and functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mortise_cuda_common.programs import dtypes, values
from mortise_cuda_common.programs.dtypes import Form
from mortise_cuda_common.programs.integers import Integers
from mortise_cuda_common.programs.scalars import Int32, Int64
from mortise_cuda_common.programs.values import (
    Value,
    aligned,
    axis_of,
    plain_value,
    result,
    value_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mortise_cuda_common.programs.dtypes import Dtype


def arange(start: int, end: int) -> Value:
    """Numbers from ``start`` up to ``end``, as many as a power of two.

    Raises:
        ValueError: another number of them, which Triton does not compile.
    """
    if (end - start).bit_count() != 1 or end <= start:
        raise ValueError("arange's range must be a power of 2")
    return Value(torch.arange(start, end, dtype=torch.int32).unsqueeze(0), dtypes.int32)


def full(shape: Sequence[int], value: Any, dtype: Dtype) -> Value:
    """One number everywhere."""
    _check_shape(shape)
    if not isinstance(value, (Value, Integers)):
        return Value(torch.full((1, *shape), value, dtype=dtype.kept_as), dtype)
    numbers = value.data.reshape(-1, *(1 for _ in shape)).to(dtype.kept_as)
    return Value(numbers.expand(-1, *shape), dtype)


def zeros(shape: Sequence[int], dtype: Dtype) -> Value:
    """Zero everywhere."""
    _check_shape(shape)
    return Value(torch.zeros((1, *shape), dtype=dtype.kept_as), dtype)


def _check_shape(shape: Sequence[int]) -> None:
    if any(size < 1 or size.bit_count() != 1 for size in shape):
        raise ValueError(f"each dimension of a block is a power of 2, not {list(shape)}")


def cast(
    value: Any, dtype: Any, fp_downcast_rounding: str | None = None, bitcast: bool = False
) -> Any:
    """The same numbers, or the same bits, in another format."""
    if isinstance(value, (int, float)) and not isinstance(value, Int32):
        return values.cast(plain_value(value), dtype) if bitcast else values.scalar(value, dtype)
    if isinstance(value, (Int32, Integers)) and not bitcast:
        return value.to(dtype)
    return value.to(dtype, bitcast=bitcast)


def where(condition: Any, one: Any, other: Any) -> Any:
    """The one where a condition holds, the other elsewhere."""
    left, right, dtype = _same_format(one, other)
    truth = plain_value(condition)
    if truth.dtype is not dtypes.int1:
        raise TypeError(f"tl.where chooses by a condition, not by {truth.dtype}")
    holds, left, right = aligned(truth.data, left, right)
    return result(torch.where(holds, left, right), dtype)


def maximum(one: Any, other: Any, propagate_nan: Any = None) -> Any:
    """The larger of two numbers; NaN stays what it is, for it stands for what is undefined."""
    left, right, dtype = _same_format(_wide(one), _wide(other))
    return result(torch.maximum(*aligned(left, right)), dtype)


def minimum(one: Any, other: Any, propagate_nan: Any = None) -> Any:
    """The smaller of two numbers; NaN stays what it is, for it stands for what is undefined."""
    left, right, dtype = _same_format(_wide(one), _wide(other))
    return result(torch.minimum(*aligned(left, right)), dtype)


def _wide(number: Any) -> Any:
    """A bf16 as a float32, which is what Triton compares it as."""
    if isinstance(number, Value) and number.dtype is dtypes.bfloat16:
        return values.cast(number, dtypes.float32)
    return number


def clamp(value: Any, low: Any, high: Any, propagate_nan: Any = None) -> Any:
    """Not less than one number and not more than another."""
    return minimum(maximum(value, low), high)


def _same_format(one: Any, other: Any) -> tuple[torch.Tensor, torch.Tensor, Dtype]:
    left, right = one, other
    if isinstance(left, Value):
        right = value_of(right, left)
    elif isinstance(right, Value):
        left = value_of(left, right)
    else:
        left, right = plain_value(left), plain_value(right)
    dtype = left.dtype if left.dtype is right.dtype else dtypes.promoted(left.dtype, right.dtype)
    return values.kept(left, dtype), values.kept(right, dtype), dtype


def trans(value: Value, *dims: Any) -> Value:
    """Dimensions in another order; the last two in turn by default."""
    return value.trans(*_flat(dims))


def permute(value: Value, *dims: Any) -> Value:
    """Dimensions in another order."""
    return value.trans(*_flat(dims))


def reshape(value: Value, *shape: Any, can_reorder: bool = False) -> Value:
    """The same numbers in another shape."""
    return value.reshape(*shape)


def expand_dims(value: Value, axis: int) -> Value:
    """One more dimension, of length 1."""
    return Value(value.data.unsqueeze(axis_of(axis)), value.dtype)


def broadcast_to(value: Any, *shape: Any) -> Value:
    """The same numbers along further or longer dimensions."""
    block = plain_value(value)
    sizes = _flat(shape)
    data = block.data.reshape(
        block.data.shape[0], *(1,) * (len(sizes) + 1 - block.data.dim()), *block.shape
    )
    return Value(data.expand(-1, *sizes), block.dtype)


def join(one: Value, other: Value) -> Value:
    """Two blocks side by side, along a new last dimension."""
    left, right, dtype = _same_format(one, other)
    return Value(torch.stack(torch.broadcast_tensors(*aligned(left, right)), dim=-1), dtype)


def split(value: Value) -> tuple[Any, Any]:
    """Two blocks of one whose last dimension has two numbers."""
    if value.data.shape[-1] != 2:
        raise ValueError("split takes a block whose last dimension is 2")
    return (
        result(value.data[..., 0], value.dtype),
        result(value.data[..., 1], value.dtype),
    )


def interleave(one: Value, other: Value) -> Value:
    """Two blocks in turn along the last dimension."""
    joined = join(one, other)
    return Value(joined.data.flatten(-2), joined.dtype)


def _flat(dims: Sequence[Any]) -> tuple[int, ...]:
    return tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else tuple(dims)


def block_sum(
    value: Value, axis: int | None = None, keep_dims: bool = False, dtype: Any = None
) -> Any:
    """The sum along one dimension, or of all.

    Raises:
        TypeError: of 16-bit numbers, which chips round after every addition: cast them.
    """
    if dtype is None and value.dtype.form is Form.FLOAT and value.dtype.bits < 32:
        raise TypeError(f"a sum of {value.dtype} is rounded after every addition: cast it to fp32")
    value = values.plain_value(value.to(dtype or _sum_dtype(value.dtype)))
    return _reduced(torch.sum, value, axis, keep_dims)


def cumsum(value: Value, axis: int = 0, reverse: bool = False, dtype: Any = None) -> Value:
    """Sums of all numbers so far along one dimension, each with its own."""
    value = values.plain_value(value.to(dtype or _sum_dtype(_wide(value).dtype)))
    along = axis_of(axis)
    data = value.data.flip(along) if reverse else value.data
    summed = torch.cumsum(data, along, dtype=data.dtype)
    return Value(summed.flip(along) if reverse else summed, value.dtype)


def _sum_dtype(dtype: Dtype) -> Dtype:
    """Of integers of less than 32 bits: 32 (``_pick_sum_dtype``, triton 3.6)."""
    if dtype.form is Form.FLOAT or dtype.bits >= 32:
        return dtype
    return dtypes.int32 if dtype.signed else dtypes.uint32


def block_max(
    value: Value, axis: int | None = None, keep_dims: bool = False, **options: Any
) -> Any:
    """The largest number along one dimension, or of all."""
    _refuse_indices(options)
    return _reduced(torch.amax, _as_reduced(value), axis, keep_dims)


def block_min(
    value: Value, axis: int | None = None, keep_dims: bool = False, **options: Any
) -> Any:
    """The smallest number along one dimension, or of all."""
    _refuse_indices(options)
    return _reduced(torch.amin, _as_reduced(value), axis, keep_dims)


def argmax(value: Value, axis: int, tie_break_left: bool = True, keep_dims: bool = False) -> Any:
    """Where the largest number along one dimension is, the first of equals."""
    places = torch.argmax(value.data, axis_of(axis), keepdim=keep_dims)
    return result(places.to(torch.int32), dtypes.int32)


def _refuse_indices(options: dict[str, Any]) -> None:
    if options.pop("return_indices", False):
        raise NotImplementedError("reductions with indices are not emulated: use tl.argmax")
    options.pop("return_indices_tie_break_left", None)
    if options:
        raise TypeError(f"unknown options {sorted(options)}")


def _as_reduced(value: Value) -> Value:
    """Short numbers are compared as long ones, so that the result is one (triton 3.6)."""
    if value.dtype.bits >= 32 or value.dtype.is_float8:
        return value
    if value.dtype.form is Form.FLOAT:
        return values.plain_value(value.to(dtypes.float32))
    return values.plain_value(value.to(dtypes.int32))


def _reduced(
    operation: Callable[..., torch.Tensor], value: Value, axis: int | None, keep_dims: bool
) -> Any:
    values.to_compute(value.dtype)
    dims = tuple(range(1, value.data.dim())) if axis is None else (axis_of(axis),)
    # The order of a sum is that of one program, however many there are.
    rounds = operation is torch.sum and value.dtype.form is Form.FLOAT
    parts = value.data.split(1) if rounds else (value.data,)
    data = torch.cat([operation(one, dim=dims, keepdim=keep_dims) for one in parts])
    return result(data.to(value.dtype.kept_as), value.dtype)


def _function(operation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """A function of floating-point numbers, one by one."""

    def apply(value: Any) -> Any:
        block = plain_value(value)
        if block.dtype not in {dtypes.float32, dtypes.float64}:
            raise TypeError(f"Triton has this function of fp32 and fp64, not of {block.dtype}")
        return Value(operation(block.data), block.dtype)

    return apply


exp = _function(torch.exp)
exp2 = _function(torch.exp2)
log = _function(torch.log)
log2 = _function(torch.log2)
sqrt = _function(torch.sqrt)
rsqrt = _function(torch.rsqrt)
floor = _function(torch.floor)
ceil = _function(torch.ceil)
sigmoid = _function(torch.sigmoid)


def size_of(value: Any) -> Any:
    """The size of a number."""
    if isinstance(value, Integers):
        return abs(value)
    if not isinstance(value, Value):
        return -value if value < 0 else value
    values.to_compute(value.dtype)
    return result(torch.abs(value.data), value.dtype)


def div_rn(one: Any, other: Any) -> Any:
    """A quotient of float32 numbers, rounded to the nearest."""
    return plain_value(one) / other


def cdiv(dividend: Any, divisor: Any) -> Any:
    """A quotient of positive integers, rounded up."""
    return (dividend + divisor - 1) // divisor


def loop(start: Any, stop: Any = None, step: Any = 1, **hints: Any) -> Iterator[int]:
    """Numbers of a loop that is run by the program, each as wide as the widest bound."""
    begin, end = (0, start) if stop is None else (start, stop)
    wide = any(isinstance(one, Int64) for one in (begin, end, step))
    width = Int64 if wide else Int32
    return map(width, range(int(begin), int(end), int(step)))
