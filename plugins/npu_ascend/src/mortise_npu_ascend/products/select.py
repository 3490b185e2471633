"""From a stored weight of local experts to its product on one generation of the chip."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from mortise.plugin import WeightScheme
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.products.floating import FloatProduct
from mortise_npu_ascend.products.int4 import Int4Product
from mortise_npu_ascend.products.int4_by_int8 import Int4ByInt8Product
from mortise_npu_ascend.products.int4_made_int8 import Int4MadeInt8Product
from mortise_npu_ascend.products.int8 import Int8Product
from mortise_npu_ascend.products.weight_only import WeightOnlyProduct

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_npu_ascend.products.base import Product
    from mortise_npu_ascend.vendor import Vendor


def grouped_product(vendor: Vendor, stored: StoredWeight) -> Product:
    """Lay a weight ``[E_l, N, K]`` out, which :mod:`mortise_npu_ascend.limits` let through."""
    match stored.scheme:
        case WeightScheme.FLOAT:
            return FloatProduct.of(vendor, stored)
        case WeightScheme.W8A8:
            return Int8Product.of(vendor, stored)
        case WeightScheme.W4A8 if vendor.generation is Generation.A5:
            return Int4MadeInt8Product.of(vendor, stored)
        case WeightScheme.W4A8:
            return Int4ByInt8Product.of(vendor, stored)
        case WeightScheme.W4A4:
            return Int4Product.of(vendor, stored)
        case WeightScheme.W4A16:
            return WeightOnlyProduct.of(vendor, stored)
        case WeightScheme.FP8_BLOCK | WeightScheme.NVFP4:
            raise AssertionError(f"the limits let no {stored.scheme} weight through")
        case _:
            assert_never(stored.scheme)
