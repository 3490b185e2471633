"""Which projections the device's operators take, and in a few words why not the others."""

# N rows and K columns of a weight, G groups of columns that share a scale.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, assert_never

from mortise.formats.weights import stored_layout
from mortise.plugin import MortiseError, WeightScheme
from mortise_npu_ascend.capabilities import COMPUTE_DTYPES, QUANTISED_DTYPES, SCHEMES
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.layout import padded_group
from mortise_npu_ascend.products import int4_by_int8, int4_made_int8, weight_only

if TYPE_CHECKING:
    import torch

LARGEST_AXIS: Final = 65535
"""Of the last axis of rows and of weights."""

LARGEST_INT8_BY_INT4: Final = 18432
"""Of K where int8 rows meet int4 weights (A2 and A3)."""

MOST_EXPERTS: Final = 1024
"""Groups of one grouped product."""

WORD: Final = 8
"""int4 values in an int32 word, along N."""

_INT4: Final = frozenset({WeightScheme.W4A8, WeightScheme.W4A4, WeightScheme.W4A16})


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What the limits look at.

    Args:
        scheme: how it is stored.
        out_features, in_features: N and K.
        num_groups: G.
        num_parts: parts of N that were separate projections.
        static_input: the checkpoint holds a scale for the input.
    """

    scheme: WeightScheme
    out_features: int
    in_features: int
    num_groups: int = 1
    num_parts: int = 1
    static_input: bool = False


def dtype_problem(compute_dtype: torch.dtype, *schemes: WeightScheme) -> str:
    """Why these schemes cannot be served with this hidden state, or nothing."""
    if compute_dtype not in COMPUTE_DTYPES:
        return f"the compute dtype is {compute_dtype}"
    quantised = [scheme.value for scheme in schemes if scheme is not WeightScheme.FLOAT]
    if quantised and compute_dtype not in QUANTISED_DTYPES:
        return (
            f"the compute dtype is {compute_dtype}, and products with {quantised[0]} weights take"
            " and give bfloat16 on this device"
        )
    return ""


def grouped_problem(projection: Projection, generation: Generation) -> str:
    """Why a projection of experts cannot be served, or nothing."""
    problem = _scheme_problem(projection, generation)
    if problem:
        return problem
    if projection.static_input:
        return "its input has a static scale, and grouped products scale every row by its own"
    # Where rows are padded, a whole number of 64 rows more could be one too many.
    padded = padded_group(projection.out_features, 1, int4_made_int8.MULTIPLE)
    is_padded = projection.scheme is WeightScheme.W4A8 and generation is Generation.A5
    laid_out = replace(projection, out_features=padded) if is_padded else projection
    return axis_problem(laid_out) or _int4_problem(projection, generation)


def axis_problem(projection: Projection, *, pieces: bool = False) -> str:
    """Why a projection is too large, or nothing.

    Args:
        projection: which.
        pieces: N may be cut into pieces.
    """
    if projection.in_features > LARGEST_AXIS:
        return f"its {projection.in_features} columns are more than {LARGEST_AXIS}"
    if projection.out_features > LARGEST_AXIS and not pieces:
        return f"its {projection.out_features} rows are more than {LARGEST_AXIS}"
    return ""


def linear_problem(projection: Projection, generation: Generation) -> str:
    """Why a projection outside the experts cannot be served, or nothing."""
    problem = _scheme_problem(projection, generation) or axis_problem(projection, pieces=True)
    if problem:
        return problem
    if projection.scheme is WeightScheme.W4A16:
        return word_problem(projection) or _weight_only_linear_problem(projection)
    return _int4_problem(projection, generation)


def _scheme_problem(projection: Projection, generation: Generation) -> str:
    scheme = projection.scheme
    if scheme not in SCHEMES[generation]:
        if scheme is WeightScheme.W4A4 and generation is Generation.A5:
            return (
                "its weight is stored as w4a4, and the matrix units of the A5 take no int4 rows;"
                " w4a8 keeps the weights"
            )
        return f"its weight is stored as {scheme.value}"
    return _layout_problem(projection)


def _layout_problem(projection: Projection) -> str:
    """What the format of the scheme itself does not allow."""
    try:
        stored_layout(
            projection.scheme,
            projection.out_features,
            projection.in_features,
            num_groups=projection.num_groups,
            num_parts=projection.num_parts,
            static_input=projection.static_input,
        )
    except MortiseError as error:
        return error.what
    return ""


def word_problem(projection: Projection) -> str:
    """Why int4 cannot be packed along N, or nothing."""
    if projection.out_features % WORD:
        return f"its {projection.out_features} rows are no multiple of {WORD}, and int4 is packed"
    return ""


def _int4_problem(projection: Projection, generation: Generation) -> str:
    if projection.scheme not in _INT4:
        return ""
    problem = word_problem(projection)
    if problem:
        return problem
    size = projection.in_features // projection.num_groups
    match projection.scheme:
        case WeightScheme.W4A8 if generation is Generation.A5:
            return _padding_problem(projection, int4_made_int8.GROUP, LARGEST_AXIS)
        case WeightScheme.W4A8:
            return _padding_problem(projection, int4_by_int8.GROUP, LARGEST_INT8_BY_INT4)
        case WeightScheme.W4A4:
            return f"its groups of {size} columns are odd" if size % 2 else ""
        case WeightScheme.W4A16:
            if projection.num_groups == 1 or weight_only.operator_group(generation, size):
                return ""
            known = ", ".join(map(str, sorted(weight_only.A5_GROUPS)))
            return f"its groups of {size} columns are no multiple of {known}"
        case WeightScheme.FLOAT | WeightScheme.FP8_BLOCK | WeightScheme.W8A8 | WeightScheme.NVFP4:
            return ""
        case _:
            assert_never(projection.scheme)


def _padding_problem(projection: Projection, operator_group: int, largest: int) -> str:
    """Why groups of columns are too many once each is padded to those of the operator."""
    groups, columns = projection.num_groups, projection.in_features
    padded = padded_group(columns, groups, operator_group)
    if groups * padded <= largest:
        return ""
    return (
        f"its {groups} groups of {columns // groups} columns, padded to {padded}, are"
        f" {groups * padded} columns, more than {largest}"
    )


def _weight_only_linear_problem(projection: Projection) -> str:
    size = projection.in_features // projection.num_groups
    if projection.num_groups > 1 and size % 32:
        return f"its groups of {size} columns are no multiple of 32"
    return ""
