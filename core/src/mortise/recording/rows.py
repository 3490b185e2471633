"""Rows of experts without their layout: one group after the other, nothing between or behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, assert_never

import torch

from mortise.formats.arrangement import movable, undefined_rows
from mortise.formats.layout import TensorLayout
from mortise.formats.rows import dequantise_rows, quantise_rows
from mortise.spec.dispatch import (
    DispatchDtype,
    DispatchedTokens,
    GroupListKind,
    RoutingWeightSide,
    RowLayout,
)

if TYPE_CHECKING:
    from mortise.spec.dispatch import DispatchFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRows:
    """Dispatched rows, packed: R rows of all groups, whatever layout they came in.

    Args:
        rows: ``[R, ...]`` as the format's dtype stores them.
        scales: ``[R, ...]``, or None.
        row_weights: float32 ``[R]`` where the experts multiply, else None.
        counts: rows of each local expert.
        capacity: rows that each expert had room for, of a masked layout; else 0.
        counts_on_host: whether the backend was told the counts.
        kind: of the group list that the backend was given.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    row_weights: torch.Tensor | None
    counts: tuple[int, ...]
    capacity: int
    counts_on_host: bool
    kind: GroupListKind

    @classmethod
    def of(cls, tokens: DispatchedTokens) -> PlainRows:
        """Copies of what has arrived; rows of no group are left out."""
        counts = counts_of(tokens)
        is_masked = tokens.format.row_layout is RowLayout.MASKED
        places = row_places(counts, tokens.format, tokens.rows.shape)

        def own(rows: torch.Tensor | None) -> torch.Tensor | None:
            return None if rows is None else packed(rows, places, tokens.format)

        return cls(
            rows=packed(tokens.rows, places, tokens.format),
            scales=own(tokens.scales),
            row_weights=own(tokens.row_weights),
            counts=counts,
            capacity=tokens.rows.shape[1] if is_masked else 0,
            counts_on_host=tokens.group_counts is not None,
            kind=tokens.group_list_kind,
        )

    def floats(self, format: DispatchFormat) -> torch.Tensor:
        """The values of the rows, float32 ``[R, H]``."""
        return dequantise_rows(self.rows, self.scales, format, torch.float32)

    def converted(self, found: DispatchFormat, wanted: DispatchFormat) -> PlainRows:
        """The same rows in the number format of another dispatch format, rounded once more.

        Args:
            found: the format they are in.
            wanted: the format they are to be in; its layout does not matter here.
        """
        dtype = torch.bfloat16 if wanted.dtype is DispatchDtype.BF16 else torch.float32
        rows, scales = quantise_rows(dequantise_rows(self.rows, self.scales, found, dtype), wanted)
        return replace(self, rows=rows, scales=scales)

    def arranged(self, format: DispatchFormat, device: torch.device) -> DispatchedTokens:
        """In the layout of a format; rows of no group are bytes of ones, which are no number."""
        shape = self._shape(format)
        places = row_places(self.counts, format, shape)
        counts = torch.tensor(self.counts, dtype=torch.int64, device=device)
        # The ends of padded groups are not those of their rows: aligned groups are counted.
        is_aligned = format.row_layout is RowLayout.GROUPED_ALIGNED
        kind = GroupListKind.COUNTS if is_aligned else self.kind

        def laid(rows: torch.Tensor | None) -> torch.Tensor | None:
            return None if rows is None else spread(rows.to(device), places, shape)

        return DispatchedTokens(
            rows=spread(self.rows.to(device), places, shape),
            scales=laid(self.scales),
            group_list=counts.cumsum(0) if kind is GroupListKind.CUMULATIVE else counts,
            group_list_kind=kind,
            group_counts=self.counts if self.counts_on_host else None,
            format=format,
            routing_weight_side=_side(self.row_weights),
            row_weights=laid(self.row_weights),
        )

    def _shape(self, format: DispatchFormat) -> tuple[int, ...]:
        match format.row_layout:
            case RowLayout.MASKED:
                return len(self.counts), max(self.capacity, *self.counts, 1)
            case RowLayout.GROUPED_ALIGNED:
                step = format.alignment
                return (sum(-(-count // step) * step for count in self.counts),)
            case RowLayout.GROUPED:
                return (sum(self.counts),)
            case _:
                assert_never(format.row_layout)


def _side(row_weights: torch.Tensor | None) -> RoutingWeightSide:
    return RoutingWeightSide.COMBINE if row_weights is None else RoutingWeightSide.EXPERTS


def counts_of(tokens: DispatchedTokens) -> tuple[int, ...]:
    """Rows of each expert; waits for the device."""
    if tokens.group_counts is not None:
        return tokens.group_counts
    numbers = tokens.group_list
    if tokens.group_list_kind is GroupListKind.CUMULATIVE:
        numbers = numbers.diff(prepend=numbers.new_zeros(1))
    return tuple(numbers.tolist())


def row_places(
    counts: tuple[int, ...], format: DispatchFormat, shape: tuple[int, ...]
) -> torch.Tensor:
    """int64 ``[R]``: where the rows of all groups are among the flattened rows of a layout."""
    match format.row_layout:
        case RowLayout.MASKED:
            starts = [expert * shape[1] for expert in range(len(counts))]
        case RowLayout.GROUPED_ALIGNED:
            starts = _starts([-(-one // format.alignment) * format.alignment for one in counts])
        case RowLayout.GROUPED:
            starts = _starts(counts)
        case _:
            assert_never(format.row_layout)
    ranges = [torch.arange(at, at + n) for at, n in zip(starts, counts, strict=True)]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def _starts(sizes: tuple[int, ...] | list[int]) -> list[int]:
    return [sum(sizes[:expert]) for expert in range(len(sizes))]


def packed(rows: torch.Tensor, places: torch.Tensor, format: DispatchFormat) -> torch.Tensor:
    """A copy ``[R, ...]`` of the rows at these places of a layout."""
    flat = rows.flatten(0, 1) if format.row_layout is RowLayout.MASKED else rows
    return movable(flat).index_select(0, places.to(rows.device)).view(rows.dtype)


def spread(rows: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The way back: rows ``[R, ...]`` at their places of ``[*shape, ...]``, ones around."""
    layout = TensorLayout(tuple(rows.shape[1:]), rows.dtype)
    out = undefined_rows(layout, prod(shape), rows.device, poison=True)[:-1]
    movable(out).index_copy_(0, places.to(rows.device), movable(rows))
    return out.unflatten(0, shape) if len(shape) > 1 else out
