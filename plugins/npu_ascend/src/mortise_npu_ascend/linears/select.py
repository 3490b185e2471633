"""From a piece of a stored projection to its product."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from mortise.plugin import WeightScheme
from mortise_npu_ascend.linears.int4 import Int4Linear
from mortise_npu_ascend.linears.int8 import Int8Linear
from mortise_npu_ascend.linears.single_group import SingleGroupLinear
from mortise_npu_ascend.linears.static_int8 import StaticInt8Linear
from mortise_npu_ascend.linears.weight_only import WeightOnlyLinear

if TYPE_CHECKING:
    from mortise_npu_ascend.linears.base import LinearProduct
    from mortise_npu_ascend.linears.pieces import Piece
    from mortise_npu_ascend.vendor import Vendor


def linear_product(vendor: Vendor, piece: Piece) -> LinearProduct:
    """Lay a weight ``[N, K]`` out, which :mod:`mortise_npu_ascend.limits` let through."""
    stored, bias = piece.stored, piece.bias
    assert stored.scale is not None, "a quantised weight has scales"
    match stored.scheme:
        case WeightScheme.W8A8 if stored.input_scale is not None:
            return StaticInt8Linear.of(vendor, stored, bias)
        case WeightScheme.W8A8:
            return Int8Linear.of(vendor, stored, bias)
        case WeightScheme.W4A4 if stored.scale.shape[-1] == 1:
            return Int4Linear.of(vendor, stored, bias)
        case WeightScheme.W4A8 | WeightScheme.W4A4:
            return SingleGroupLinear.of(vendor, stored, bias)
        case WeightScheme.W4A16:
            return WeightOnlyLinear.of(vendor, stored, bias)
        case WeightScheme.FLOAT | WeightScheme.FP8_BLOCK | WeightScheme.NVFP4:
            raise AssertionError(f"the limits let no {stored.scheme} weight through")
        case _:
            assert_never(stored.scheme)
