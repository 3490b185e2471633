"""Float32 rows to integers, as the vector units round them: ties to even, then saturation."""

from __future__ import annotations

import torch


def to_integers(values: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Round ties to even and saturate to ``low``..``high``; NaN becomes 0.

    Returns:
        int8 of the same shape.
    """
    return values.round().clamp(low, high).nan_to_num(0.0).to(torch.int8)


def by_largest(
    values: torch.Tensor, largest: int, dim: int | tuple[int, ...] = -1, *, divide: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise by the largest magnitude along ``dim``: value = integer * scale, nearly.

    Kernels have two orders of operations. Between them integers differ by at most 1, and scales by
    a unit in the last place. A row of zeros becomes zeros with scale 0.

    Args:
        values: float32.
        largest: 127 or 7; the most negative integer stays unused.
        dim: axes that share a scale.
        divide: divide by the scale ``amax * (1 / largest)``; else multiply by ``largest / amax``
            and store the reciprocal of that.

    Returns:
        int8 of the same shape, and float32 scales with ``dim`` kept as 1.
    """
    amax = values.abs().amax(dim=dim, keepdim=True)
    # Tensors of ones and limits, because torch multiplies a number's reciprocal where it divides a
    # number by a tensor.
    limit, one = torch.full_like(amax, largest), torch.ones_like(amax)
    if divide:
        scale = amax * (one / limit)
        return to_integers(values / scale, -largest, largest), scale
    factor = limit / amax
    return to_integers(values * factor, -largest, largest), one / factor


def group_of_each_row(ends: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Which group each of M rows belongs to, by where the groups end.

    Args:
        ends: integers ``[E]``, not decreasing.
        num_rows: M.

    Returns:
        int64 ``[M]``; E for rows behind the last group.
    """
    return torch.searchsorted(ends.to(torch.int64), torch.arange(num_rows), right=True)
