"""What a grouped product is given and gives, and its one call of the operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mortise_npu_ascend.groups import Groups, ListType


class Kind(Enum):
    """What rows are."""

    PLAIN = "plain"
    """bfloat16 or float32 ``[R, K]``, without scales."""
    INT8 = "int8"
    """int8 ``[R, K]`` with a float32 scale for each row."""
    INT4 = "int4"
    """int4 in int32 words ``[R, K/8]``, lowest nibble first, with a float32 scale for each row."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind.

    Args:
        values: as the kind says.
        scales: float32 ``[R]``, or None where the rows are plain.
        are_borrowed: somebody else's, so that no operator may overwrite them.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    are_borrowed: bool = False


class Product(ABC):
    """One projection of all local experts, laid out for the device."""

    __slots__ = ()

    @property
    @abstractmethod
    def takes(self) -> Kind:
        """The rows that it multiplies."""

    @abstractmethod
    def multiply(self, rows: Rows, groups: Groups) -> torch.Tensor:
        """Multiply each group by the weight of its expert.

        Returns:
            ``[R, N]``, bfloat16 or the dtype of plain rows; rows past the last group are undefined.
        """


def quantise(torch_npu: Any, plain_RK: torch.Tensor, kind: Kind) -> Rows:
    """Quantise bfloat16 rows on the device, each by its own largest magnitude.

    Args:
        torch_npu: the operators.
        plain_RK: bfloat16 ``[R, K]``; for PLAIN any dtype.
        kind: what they are to be; PLAIN leaves them as they are.
    """
    match kind:
        case Kind.PLAIN:
            return Rows(plain_RK, are_borrowed=True)
        case Kind.INT8:
            return Rows(*torch_npu.npu_dynamic_quant(plain_RK, dst_type=torch.int8))
        case Kind.INT4:
            # The dtype only asks: what comes back is int32 words.
            return Rows(*torch_npu.npu_dynamic_quant(plain_RK, dst_type=torch.quint4x2))


def grouped_matmul(
    torch_npu: Any,
    values: torch.Tensor,
    weight: torch.Tensor,
    groups: Groups,
    out_dtype: torch.dtype,
    *,
    list_type: ListType | None = None,
    **tensors: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply groups of rows by one stacked weight.

    The operator takes lists; an argument that is not there is left out, since ``[None]`` is no
    list of tensors to it. Its default result is of the rows' dtype, int8 for int8 rows, so the
    dtype is always said.

    Args:
        torch_npu: the operators.
        values: rows ``[R, K]`` or words ``[R, K/8]``.
        weight: ``[E_l, K, N]`` or words ``[E_l, K, N/8]``.
        groups: of the rows.
        out_dtype: of the result.
        list_type: what to call the list of groups; None is as all modes but one want it.
        tensors: further arguments of the operator that are lists of tensors.

    Returns:
        ``[R, N]``; rows past the last group are undefined.
    """
    lists = {name: [tensor] for name, tensor in tensors.items() if tensor is not None}
    (result,) = torch_npu.npu_grouped_matmul(
        [values],
        [weight],
        **lists,
        split_item=2,
        group_type=0,
        group_list=groups.counts,
        group_list_type=int(groups.list_type if list_type is None else list_type),
        output_dtype=out_dtype,
    )
    assert isinstance(result, torch.Tensor)
    return result
