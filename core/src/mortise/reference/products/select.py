"""From a stored weight to its product: unpacked and widened once, so that a call need not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, assert_never

import torch

from mortise.formats.fp8 import GROUP
from mortise.formats.integer import unpack_int4
from mortise.formats.nvfp4 import dequantise_nvfp4
from mortise.formats.weights import dequantise_weight
from mortise.reference.products.fp8 import Fp8BlockProduct
from mortise.reference.products.integer import IntegerProduct, StaticInt8Product
from mortise.reference.products.nvfp4 import Nvfp4Product
from mortise.reference.products.unquantised import UnquantisedProduct
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from mortise.reference.products.base import Product
    from mortise.spec.weights import StoredWeight


def product_of(stored: StoredWeight) -> Product:
    """Lay one projection ``[N, K]`` out for its scheme's arithmetic.

    Unquantised weights stay where they are. Those of every other scheme are held in float32, four
    bytes each beside the stored ones: exact, and as fast as the product of a float32 model.
    """
    match stored.scheme:
        case WeightScheme.FLOAT:
            return UnquantisedProduct(stored.weight)
        case WeightScheme.FP8_BLOCK:
            return _fp8_block(stored)
        case WeightScheme.W8A8 if stored.input_scale is not None:
            return _static_int8(stored, stored.input_scale)
        case WeightScheme.W8A8:
            return IntegerProduct(
                stored.weight.float(),
                _scale(stored).T.clone(memory_format=torch.contiguous_format),
                8,
            )
        case WeightScheme.W4A8:
            return _int4(stored, input_bits=8)
        case WeightScheme.W4A4:
            return _int4(stored, input_bits=4)
        case WeightScheme.W4A16:
            return UnquantisedProduct(dequantise_weight(stored))
        case WeightScheme.NVFP4 if stored.input_scale is not None:
            return _nvfp4(stored, stored.input_scale)
        case WeightScheme.NVFP4:
            return UnquantisedProduct(dequantise_weight(stored))
        case _:
            assert_never(stored.scheme)


def _fp8_block(stored: StoredWeight) -> Fp8BlockProduct:
    rows_of_part = stored.weight.shape[0] // stored.num_parts
    # Each part has blocks of rows of its own, the last of which may be partial.
    scale_NC = torch.cat(
        [
            part.repeat_interleave(GROUP, dim=0)[:rows_of_part]
            for part in _scale(stored).chunk(stored.num_parts)
        ]
    )
    return Fp8BlockProduct(stored.weight.float(), scale_NC.T.contiguous(), stored.scale_format)


def _int4(stored: StoredWeight, *, input_bits: Literal[4, 8]) -> IntegerProduct:
    values = unpack_int4(stored.weight).float()
    return IntegerProduct(
        values, _scale(stored).T.clone(memory_format=torch.contiguous_format), input_bits
    )


def _static_int8(stored: StoredWeight, input_scale: torch.Tensor) -> StaticInt8Product:
    offset = stored.input_offset
    return StaticInt8Product(
        weight=stored.weight.float(),
        scale=_scale(stored).squeeze(1).clone(),
        column_sums=stored.weight.sum(dim=1).double(),
        input_scale=input_scale.clone(),
        input_offset=torch.zeros_like(input_scale) if offset is None else offset.clone(),
    )


def _nvfp4(stored: StoredWeight, input_scale: torch.Tensor) -> Nvfp4Product:
    assert stored.global_scale is not None
    rows_of_part = stored.weight.shape[0] // stored.num_parts
    return Nvfp4Product(
        weight=dequantise_nvfp4(stored.weight, _scale(stored), 1.0),
        global_scale=stored.global_scale.repeat_interleave(rows_of_part),
        # The parts multiply the same rows, so the widest range serves them all.
        input_scale=input_scale.amax(),
    )


def _scale(stored: StoredWeight) -> torch.Tensor:
    assert stored.scale is not None, "a quantised weight has scales"
    return stored.scale
