"""Which rows belong to which local expert, as the grouped product wants to be told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

from mortise.plugin import ContractError, GroupListKind, ReasonCode, RowLayout

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens


class ListType(IntEnum):
    """``group_list_type`` of the grouped product."""

    ENDS = 0
    COUNTS = 1


@dataclass(frozen=True, slots=True)
class Groups:
    """Consecutive groups of rows, one for each local expert, the first of which starts at row 0.

    Args:
        counts: int64 ``[E_l]``, rows of each group; on the device.
    """

    counts: torch.Tensor

    @classmethod
    def of(cls, tokens: DispatchedTokens, layer: str) -> Groups:
        """Groups of dispatched rows, whichever kind of list came with them.

        Raises:
            ContractError: there may be rows between the groups.
        """
        layout = tokens.format.row_layout
        padded = layout is RowLayout.GROUPED_ALIGNED and tokens.format.alignment > 1
        if layout is RowLayout.MASKED or padded:
            raise ContractError(
                f"layer {layer}: the rows came {layout.value}",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected=f"{RowLayout.GROUPED.value}: a grouped product of this device knows no"
                " rows between groups",
            )
        if tokens.group_list_kind is GroupListKind.COUNTS:
            return cls(tokens.group_list)
        return cls(torch.diff(tokens.group_list, prepend=tokens.group_list.new_zeros(1)))

    @classmethod
    def single(cls, rows_RK: torch.Tensor) -> Groups:
        """One group of all rows."""
        return cls(torch.full((1,), rows_RK.shape[0], dtype=torch.int64, device=rows_RK.device))

    @property
    def list_type(self) -> ListType:
        """What ``counts`` is called in a grouped product.

        The device takes no list of counts of length one. Of a single group the count is the end.
        """
        return ListType.ENDS if self.counts.shape[0] == 1 else ListType.COUNTS
