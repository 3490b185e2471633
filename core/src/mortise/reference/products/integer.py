"""Products of int8 and int4 rows with int8 and int4 weights, their integer sums exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from mortise.formats.integer import quantise_int_rows, quantise_static_int8
from mortise.reference.products.base import Product, QuantisedRows, add_bias, add_up

if TYPE_CHECKING:
    from mortise.formats.integer import Bits

EXACT_COLUMNS: Final = 1024
"""Columns whose products add up exactly in float32: 1024 * 128 * 128 = 2**24."""


def integer_sums(values_RK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """Sums ``[R, N]`` of products of int8 values that are held in float32, exact in any order.

    Torch multiplies matrices of floats on every device, of integers only on some. No partial sum of
    1024 columns exceeds 2**24, up to which float32 holds every integer; sums of more columns are
    added up in float64.

    Returns:
        float32 up to 1024 columns, float64 above.
    """
    if values_RK.shape[1] <= EXACT_COLUMNS:
        return F.linear(values_RK, weight_NK)
    pieces = zip(
        values_RK.split(EXACT_COLUMNS, dim=1), weight_NK.split(EXACT_COLUMNS, dim=1), strict=True
    )
    return add_up(F.linear(values, weight).double() for values, weight in pieces)


@dataclass(frozen=True, slots=True)
class IntegerProduct(Product):
    """W8A8, W4A8 and W4A4 with rows quantised one by one.

    Args:
        weight: integers ``[N, K]`` held in float32.
        scale: float32 ``[G, N]``, the scales of each group of columns in a row of its own.
        input_bits: width of the rows' integers.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    input_bits: Bits

    def apply(self, rows_RK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Quantise every row by its own largest magnitude, multiply, add the bias in float32."""
        return add_bias(self._multiply(*quantise_int_rows(rows_RK, self.input_bits)), bias_N)

    def apply_quantised(self, rows: QuantisedRows) -> torch.Tensor:
        """Multiply int8 rows with a float32 scale each."""
        return self._multiply(rows.values, rows.scales)

    def _multiply(self, values_RK: torch.Tensor, scales_R: torch.Tensor) -> torch.Tensor:
        """Exact sums in each group, times its scale; the groups in float32; times the row's."""
        group_size = self.weight.shape[1] // self.scale.shape[0]
        groups = zip(
            values_RK.float().split(group_size, dim=1),
            self.weight.split(group_size, dim=1),
            self.scale,
            strict=True,
        )
        sums_RN = add_up(
            integer_sums(values, weight).float() * scale_N for values, weight, scale_N in groups
        )
        return sums_RN * scales_R.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class StaticInt8Product(Product):
    """W8A8 with a scale and an offset of the input that were fixed beforehand.

    Every part of N that was a projection of its own quantises the rows by its own scale.

    Args:
        weight: integers ``[N, K]`` held in float32.
        scale: float32 ``[N]``.
        column_sums: float64 ``[N]``, the sum of each output row's integers.
        input_scale, input_offset: float32 ``[S]``.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    column_sums: torch.Tensor
    input_scale: torch.Tensor
    input_offset: torch.Tensor

    def apply(self, rows_RK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Quantise the rows for each part, multiply, take the offset's share off again."""
        num_parts = self.input_scale.shape[0]
        parts = zip(
            self.input_scale,
            self.input_offset,
            self.weight.chunk(num_parts),
            self.scale.chunk(num_parts),
            self.column_sums.chunk(num_parts),
            strict=True,
        )
        return add_bias(torch.cat([_static_part(rows_RK, *part) for part in parts], dim=1), bias_N)


def _static_part(
    rows_RK: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor,
    column_sums_N: torch.Tensor,
) -> torch.Tensor:
    values_RK = quantise_static_int8(rows_RK, input_scale, input_offset).float()
    # In float64 the two large terms cancel exactly, as they do in a device's int32.
    sums_RN = integer_sums(values_RK, weight_NK).double() - input_offset.double() * column_sums_N
    return sums_RN.float() * (input_scale * scale_N)
