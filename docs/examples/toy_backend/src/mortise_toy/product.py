"""The product of rows and weights as this backend adds it up: block sums, with compensation."""

# A chip multiplies a block of columns at a time and adds the blocks' sums to a running one. Each
# such addition rounds, and the error grows with the number of blocks. Here what a rounding lost is
# remembered and given to the next addition (W. Kahan, "Further remarks on reducing truncation
# errors", CACM 8, 1965): the error no longer depends on how many blocks there are. With u = 2**-24,
# C columns a block, and S the sum of |x * w| of one element, N. J. Higham, "Accuracy and Stability
# of Numerical Algorithms", section 4.3, gives |error| <= (C*u + 2*u + O(u**2)) * S.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def blocks_of(weight: torch.Tensor, columns: int) -> tuple[torch.Tensor, ...]:
    """``[..., N, K]`` as float32 blocks ``[..., N, C]``; the last may have fewer columns."""
    return tuple(block.float().contiguous() for block in weight.split(columns, dim=-1))


def compensated_product(rows_RK: torch.Tensor, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, N]`` of rows ``[R, K]`` and of blocks ``[N, C]`` of a weight ``[N, K]``."""
    widths = [block.shape[-1] for block in blocks]
    total_RN = rows_RK.new_zeros((rows_RK.shape[0], blocks[0].shape[0]), dtype=torch.float32)
    lost_RN = torch.zeros_like(total_RN)
    for rows_RC, block_NC in zip(rows_RK.split(widths, dim=-1), blocks, strict=True):
        term_RN = rows_RC.float() @ block_NC.T - lost_RN
        sum_RN = total_RN + term_RN
        # What of the term did not fit into the sum: zero in exact arithmetic.
        lost_RN = (sum_RN - total_RN) - term_RN
        total_RN = sum_RN
    return total_RN
