"""Which projections the programs and DeepGEMM take, and in a few words why not the others."""

# N rows and K columns of a weight, G groups of columns that share a scale.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from mortise.formats.fp8 import GROUP
from mortise.formats.weights import stored_layout
from mortise.plugin import MortiseError, ScaleFormat, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.plugin import ExpertLayerRequest, LinearLayerRequest, StoredWeight
    from mortise_cuda_common.runtime import Runtime

COMMON_SCHEMES: Final = frozenset({WeightScheme.FLOAT, WeightScheme.FP8_BLOCK, WeightScheme.W4A16})
"""Schemes that have a program for both generations of the chip."""

COMPUTE_DTYPES: Final = (torch.bfloat16, torch.float32)
QUANTISED_DTYPE: Final = torch.bfloat16
"""The dtype of rows that products with quantised weights take and give."""

WORD: Final = 8
"""int4 values in an int32 word."""

DEEP_GEMM_ROWS: Final = 64
"""Rows of a weight are a multiple of it for DeepGEMM."""

DEEP_GEMM_COLUMNS: Final = GROUP
"""Columns of a float8 weight likewise: no other shape is known to be in use."""

DEEP_GEMM_BF16_COLUMNS: Final = 64
"""Columns of a bfloat16 weight likewise (it asserts ``k % 64 == 0``)."""

MOST_EXPERTS: Final = 1024
"""Local experts: every program of a grouped product loads all their counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What the limits look at.

    Args:
        scheme: how it is stored.
        out_features, in_features: N and K.
        num_groups: G.
        num_parts: parts of N that were separate projections.
        static_input: the checkpoint holds a scale for the input.
        dtype: of unquantised weights.
        scale_format: of the scales of FP8_BLOCK; None where it is not known yet.
    """

    scheme: WeightScheme
    out_features: int
    in_features: int
    num_groups: int = 1
    num_parts: int = 1
    static_input: bool = False
    dtype: torch.dtype = torch.bfloat16
    scale_format: ScaleFormat | None = None


def projection_of(stored: StoredWeight) -> Projection:
    """What the limits look at, of stored tensors ``[..., N, K]``."""
    values_per_element = {torch.int32: WORD, torch.uint8: 2}.get(stored.weight.dtype, 1)
    grouped = stored.weight.dtype is torch.int32 and stored.scale is not None
    return Projection(
        scheme=stored.scheme,
        out_features=stored.weight.shape[-2],
        in_features=stored.weight.shape[-1] * values_per_element,
        num_groups=stored.scale.shape[-1] if grouped and stored.scale is not None else 1,
        num_parts=stored.num_parts,
        static_input=stored.input_scale is not None,
        dtype=stored.weight.dtype if stored.weight.dtype in COMPUTE_DTYPES else QUANTISED_DTYPE,
        scale_format=stored.scale_format if stored.scheme is WeightScheme.FP8_BLOCK else None,
    )


def projections_of(request: ExpertLayerRequest) -> Iterator[tuple[str, Projection]]:
    """Both projections of a layer of experts, by name."""
    hidden, intermediate = request.hidden_size, request.intermediate_size
    yield (
        "w13",
        Projection(
            scheme=request.scheme_w13,
            out_features=2 * intermediate,
            in_features=hidden,
            num_groups=request.num_groups_w13,
            num_parts=2,
            static_input=request.static_input,
            dtype=request.compute_dtype,
        ),
    )
    yield (
        "w2",
        Projection(
            scheme=request.scheme_w2,
            out_features=hidden,
            in_features=intermediate,
            num_groups=request.num_groups_w2,
            # The checkpoint's answer is about w13; a w2 of the same scheme is stored likewise.
            static_input=request.static_input and request.scheme_w2 is request.scheme_w13,
            dtype=request.compute_dtype,
        ),
    )


def linear_projection(request: LinearLayerRequest) -> Projection:
    """The projection that a backend is asked about."""
    return Projection(
        scheme=request.scheme,
        out_features=request.out_features,
        in_features=request.in_features,
        num_groups=request.num_groups,
        static_input=request.static_input,
        dtype=request.compute_dtype,
    )


def dtype_problem(compute_dtype: torch.dtype, *schemes: WeightScheme) -> str:
    """Why these schemes cannot be served with this hidden state, or nothing."""
    if compute_dtype not in COMPUTE_DTYPES:
        return f"the compute dtype is {compute_dtype}"
    quantised = [scheme.value for scheme in schemes if scheme is not WeightScheme.FLOAT]
    if quantised and compute_dtype is not QUANTISED_DTYPE:
        return (
            f"the compute dtype is {compute_dtype}, and products with {quantised[0]} weights take"
            " and give bfloat16 on this device"
        )
    return ""


def count_problem(num_local_experts: int) -> str:
    """Why so many experts of a rank cannot be served, or nothing."""
    if num_local_experts > MOST_EXPERTS:
        return f"{num_local_experts} experts of a rank are more than {MOST_EXPERTS}"
    return ""


def layout_problem(projection: Projection) -> str:
    """What the format of the scheme or its program does not allow, or nothing."""
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
    columns = projection.in_features // projection.num_groups
    if projection.scheme is WeightScheme.W4A16 and columns % WORD:
        return f"its groups of {columns} columns are no whole words of {WORD}"
    return ""


def deep_gemm_problem(projection: Projection, runtime: Runtime) -> str:
    """Why DeepGEMM does not multiply by a projection, or nothing.

    Scales that are not powers of two are none on Blackwell here: see
    :func:`needs_powers_of_two`.
    """
    if projection.scheme not in {WeightScheme.FLOAT, WeightScheme.FP8_BLOCK}:
        return f"it has no product with {projection.scheme.value} weights"
    if projection.scheme is WeightScheme.FLOAT and projection.dtype is not torch.bfloat16:
        return f"it has no product of {projection.dtype}"
    if runtime.deep_gemm is None:
        return runtime.no_deep_gemm or "it is not there"
    return _deep_gemm_shape_problem(projection)


def _deep_gemm_shape_problem(projection: Projection) -> str:
    is_fp8 = projection.scheme is WeightScheme.FP8_BLOCK
    rows, columns = projection.out_features, projection.in_features
    multiple = DEEP_GEMM_COLUMNS if is_fp8 else DEEP_GEMM_BF16_COLUMNS
    if columns % multiple:
        return f"{columns} columns are no multiple of {multiple}"
    if rows % DEEP_GEMM_ROWS:
        return f"{rows} rows are no multiple of {DEEP_GEMM_ROWS}"
    part = rows // projection.num_parts
    if is_fp8 and projection.num_parts > 1 and part % GROUP:
        return f"its blocks of {GROUP} rows begin anew after {part}, and DeepGEMM's do not"
    return ""


def needs_powers_of_two(projection: Projection, runtime: Runtime) -> bool:
    """Whether DeepGEMM multiplies by it only once its scales were made powers of two."""
    is_fp8 = projection.scheme is WeightScheme.FP8_BLOCK
    is_other = projection.scale_format is ScaleFormat.FLOAT32
    return runtime.chip.architecture.is_blackwell and is_fp8 and is_other
