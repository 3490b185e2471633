"""ModelSlim's ``scale_bias``, which weight and scales of W4A8 have to agree with."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Final

import torch

from mortise.checkpoint.placement import StoredForm
from mortise.checkpoint.quantization.conversions import QUANTISE_ANEW
from mortise.checkpoint.quantization.stored_modules import FLOATS
from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.checkpoint.placement import Conversion, Read

SHIFT: Final = 8
"""What an int4 value is shifted by to be positive, and the sums are multiplied by."""

NUM_SUMS: Final = 16
"""Parts of a row that are summed apart where the columns may be divided among ranks."""

FLOAT32_ROUNDING: Final = 2.0**-23
"""Twice the relative error of one operation: theirs and ours."""

TWO_BFLOAT16_ROUNDINGS: Final = 2.0**-7 + 2.0**-16
"""Old versions round both stages' scales to bfloat16 for the sums, and store them unrounded."""


def scale_bias_form(rows: int, columns: int) -> StoredForm:
    """The shapes that the saver writes, which it chooses by parts of the module's name.

    Sums of rows ``[N, 1]``; of 16 parts of them ``[N, 16]``; and, under names that it does not
    know (``w1``, ``w2`` and ``w3`` before it learnt them, ``kv_b_proj``), the product of every
    value with its scale ``[N, K]``, neither summed nor multiplied by 8.
    (``msmodelslim/core/quant_service/modelslim_v1/save/utils/pack.py``, ``process_scale``.)

    Args:
        rows: N.
        columns: K.
    """
    parts = [1, NUM_SUMS, columns] if columns % NUM_SUMS == 0 else [1, columns]
    return StoredForm(shapes=tuple((rows, part) for part in parts), dtypes=FLOATS)


def agreeing_with_scale_bias(
    name: str,
    convert: Conversion,
    *,
    values: Callable[[torch.Tensor], torch.Tensor],
    scale: Callable[[Read], torch.Tensor],
    two_stages: bool,
) -> Conversion:
    """The converted weight, once ``scale_bias`` has been found to follow from it and its scales.

    ``8 * sum_k(weight * scale)``; a wrong one says that weight and scales are not of one module.

    Args:
        name: of the ``scale_bias``.
        convert: what becomes of the weight.
        values: int8 ``[N, K]`` of the weight as it is stored.
        scale: reads the scales ``[N, G]``, those of two stages multiplied, and checks them.
        two_stages: whether they are of two stages.

    Raises:
        QuantizationConfigError: from the conversion, naming the tensor and the first wrong value.
    """

    def checked(stored: torch.Tensor, read: Read) -> torch.Tensor:
        converted = convert(stored, read)
        require_sums(name, read(name).float(), values(stored), scale(read).float(), two_stages)
        return converted

    return checked


def require_sums(
    name: str, found: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, two_stages: bool
) -> None:
    """Require stored sums to be those of the weight, but for rounding.

    A sum of n float32 products is off by at most n roundings of the sum of their magnitudes, in
    whatever order it was taken.

    Raises:
        QuantizationConfigError: they are not.
    """
    columns, parts = values.shape[1], found.shape[1]
    factor = SHIFT if parts in {1, NUM_SUMS} else 1
    expected = factor * scaled_sums(values, scale, parts)
    magnitude = factor * scaled_sums(values.abs(), scale, parts)
    relative = (columns // parts + 1) * FLOAT32_ROUNDING
    if two_stages:
        relative += TWO_BFLOAT16_ROUNDINGS
    # Not greater rather than greater, so that a NaN is wrong.
    wrong = ~((found - expected).abs() <= magnitude * relative)
    if bool(wrong.any()):
        row, part = wrong.nonzero()[0].tolist()
        raise QuantizationConfigError(
            f"tensor {name} differs from what weight and weight_scale make of it in"
            f" {int(wrong.sum())} of {wrong.numel()} values, the first at [{row}, {part}]:"
            f" {float(found[row, part]):g} instead of {float(expected[row, part]):g}",
            expected="8 * sum of the row's weights * weight_scale, or of each of its 16 parts;"
            " or weight * weight_scale for every value",
            remedy=QUANTISE_ANEW,
        )


def scaled_sums(values: torch.Tensor, scale: torch.Tensor, parts: int) -> torch.Tensor:
    """Sums of values times scales over equal parts of the rows, float32 ``[N, parts]``.

    Integers are summed first, as far as they share a scale: exactly, and without a float for
    every value.

    Args:
        values: int8 ``[N, K]``.
        scale: float32 ``[N, G]``.
        parts: of a row; divides K, as G does.
    """
    columns, groups = values.shape[1], scale.shape[1]
    step = gcd(columns // groups, columns // parts)
    sums = values.unflatten(1, (-1, step)).sum(dim=2, dtype=torch.int32).float()
    spread = scale.repeat_interleave(columns // groups // step, dim=1)
    scaled: torch.Tensor = (sums * spread).unflatten(1, (parts, -1)).sum(dim=2)
    return scaled
