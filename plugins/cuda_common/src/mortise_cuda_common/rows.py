"""Rows as a product takes them: their values, and the scales of those that are quantised."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from mortise.plugin import ScaleFormat

if TYPE_CHECKING:
    import torch


class Kind(Enum):
    """What rows are. R rows, K columns; scales are logical shapes, strides are free."""

    PLAIN = "plain"
    """bfloat16 or float32 ``[R, K]``, without scales."""
    FP8 = "fp8"
    """e4m3 ``[R, K]``, float32 scales ``[R, ceil(K/128)]`` of any value."""
    FP8_UE8M0 = "fp8_ue8m0"
    """e4m3 ``[R, K]``, float32 scales ``[R, ceil(K/128)]`` that are powers of two."""
    NVFP4 = "nvfp4"
    """e2m1 in bytes uint8 ``[R, K/2]``, e4m3 scales ``[R, K/16]``, one global scale (a factor)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Flat rows of one kind; those of no group are undefined.

    Args:
        values, scales: as the kind says.
        kind: what they are.
        global_scale: NVFP4: the factor common to all scales; None where each group has its own,
            which the product that quantised the rows knows.
    """

    values: torch.Tensor
    kind: Kind
    scales: torch.Tensor | None = None
    global_scale: float | None = None


def scale_format_of(kind: Kind) -> ScaleFormat | None:
    """What the scales of float8 rows are to be; None of rows of any other kind."""
    match kind:
        case Kind.FP8:
            return ScaleFormat.FLOAT32
        case Kind.FP8_UE8M0:
            return ScaleFormat.UE8M0
        case Kind.PLAIN | Kind.NVFP4:
            return None
