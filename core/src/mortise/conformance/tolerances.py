"""How far a result may be from the reference: one argument for every hook, scheme and dtype."""

# A tolerance is a relative error of norms, |found - expected| / |expected|, of a whole case and of
# each of its rows. It is derived from the roundings that two correct implementations may do
# differently, and from nothing else; no measurement went into it. docs/reference/conformance.md
# says it in words.

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import IndexKeyDtype, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

UNIT: Final[Mapping[torch.dtype, float]] = MappingProxyType(
    {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
)
"""The largest relative error of one rounding."""

USUAL: Final = 0.425
"""The root mean square of one rounding's error is so much of the largest: uniform within half a
unit in the last place, of numbers whose logarithms are uniform."""

MARGIN: Final = 3.0
"""Standard deviations that a whole case keeps to."""

ROW_MARGIN: Final = 2.0
"""By how much a single row, which averages over fewer numbers, may exceed a whole case."""

HALF_SUMS: Final = 2.0**-9
"""Sums of int4 products may leave a group of columns in half precision: four units of 2^-11."""

STEP: Final[Mapping[WeightScheme, float]] = MappingProxyType(
    {
        WeightScheme.FLOAT: 0.0,
        WeightScheme.W4A16: 0.0,
        WeightScheme.W8A8: 4 / 127,
        WeightScheme.W4A8: 4 / 127,
        WeightScheme.W4A4: 4 / 7,
        WeightScheme.FP8_BLOCK: 2.0**-3,
        WeightScheme.NVFP4: 1 / 2,
    }
)
"""Distance of two neighbours of a quantised input, relative to a usual value: the largest of a row
is about four times the usual one (int8, int4); the widest relative gap (e4m3, e2m1)."""

WEIGHT_ROUNDINGS: Final[Mapping[WeightScheme, int]] = MappingProxyType(
    {
        WeightScheme.FLOAT: 0,
        WeightScheme.W4A16: 3,
        WeightScheme.W8A8: 1,
        WeightScheme.W4A8: 3,
        WeightScheme.W4A4: 1,
        WeightScheme.FP8_BLOCK: 0,
        WeightScheme.NVFP4: 3,
    }
)
"""Roundings to bfloat16 that the numbers of a weight may meet: of its scale, of value times scale,
and as the reference rounds them. Int4 held as int8 of a row's largest scale counts for two."""

QUERY_STEP: Final = 2.0**-3
"""Queries that meet float8 keys may be rounded to float8, by a scale for each row and head."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest relative errors.

    Args:
        whole: of the norm of all rows.
        row: of the norm of any one row.
    """

    whole: float
    row: float


def _tolerance(spread: float, step: float, columns: int, numbers: int) -> Tolerance:
    """Of errors of a spread, with room for two steps of a single quantised input.

    Args:
        spread: root mean square of the relative error.
        step: :data:`STEP` of the scheme.
        columns: quantised numbers that make up a row.
        numbers: quantised numbers that make up the case.
    """
    whole = MARGIN * spread + 2 * step / sqrt(max(numbers, 1))
    return Tolerance(whole, ROW_MARGIN * MARGIN * spread + 2 * step / sqrt(columns))


def _of_sums(columns: int) -> float:
    """Float32 sums of so many products, in any order, of numbers of either sign."""
    return UNIT[torch.float32] * columns


def _of_weight(scheme: WeightScheme, dtype: torch.dtype) -> float:
    roundings = WEIGHT_ROUNDINGS[scheme]
    spread = sqrt(roundings) * USUAL * UNIT[torch.bfloat16]
    if scheme in {WeightScheme.W4A8, WeightScheme.W4A4}:
        spread = hypot(spread, HALF_SUMS)
    # Computing in float32, nobody has a reason to round a weight to less.
    return spread if dtype is torch.bfloat16 else 0.0


def step_of(scheme: WeightScheme, *, static_input: bool) -> float:
    """Distance of two neighbours of a quantised input; none where the weight alone is quantised."""
    if scheme is WeightScheme.NVFP4 and not static_input:
        return 0.0
    return STEP[scheme]


def _of_flips(apart: float, step: float) -> float:
    """What becomes of numbers that are apart before they are quantised.

    Numbers a relative distance d apart fall on different sides of an edge between steps of size s
    once in s / d times, and are then a whole step apart: root mean square sqrt(0.8 d s).
    """
    return sqrt(0.8 * apart * step)


def of_projection(
    scheme: WeightScheme,
    dtype: torch.dtype,
    columns: int,
    rows: int,
    *,
    static_input: bool = False,
) -> Tolerance:
    """Of ``quantized_linear``: rows that both quantise, one product, one rounding each.

    Args:
        scheme: of the weight.
        dtype: compute dtype.
        columns: K.
        rows: T.
        static_input: the scale of its input is stored.
    """
    step = step_of(scheme, static_input=static_input)
    roundings = sqrt(2) * USUAL * UNIT[dtype]
    flips = _of_flips(4 * UNIT[torch.float32], step)
    spread = hypot(roundings, _of_weight(scheme, dtype), flips, _of_sums(columns))
    return _tolerance(spread, step, columns, rows * columns)


def of_experts(
    scheme_w13: WeightScheme,
    scheme_w2: WeightScheme,
    dtype: torch.dtype,
    hidden: int,
    intermediate: int,
    rows: int,
    *,
    static_w13: bool = True,
    static_w2: bool = True,
) -> Tolerance:
    """Of ``quantized_moe_apply``: two products, up to three roundings between them, one at the end.

    Args:
        scheme_w13: of w13.
        scheme_w2: of w2.
        dtype: compute dtype.
        hidden: H.
        intermediate: I.
        rows: R.
        static_w13: whether the scale of w13's input is stored, where its scheme asks.
        static_w2: that of w2's.
    """
    steps = (
        step_of(scheme_w13, static_input=static_w13),
        step_of(scheme_w2, static_input=static_w2),
    )
    first = hypot(
        _of_weight(scheme_w13, dtype),
        _of_flips(4 * UNIT[torch.float32], steps[0]),
        _of_sums(hidden),
    )
    # The sums, silu and the product; gate and up are two errors, silu is 1.1 steep at most.
    between = hypot(1.1 * sqrt(2) * first, sqrt(6) * USUAL * UNIT[dtype])
    second = hypot(
        between,
        _of_flips(between, steps[1]),
        _of_weight(scheme_w2, dtype),
        _of_sums(intermediate),
    )
    spread = hypot(second, sqrt(2) * USUAL * UNIT[dtype])
    step = max(steps)
    columns = min(hidden, intermediate)
    return _tolerance(spread, step, columns, rows * columns)


def of_scores(key_dtype: IndexKeyDtype, dtype: torch.dtype, heads: int, dim: int) -> Tolerance:
    """Of ``paged_mqa_logits``: float32 sums of D products and N heads.

    Args:
        key_dtype: how keys are cached.
        dtype: compute dtype.
        heads: N.
        dim: D.
    """
    is_exact = key_dtype is IndexKeyDtype.COMPUTE or dtype is torch.float32
    # Uniform within half a gap either way, gaps of 2^-3 to 2^-4 of the number.
    query = 0.0 if is_exact else USUAL * QUERY_STEP / 2
    products = 0.0 if dtype is torch.float32 else USUAL * UNIT[torch.float32]
    spread = hypot(query, products, _of_sums(dim + heads))
    return Tolerance(MARGIN * spread, ROW_MARGIN * MARGIN * spread)
