"""Keeping the fp16 sums of the products with int4 weights finite."""

# The matrix units write the sums of a group of columns, times the weight's scale, as fp16, and add
# groups up in it, before the row's scale makes them small (docs/how-to/run-on-ascend.md).

from __future__ import annotations

import math
from typing import Final

import torch

LARGEST: Final = 60000.0
"""Below the largest fp16, 65504, by more than adding up in fp16 may round upwards."""


def shrinking(values_NK: torch.Tensor, scale_NG: torch.Tensor, largest_row_value: int) -> int:
    """By how many powers of two scales must shrink so that no fp16 sum can overflow.

    Args:
        values_NK: int4 weights ``[..., N, K]``, one to a byte.
        scale_NG: their scales ``[..., N, G]``.
        largest_row_value: largest magnitude of a value in a row.

    Returns:
        The exponent, 0 in nearly all models: multiplying the weight's scales by two to its
        negative, and the row's scales by two to it, changes no result but those that overflow.
    """
    groups = values_NK.unflatten(-1, (scale_NG.shape[-1], -1))
    magnitudes_NG = groups.abs().sum(dim=-1, dtype=torch.int64)
    bound = float((magnitudes_NG.float() * scale_NG).sum(dim=-1).max()) * largest_row_value
    return max(0, math.ceil(math.log2(bound / LARGEST))) if bound > 0 else 0
