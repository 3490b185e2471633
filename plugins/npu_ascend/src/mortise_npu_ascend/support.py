"""Which layers the device serves, said before a layer is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import Support
from mortise_npu_ascend.limits import (
    MOST_EXPERTS,
    Projection,
    dtype_problem,
    grouped_problem,
    linear_problem,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.plugin import ExpertLayerRequest, LinearLayerRequest
    from mortise_npu_ascend.dispatch import Generation


def of_experts(request: ExpertLayerRequest, generation: Generation) -> Support:
    """Whether both products and their dtype can be had."""
    return _answer(next(_problems_of_experts(request, generation), ""))


def of_projection(request: LinearLayerRequest, generation: Generation) -> Support:
    """Whether a projection outside the experts can be multiplied."""
    return _answer(
        dtype_problem(request.compute_dtype, request.scheme)
        or linear_problem(
            Projection(
                scheme=request.scheme,
                out_features=request.out_features,
                in_features=request.in_features,
                num_groups=request.num_groups,
                static_input=request.static_input,
            ),
            generation,
        )
    )


def _problems_of_experts(request: ExpertLayerRequest, generation: Generation) -> Iterator[str]:
    hidden, intermediate = request.hidden_size, request.intermediate_size
    if problem := dtype_problem(request.compute_dtype, request.scheme_w13, request.scheme_w2):
        yield problem
    if request.num_local_experts > MOST_EXPERTS:
        yield f"{request.num_local_experts} experts of a rank are more than {MOST_EXPERTS}"
    w13 = Projection(
        scheme=request.scheme_w13,
        out_features=2 * intermediate,
        in_features=hidden,
        num_groups=request.num_groups_w13,
        num_parts=2,
        static_input=request.static_input,
    )
    w2 = Projection(
        scheme=request.scheme_w2,
        out_features=hidden,
        in_features=intermediate,
        num_groups=request.num_groups_w2,
    )
    for name, projection in (("w13", w13), ("w2", w2)):
        if problem := grouped_problem(projection, generation):
            yield f"{name}: {problem}"


def _answer(problem: str) -> Support:
    return Support(ok=not problem, reason=problem)
