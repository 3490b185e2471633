"""Which layers the reference serves: all whose shapes the layouts of their schemes can have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.errors import QuantizationConfigError
from mortise.formats.weights import stored_layout
from mortise.spec.capabilities import Support

if TYPE_CHECKING:
    from mortise.spec.capabilities import ExpertLayerRequest, LinearLayerRequest
    from mortise.spec.weights import WeightScheme

COMPUTE_DTYPES: Final = (torch.float32, torch.bfloat16)
"""Dtypes of the hidden state, best first."""


def of_experts(request: ExpertLayerRequest) -> Support:
    """Ask the layouts of both projections."""
    hidden, intermediate = request.hidden_size, request.intermediate_size
    w13 = _layout_problem(
        request.scheme_w13,
        2 * intermediate,
        hidden,
        num_groups=request.num_groups_w13,
        num_parts=2,
        static_input=request.static_input,
    )
    w2 = _layout_problem(request.scheme_w2, hidden, intermediate, num_groups=request.num_groups_w2)
    return _answer(
        _dtype_problem(request.compute_dtype) or (w13 and f"w13: {w13}") or (w2 and f"w2: {w2}")
    )


def of_projection(request: LinearLayerRequest) -> Support:
    """Ask the layout of the projection."""
    return _answer(
        _dtype_problem(request.compute_dtype)
        or _layout_problem(
            request.scheme,
            request.out_features,
            request.in_features,
            num_groups=request.num_groups,
            static_input=request.static_input,
        )
    )


def _answer(problem: str) -> Support:
    return Support(ok=not problem, reason=problem)


def _dtype_problem(compute_dtype: torch.dtype) -> str:
    return "" if compute_dtype in COMPUTE_DTYPES else f"the compute dtype is {compute_dtype}"


def _layout_problem(
    scheme: WeightScheme,
    out_features: int,
    in_features: int,
    *,
    num_groups: int = 1,
    num_parts: int = 1,
    static_input: bool = False,
) -> str:
    try:
        stored_layout(
            scheme,
            out_features,
            in_features,
            num_groups=num_groups,
            num_parts=num_parts,
            static_input=static_input,
        )
    except QuantizationConfigError as error:
        return error.what
    return ""
