"""Matrix products of the Triton language: of plain numbers, and of blocks that have scales."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise_cuda_common.programs import dtypes
from mortise_cuda_common.programs.dtypes import Form
from mortise_cuda_common.programs.values import Value, as_float32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise_cuda_common.programs.dtypes import Dtype

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_OF_FORMAT: Final = MappingProxyType(
    {
        "e4m3": dtypes.float8e4nv,
        "e5m2": dtypes.float8e5,
        "bf16": dtypes.bfloat16,
        "fp16": dtypes.float16,
    }
)


def dot(
    one: Value,
    other: Value,
    acc: Value | None = None,
    input_precision: str | None = None,
    allow_tf32: bool | None = None,
    max_num_imprecise_acc: int | None = None,
    out_dtype: Dtype = dtypes.float32,
) -> Value:
    """``[.., M, K] x [.., K, N]``, summed in float32 (bytes: int32).

    Raises:
        TypeError: formats that no tensor core multiplies.
    """
    _check_dot(one, other)
    if one.dtype.form is not Form.FLOAT:
        product = (one.data.to(torch.float64) @ other.data.to(torch.float64)).to(torch.int32)
        return Value(product if acc is None else acc.data + product, dtypes.int32)
    left, right = as_float32(one.data), as_float32(other.data)
    if (
        one.dtype is dtypes.float32
        and allow_tf32 is not False
        and input_precision in {None, "tf32"}
    ):
        left, right = _tf32(left), _tf32(right)
    return _summed(left, right, acc, out_dtype)


def dot_scaled(
    lhs: Value,
    lhs_scale: Value | None,
    lhs_format: str,
    rhs: Value,
    rhs_scale: Value | None,
    rhs_format: str,
    acc: Value | None = None,
    fast_math: bool = False,
    lhs_k_pack: bool = True,
    rhs_k_pack: bool = True,
    out_dtype: Dtype = dtypes.float32,
) -> Value:
    """``[M, K] x [K, N]`` of numbers times the scale of their block of K, summed in float32.

    Args:
        lhs: ``[M, K]``; e2m1 as bytes ``[M, K/2]``, the even K in the low half of each.
        lhs_scale: ``[M, K/32]`` of e8m0 as bytes, or ``[M, K/16]`` of e4m3.
        lhs_format: e2m1, e4m3, e5m2, bf16 or fp16.
        rhs: ``[K, N]``; e2m1 as bytes ``[K/2, N]``.
        rhs_scale: ``[N, K/32]`` or ``[N, K/16]`` likewise.
        rhs_format: as of the other.
        acc: what the product is added to, float32 ``[M, N]``.
        fast_math: allows a chip not to care for NaN.
        lhs_k_pack: whether two numbers of a byte are neighbours along K.
        rhs_k_pack: likewise.
        out_dtype: float32.
    """
    left = _scaled(_decoded(lhs, lhs_format, packed_rows=not lhs_k_pack), lhs_scale)
    turned = Value(rhs.data.mT, rhs.dtype)
    right = _scaled(_decoded(turned, rhs_format, packed_rows=not rhs_k_pack), rhs_scale)
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(f"K of {list(lhs.shape)} is not that of {list(rhs.shape)}")
    return _summed(left, right.mT, acc, out_dtype)


def _check_dot(one: Value, other: Value) -> None:
    both_float8 = one.dtype.is_float8 and other.dtype.is_float8
    if one.dtype is not other.dtype and not both_float8:
        raise TypeError(f"tl.dot takes two blocks of one format, not {one.dtype} and {other.dtype}")
    if one.dtype.form is not Form.FLOAT and one.dtype not in {dtypes.int8, dtypes.uint8}:
        raise TypeError(f"tl.dot does not multiply {one.dtype}")
    if one.data.dim() != other.data.dim() or one.data.shape[-1] != other.data.shape[-2]:
        raise ValueError(f"tl.dot does not multiply {one.shape} by {other.shape}")


def _summed(left: torch.Tensor, right: torch.Tensor, acc: Value | None, out_dtype: Dtype) -> Value:
    """Products of each program by itself, so that its sums are those of one that runs alone."""
    if acc is None:
        products = [one @ other for one, other in _of_each(left, right)]
        return Value(torch.stack(products).to(out_dtype.kept_as), out_dtype)
    if acc.shape != [*left.shape[1:-1], right.shape[-1]]:
        raise ValueError(
            f"accumulator of {acc.shape} for {list(left.shape[1:])} x {list(right.shape[1:])}"
        )
    if acc.dtype is dtypes.float32 and left.dim() == 3:
        sums = [torch.addmm(*each) for each in _of_each(acc.data, left, right)]
    else:
        sums = [so_far + one @ other for so_far, one, other in _of_each(acc.data, left, right)]
    return Value(torch.stack(sums).to(acc.dtype.kept_as), acc.dtype)


def _of_each(*blocks: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The blocks of one program after the other."""
    programs = max(one.shape[0] for one in blocks)
    return zip(*(one.expand(programs, *one.shape[1:]).unbind() for one in blocks), strict=True)


def _tf32(numbers: torch.Tensor) -> torch.Tensor:
    """Without the 13 lowest bits, which tensor cores do not look at."""
    return (numbers.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def _decoded(block: Value, name: str, *, packed_rows: bool) -> torch.Tensor:
    """Numbers ``[rows, K]`` as float32."""
    if name != "e2m1":
        expected = _OF_FORMAT[name]
        data = (
            block.data.contiguous().view(expected.kept_as) if block.dtype.bits == 8 else block.data
        )
        return as_float32(data)
    if block.dtype not in {dtypes.uint8, dtypes.int8}:
        raise TypeError(f"e2m1 is packed in uint8, not in {block.dtype}")
    codes = block.data.contiguous().view(torch.uint8)
    pairs = _pairs().index_select(0, codes.reshape(-1).to(torch.int32)).view(torch.float32)
    numbers = pairs.view(*codes.shape, 2)
    return numbers.mT.flatten(-3, -2) if packed_rows else numbers.flatten(-2)


def _pairs() -> torch.Tensor:
    """The two e2m1 of every byte, the low half first, side by side in 64 bits each."""
    table = torch.tensor([*_E2M1, *(-one for one in _E2M1)])
    codes = torch.arange(256)
    return torch.stack((table[codes & 15], table[codes >> 4]), dim=-1).view(torch.int64).flatten()


def _scaled(numbers: torch.Tensor, scale: Value | None) -> torch.Tensor:
    if scale is None:
        return numbers
    is_e4m3 = scale.dtype is dtypes.float8e4nv
    group = 16 if is_e4m3 else 32
    if scale.shape != [*numbers.shape[1:-1], numbers.shape[-1] // group]:
        raise ValueError(
            f"scales of {scale.dtype} for {list(numbers.shape[1:])} are one for {group} numbers, "
            f"not {scale.shape}"
        )
    factors = as_float32(scale.data) if is_e4m3 else _powers_of_two(scale)
    blocks = numbers.reshape(*numbers.shape[:-1], -1, group)
    return (blocks * factors.unsqueeze(-1)).flatten(-2)


def _powers_of_two(scale: Value) -> torch.Tensor:
    """e8m0: 2 to the power of the byte less 127; 255 is NaN."""
    if scale.dtype not in {dtypes.uint8, dtypes.int8}:
        raise TypeError(f"scales are e8m0 in uint8 or e4m3, not {scale.dtype}")
    data = scale.data.contiguous().view(torch.uint8)
    powers = torch.ldexp(torch.ones(data.shape), data.to(torch.int32) - 127)
    return powers.masked_fill(data == 255, float("nan"))
