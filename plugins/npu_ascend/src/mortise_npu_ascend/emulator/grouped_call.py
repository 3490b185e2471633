"""The arguments of one grouped product, and what each expert's part of them is."""

# M rows, K inner axis, N columns, E experts, G groups of K.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mortise_npu_ascend.emulator.grouped_modes import WORDS
from mortise_npu_ascend.emulator.storage import Format, storage_format
from mortise_npu_ascend.emulator.words import VALUES_PER_WORD, unpack_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ROWS: Final = 0
"""``group_type``: the groups are of rows."""

NO_GROUPS: Final = -1
"""``group_type``: one row tensor and one result for each weight."""

INNER_AXIS: Final = 2
"""``group_type``: the groups are of the inner axis, one result for each."""


@dataclass(frozen=True)
class GroupedCall:
    """Arguments of ``npu_grouped_matmul``, or of an operator that begins with it.

    Attributes:
        operator: that was called.
        kernel: which entry of the vendor's library torch_npu would take.
        x: rows ``[M, K]``; int32 is int4 words ``[M, K/8]``.
        weight: one of ``[E, K, N]``, or E of ``[K, N]``; int32 is int4 words along N, or along K
            in a transposed view.
        bias: like ``weight`` without K; so are the four that follow, with G before N where there
            are groups of K.
        scale: of the weight's columns.
        offset: of asymmetric int4 weights, times their scale.
        antiquant_scale: of weights that are made floating-point first.
        antiquant_offset: added before that.
        per_token_scale: ``[M]`` of the rows.
        group_list: what the caller gave, checked to be int64, or None.
        group_list_type: a :class:`GroupListKind`.
        split_item: 0 or 1 for one result for each weight, 2 or 3 for one in all.
        group_type: ``ROWS``, ``NO_GROUPS`` or ``INNER_AXIS``.
        act_type: see :data:`ACTIVATIONS`.
        out_dtype: of the results.
    """

    operator: str
    kernel: str
    x: tuple[torch.Tensor, ...]
    weight: tuple[torch.Tensor, ...]
    bias: tuple[torch.Tensor, ...] | None
    scale: tuple[torch.Tensor, ...] | None
    offset: tuple[torch.Tensor, ...] | None
    antiquant_scale: tuple[torch.Tensor, ...] | None
    antiquant_offset: tuple[torch.Tensor, ...] | None
    per_token_scale: tuple[torch.Tensor, ...] | None
    group_list: torch.Tensor | None
    group_list_type: int
    split_item: int
    group_type: int
    act_type: int
    out_dtype: torch.dtype

    @property
    def is_stacked(self) -> bool:
        """Whether all experts are one tensor."""
        return len(self.weight) == 1 and self.weight[0].ndim == 3

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight[0].shape[0] if self.is_stacked else len(self.weight)

    @property
    def is_tiled(self) -> bool:
        """Whether the weights are stored in ``FRACTAL_NZ``."""
        return storage_format(self.weight[0]) is Format.FRACTAL_NZ

    @property
    def num_rows(self) -> int:
        """M of all row tensors together."""
        return sum(rows.shape[0] for rows in self.x)

    def of_expert(self, tensors: Sequence[torch.Tensor] | None, expert: int) -> torch.Tensor | None:
        """One expert's part of an argument that is stacked or listed as the weights are."""
        if tensors is None:
            return None
        return tensors[0][expert] if self.is_stacked else tensors[expert]


@dataclass(frozen=True)
class WeightShape:
    """One expert's weight in numbers, not words.

    Attributes:
        inner: K.
        columns: N.
        is_transposed: K lies contiguous in memory.
    """

    inner: int
    columns: int
    is_transposed: bool


def is_transposed(tensor: torch.Tensor) -> bool:
    """Whether the last two axes are a transposed view of a contiguous matrix."""
    inner, columns = tensor.shape[-2:]
    if inner == columns == 1:
        return False
    return tensor.stride(-2) == 1 and tensor.stride(-1) == inner


def weight_shape(weight: torch.Tensor) -> WeightShape:
    """K and N of ``[..., K, N]``, or of int4 words along N or, in a transposed view, along K."""
    inner, columns = weight.shape[-2:]
    transposed = is_transposed(weight)
    if weight.dtype == WORDS:
        inner *= VALUES_PER_WORD if transposed else 1
        columns *= 1 if transposed else VALUES_PER_WORD
    return WeightShape(inner, columns, transposed)


def inner_size(rows: torch.Tensor) -> int:
    """K of rows ``[M, K]`` or of int4 words ``[M, K/8]``."""
    return rows.shape[-1] * (VALUES_PER_WORD if rows.dtype == WORDS else 1)


def weight_values(weight: torch.Tensor) -> torch.Tensor:
    """One expert's ``[K, N]``; int4 words become int8 values."""
    if weight.dtype != WORDS:
        return weight
    return unpack_words(weight, dim=-2 if is_transposed(weight) else -1)


def row_values(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[M, K]``; int4 words become int8 values."""
    return unpack_words(rows) if rows.dtype == WORDS else rows
