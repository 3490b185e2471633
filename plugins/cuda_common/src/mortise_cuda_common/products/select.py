"""From a stored weight to its product on one chip, and which weights have one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

import torch

from mortise.formats.weights import dequantise_weight, quantise_weight
from mortise.plugin import (
    BackendUnusableError,
    ExpertMethod,
    ReasonCode,
    ScaleFormat,
    Support,
    WeightScheme,
    ordinary_method,
)
from mortise_cuda_common.choice import Choice, Runner, choice, read_measurements
from mortise_cuda_common.limits import (
    COMMON_SCHEMES,
    count_problem,
    deep_gemm_problem,
    dtype_problem,
    layout_problem,
    linear_projection,
    needs_powers_of_two,
    projection_of,
    projections_of,
)
from mortise_cuda_common.products.chosen import ChosenProduct
from mortise_cuda_common.products.exact import ExactProduct
from mortise_cuda_common.products.fp8_deep_gemm import Fp8DeepGemmProduct
from mortise_cuda_common.products.fp8_triton import Fp8TritonProduct
from mortise_cuda_common.products.int4 import Int4Product
from mortise_cuda_common.products.plain import PlainProduct
from mortise_cuda_common.products.plain_deep_gemm import PlainDeepGemmProduct

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.plugin import ExpertLayerRequest, LinearLayerRequest, StoredWeight
    from mortise_cuda_common.choice import Measurement
    from mortise_cuda_common.limits import Projection
    from mortise_cuda_common.products.base import Product
    from mortise_cuda_common.runtime import Runtime


class Products:
    """What one model role multiplies by.

    A backend whose chip has a scheme more overrides :meth:`of` and :meth:`scheme_problem`.

    Args:
        runtime: the chip and what computes on it.
        runner: what the configuration asks for: ``auto``, ``deep_gemm`` or ``triton``.
        schemes: those that the backend serves.
        measurements: figures that choose between the two; None are the published ones.
    """

    def __init__(
        self,
        runtime: Runtime,
        runner: str = Runner.AUTO,
        schemes: frozenset[WeightScheme] = COMMON_SCHEMES,
        measurements: tuple[Measurement, ...] | None = None,
    ) -> None:
        self.runtime = runtime
        self.runner = Runner(runner)
        self.schemes = schemes
        self.measurements = read_measurements() if measurements is None else measurements

    @property
    def alignment(self) -> int:
        """Rows to which groups are best padded on their way: no product has to move them then."""
        deep_gemm = self.runtime.deep_gemm
        return 1 if deep_gemm is None or self.runner is Runner.TRITON else deep_gemm.alignment()

    def of(self, stored: StoredWeight) -> Product:
        """Lay out the weight ``[E_l, N, K]`` of local experts, or ``[N, K]`` as of a single one.

        Raises:
            BackendUnusableError: nothing multiplies by it, or not what was asked for.
        """
        projection = projection_of(stored)
        if problem := self.problem(projection):
            raise BackendUnusableError(
                problem,
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                remedy="use a checkpoint or a runner that the device serves, or backend reference",
            )
        is_single = stored.weight.dim() == 2
        experts = _as_single_expert(stored) if is_single else stored
        match stored.scheme:
            case WeightScheme.FLOAT:
                return self._float(experts, projection)
            case WeightScheme.FP8_BLOCK:
                return self._fp8(experts, projection, is_single=is_single)
            case WeightScheme.W4A16:
                return self._int4(experts)
            case WeightScheme.W8A8 | WeightScheme.W4A8 | WeightScheme.W4A4 | WeightScheme.NVFP4:
                raise AssertionError(f"{stored.scheme} is none of {COMMON_SCHEMES}")
            case _:
                assert_never(stored.scheme)

    def problem(self, projection: Projection) -> str:
        """Why a projection cannot be served as the configuration asks, or nothing."""
        return self.scheme_problem(projection) or self._runner_problem(projection)

    def scheme_problem(self, projection: Projection) -> str:
        """Why a projection cannot be served by anything, or nothing."""
        if projection.scheme not in self.schemes:
            return f"its weight is stored as {projection.scheme.value}"
        if projection.static_input and projection.scheme in COMMON_SCHEMES:
            return "its input has a static scale, and rows are scaled by their own here"
        return layout_problem(projection)

    def support(self, request: ExpertLayerRequest) -> Support:
        """Whether a layer's experts can be served, by what and with which rows."""
        problem = next(self._problems(request), "")
        return Support(
            ok=not problem, reason=problem, method=None if problem else self.method(request)
        )

    def support_linear(self, request: LinearLayerRequest) -> Support:
        """Whether a projection outside the experts can be served."""
        problem = dtype_problem(request.compute_dtype, request.scheme)
        problem = problem or self.problem(linear_projection(request))
        return Support(ok=not problem, reason=problem)

    def method(self, request: ExpertLayerRequest) -> ExpertMethod:
        """Rows as experts of their scheme ordinarily take them; what multiplies them is named."""
        method = ordinary_method(
            request.scheme_w13, request.compute_dtype, static_input=request.static_input
        )
        ways = {name: self.describe(one) for name, one in projections_of(request)}
        same = len(set(ways.values())) == 1
        text = ways["w13"] if same else "; ".join(f"{name}: {way}" for name, way in ways.items())
        return replace(method, runner=text)

    def describe(self, projection: Projection) -> str:
        """What multiplies by a projection of experts, and why, in words."""
        if projection.scheme is WeightScheme.FLOAT and projection.dtype is torch.float32:
            return "torch"
        problem = deep_gemm_problem(projection, self.runtime)
        if self.runner is Runner.DEEP_GEMM and not problem:
            return "deep_gemm (asked for)" + self._said_of_scales(projection)
        if projection.scheme is not WeightScheme.FP8_BLOCK:
            return "triton"
        if self.runner is Runner.TRITON:
            return "triton (asked for)"
        if problem:
            return f"triton (DeepGEMM: {problem})"
        way = self._choice(projection).describe()
        is_open = projection.scale_format is None and self.runtime.chip.architecture.is_blackwell
        if is_open and Runner.DEEP_GEMM in way:
            return f"{way}; triton where scales are no powers of two"
        return way

    def _said_of_scales(self, projection: Projection) -> str:
        is_fp8 = projection.scheme is WeightScheme.FP8_BLOCK
        if is_fp8 and self.runtime.chip.architecture.is_blackwell:
            return "; weights whose scales are no powers of two are quantised again"
        return ""

    def _problems(self, request: ExpertLayerRequest) -> Iterator[str]:
        yield from filter(
            None,
            (
                dtype_problem(request.compute_dtype, request.scheme_w13, request.scheme_w2),
                count_problem(request.num_local_experts),
            ),
        )
        for name, projection in projections_of(request):
            if problem := self.problem(projection):
                yield f"{name}: {problem}"

    def _runner_problem(self, projection: Projection) -> str:
        """What DeepGEMM has products for must be left to it where that was asked for."""
        has_products = projection.scheme is WeightScheme.FP8_BLOCK or (
            projection.scheme is WeightScheme.FLOAT and projection.dtype is torch.bfloat16
        )
        if self.runner is not Runner.DEEP_GEMM or not has_products:
            return ""
        problem = deep_gemm_problem(projection, self.runtime)
        return problem and f"runner is deep_gemm, and DeepGEMM cannot multiply by it: {problem}"

    def _float(self, stored: StoredWeight, projection: Projection) -> Product:
        weight = stored.weight.detach().contiguous()
        if projection.dtype is torch.float32:
            return ExactProduct(weight)
        programs, deep_gemm = self.runtime.programs, self.runtime.deep_gemm
        if self.runner is Runner.DEEP_GEMM:
            assert deep_gemm is not None, "its absence is a problem"
            return PlainDeepGemmProduct(programs, deep_gemm, weight)
        return PlainProduct(programs, weight)

    def _int4(self, stored: StoredWeight) -> Product:
        return Int4Product(
            self.runtime.programs, stored.weight.detach().contiguous(), _scale(stored)
        )

    def _fp8(self, stored: StoredWeight, projection: Projection, *, is_single: bool) -> Product:
        if self.runner is Runner.DEEP_GEMM:
            return self._fp8_deep_gemm(stored)
        triton = self._fp8_triton(stored)
        is_triton = self.runner is Runner.TRITON or deep_gemm_problem(projection, self.runtime)
        # Exactly what is stored, rather than what the faster library would make of it.
        if is_triton or needs_powers_of_two(projection, self.runtime):
            return triton
        if is_single:
            # Faster in every published figure of a single product (sgl-project/sglang#3893).
            return self._fp8_deep_gemm(stored)
        return ChosenProduct(self._fp8_deep_gemm(stored), triton, self._choice(projection))

    def _fp8_triton(self, stored: StoredWeight) -> Fp8TritonProduct:
        return Fp8TritonProduct(
            programs=self.runtime.programs,
            weight=stored.weight.detach().contiguous(),
            scale=_scale(stored),
            scale_format=stored.scale_format,
            num_parts=stored.num_parts,
        )

    def _fp8_deep_gemm(self, stored: StoredWeight) -> Fp8DeepGemmProduct:
        deep_gemm = self.runtime.deep_gemm
        assert deep_gemm is not None, "its absence is a problem"
        if needs_powers_of_two(projection_of(stored), self.runtime):
            stored = _with_powers_of_two(stored)
        weight = stored.weight.detach().contiguous()
        return Fp8DeepGemmProduct(
            programs=self.runtime.programs,
            deep_gemm=deep_gemm,
            weight=weight,
            scale=deep_gemm.prepare_weight_scale(_scale(stored), *weight.shape[-2:]),
            scale_format=stored.scale_format,
            only_powers_of_two=self.runtime.chip.architecture.is_blackwell,
        )

    def _choice(self, projection: Projection) -> Choice:
        is_w13 = projection.num_parts > 1
        intermediate = projection.out_features // 2 if is_w13 else projection.in_features
        return choice(self.measurements, self.runtime.chip.name, intermediate)


def _as_single_expert(stored: StoredWeight) -> StoredWeight:
    scale = None if stored.scale is None else stored.scale.unsqueeze(0)
    return replace(stored, weight=stored.weight.unsqueeze(0), scale=scale)


def _scale(stored: StoredWeight) -> torch.Tensor:
    assert stored.scale is not None, "a quantised weight has scales"
    return stored.scale.detach().contiguous()


def _with_powers_of_two(stored: StoredWeight) -> StoredWeight:
    """Dequantise and quantise again, one expert after the other: float32 of one of them at most."""
    experts = [
        quantise_weight(
            dequantise_weight(_expert(stored, number)),
            stored.scheme,
            scale_format=ScaleFormat.UE8M0,
            num_parts=stored.num_parts,
        )
        for number in range(len(stored.weight))
    ]
    return replace(
        stored,
        weight=torch.stack([expert.weight for expert in experts]),
        scale=torch.stack([_scale(expert) for expert in experts]),
        scale_format=ScaleFormat.UE8M0,
    )


def _expert(stored: StoredWeight, number: int) -> StoredWeight:
    return replace(stored, weight=stored.weight[number], scale=_scale(stored)[number])
