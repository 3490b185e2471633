"""How far another backend's answer may be from a recorded one, by hook, scheme and dtype."""

# Errors come from the roundings that two correct implementations may do differently, as
# ``mortise.conformance.tolerances`` derives them. What is common to a whole answer is held to more:
# roundings that know nothing of each other cancel in it.

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance import tolerances
from mortise.spec.dispatch import DispatchDtype
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.conformance.tolerances import Tolerance
    from mortise.recording.differences import Difference
    from mortise.spec.dispatch import DispatchFormat
    from mortise.spec.paged_mqa import IndexKeyDtype
    from mortise.spec.weights import StoredWeight

COMMON_FACTOR: Final = 2.0**-8
"""A factor of a whole answer is rounded to bfloat16 at worst, whatever the chip."""

GAIN_MARGIN: Final = 6.0
"""Standard errors beyond that: with as few as eight rows, chance goes so far once in 2000 times."""

MOST: Final = 0.75
"""A row that is further off than this has lost what it said, whatever rounded it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """The largest differences of an answer that is right.

    Args:
        whole, row: relative errors of norms, of everything and of any one row.
        gain: of the factor that is common to everything, beside what chance makes of it.
    """

    whole: float
    row: float
    gain: float

    def problem(self, found: Difference) -> str:
        """What of a difference is too large, or nothing."""
        if not found.whole <= self.whole:
            return f"differs by {found.whole:.2g} of its norm, allowed is {self.whole:.2g}"
        if not found.row <= self.row:
            return f"row {found.worst_row} differs by {found.row:.2g}, allowed is {self.row:.2g}"
        return self.gain_problem(found.gain, found.gain_error)

    def gain_problem(self, gain: float, error: float) -> str:
        """What of a factor in common is too large, or nothing.

        Args:
            gain: the factor, less 1.
            error: its standard error.
        """
        limit = self.gain + GAIN_MARGIN * error
        if abs(gain) <= limit:
            return ""
        size = "larger" if gain > 0 else "smaller"
        return f"is {size} by {abs(gain):.2%} altogether, allowed is {limit:.2%}"


_STEPS: Final[Mapping[DispatchDtype, float]] = MappingProxyType(
    {
        DispatchDtype.FP32: 0.0,
        DispatchDtype.BF16: 0.0,
        DispatchDtype.INT8: tolerances.STEP[WeightScheme.W8A8],
        DispatchDtype.FP8_E4M3: tolerances.STEP[WeightScheme.FP8_BLOCK],
        DispatchDtype.NVFP4: tolerances.STEP[WeightScheme.NVFP4],
    }
)
"""Distance of two neighbours in rows of each format, relative to a usual value."""

EXACT: Final = Allowance(whole=0.0, row=0.0, gain=0.0)
"""Of hooks that move numbers and compute none."""


def of_projection(stored: StoredWeight, dtype: torch.dtype, columns: int, rows: int) -> Allowance:
    """Of ``quantized_linear`` on ``[T, K]``."""
    own = tolerances.of_projection(
        stored.scheme, dtype, columns, rows, static_input=stored.input_scale is not None
    )
    return _allowance(own, dtype)


def of_experts(
    w13: StoredWeight,
    w2: StoredWeight,
    dtype: torch.dtype,
    *,
    hidden: int,
    intermediate: int,
    rows: int,
    converted: float = 0.0,
) -> Allowance:
    """Of ``quantized_moe_apply`` on R rows.

    Args:
        w13: as stored.
        w2: as stored.
        dtype: compute dtype.
        hidden: H.
        intermediate: I.
        rows: R.
        converted: relative error that rows got when they were brought into another format.
    """
    own = tolerances.of_experts(
        w13.scheme,
        w2.scheme,
        dtype,
        hidden,
        intermediate,
        rows,
        static_w13=w13.input_scale is not None,
        static_w2=w2.input_scale is not None,
    )
    return _allowance(own, dtype, 2 * converted)


def of_scores(
    key_dtype: IndexKeyDtype,
    dtype: torch.dtype,
    *,
    heads: int,
    dim: int,
    converted: float = 0.0,
) -> Allowance:
    """Of ``paged_mqa_logits``; ``converted`` is the error that keys got."""
    own = tolerances.of_scores(key_dtype, dtype, heads, dim)
    return _allowance(own, dtype, converted)


def of_sums(dtype: torch.dtype) -> Allowance:
    """Of ``combine``: sums of K rows in float32, rounded once on either side."""
    spread = hypot(
        sqrt(2) * tolerances.USUAL * tolerances.UNIT[dtype], 16 * tolerances.UNIT[torch.float32]
    )
    whole = tolerances.MARGIN * spread
    own = tolerances.Tolerance(whole, tolerances.ROW_MARGIN * whole)
    return _allowance(own, dtype)


def of_rows(*formats: DispatchFormat) -> Allowance:
    """Of dispatched rows, each rounded once to one of these formats; exact where none rounds."""
    step = hypot(*(_STEPS[one.dtype] for one in formats))
    if not step:
        return EXACT
    return Allowance(whole=min(step, MOST), row=min(2 * step, MOST), gain=COMMON_FACTOR)


def _allowance(own: Tolerance, dtype: torch.dtype, converted: float = 0.0) -> Allowance:
    """With the error of rows that were converted, which errors of both sides do not know of."""
    whole = hypot(own.whole, tolerances.MARGIN * converted)
    row = hypot(own.row, tolerances.ROW_MARGIN * tolerances.MARGIN * converted)
    return Allowance(
        whole=min(whole, MOST),
        row=min(row, MOST),
        gain=COMMON_FACTOR if dtype is torch.bfloat16 else own.whole,
    )
