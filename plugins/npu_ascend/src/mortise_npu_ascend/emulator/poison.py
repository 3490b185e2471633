"""What stands in rows that the device leaves unwritten, so that a reader of them is found out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """NaN for floating-point numbers, the smallest integer, ``True`` for bool."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor as the device allocates it: nothing in it means anything yet."""
    return torch.full(tuple(shape), poison_value(dtype), dtype=dtype)


def poison_rows(rows: torch.Tensor, first: int) -> torch.Tensor:
    """Overwrite the rows ``first`` and following of ``[M, ...]`` in place, and return it."""
    rows[first:] = poison_value(rows.dtype)
    return rows
