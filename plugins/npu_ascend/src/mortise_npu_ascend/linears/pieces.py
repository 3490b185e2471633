"""Cutting a stored projection into pieces along its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from mortise_npu_ascend.limits import LARGEST_AXIS
from mortise_npu_ascend.products.int4_made_int8 import MULTIPLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from mortise.plugin import StoredWeight

PIECE_ROWS: Final = LARGEST_AXIS // MULTIPLE * MULTIPLE
"""Most rows of a piece, such that no operator has to pad them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a projection.

    Args:
        stored: their weights, one part; views.
        bias: float32, or None.
    """

    stored: StoredWeight
    bias: torch.Tensor | None


def pieces(
    stored: StoredWeight, bias: torch.Tensor | None, most_rows: int = PIECE_ROWS
) -> tuple[Piece, ...]:
    """Cut ``[N, K]``: parts whose inputs have different scales, and those that are too long.

    Args:
        stored: the projection.
        bias: ``[N]``, or None.
        most_rows: of a piece.
    """
    return tuple(
        _piece(stored, bias, part, slice(first, min(first + most_rows, rows.stop)))
        for part, rows in _parts(stored)
        for first in range(rows.start, rows.stop, most_rows)
    )


def _parts(stored: StoredWeight) -> Iterator[tuple[int, slice]]:
    """The number and rows of each part; one for all if their inputs are quantised alike."""
    num_rows = stored.weight.shape[0]
    num_parts = 1 if _is_same_input(stored) else stored.num_parts
    size = num_rows // num_parts
    for part in range(num_parts):
        yield part, slice(part * size, (part + 1) * size)


def _is_same_input(stored: StoredWeight) -> bool:
    return all(
        tensor is None or bool((tensor == tensor[0]).all())
        for tensor in (stored.input_scale, stored.input_offset)
    )


def _piece(stored: StoredWeight, bias: torch.Tensor | None, part: int, rows: slice) -> Piece:
    def of_part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[part : part + 1]

    return Piece(
        replace(
            stored,
            weight=stored.weight[rows],
            scale=None if stored.scale is None else stored.scale[rows],
            input_scale=of_part(stored.input_scale),
            input_offset=of_part(stored.input_offset),
            num_parts=1,
        ),
        None if bias is None else bias[rows].detach().float(),
    )
