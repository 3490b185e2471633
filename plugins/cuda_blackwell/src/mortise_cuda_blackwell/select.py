"""From a stored weight to its product on Blackwell: NVFP4 here, all others as on every chip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import BackendUnusableError, ReasonCode, WeightScheme
from mortise_cuda_blackwell.capabilities import SCHEMES
from mortise_cuda_blackwell.layout import Nvfp4Weight
from mortise_cuda_blackwell.products.nvfp4 import Nvfp4Product, Nvfp4WeightOnlyProduct
from mortise_cuda_common.choice import Runner
from mortise_cuda_common.limits import projection_of
from mortise_cuda_common.products.select import Products

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_cuda_common.limits import Projection
    from mortise_cuda_common.products.base import Product
    from mortise_cuda_common.runtime import Runtime


class BlackwellProducts(Products):
    """What one model role multiplies by on Blackwell.

    Args:
        runtime: the chip and what computes on it.
        runner: what the configuration asks for of other schemes than NVFP4.
    """

    def __init__(self, runtime: Runtime, runner: str = Runner.AUTO) -> None:
        super().__init__(runtime, runner, SCHEMES)

    def of(self, stored: StoredWeight) -> Product:
        """Lay out the weight ``[E_l, N, K]`` of local experts, or ``[N, K]`` as of a single one.

        Raises:
            BackendUnusableError: nothing multiplies by it, or not what was asked for.
        """
        if stored.scheme is not WeightScheme.NVFP4:
            return super().of(stored)
        if problem := self.problem(projection_of(stored)):
            raise BackendUnusableError(
                problem,
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                remedy="use a checkpoint that the device serves, or backend reference",
            )
        if stored.input_scale is None:
            return Nvfp4WeightOnlyProduct(self.runtime.programs, Nvfp4Weight.of(stored))
        return Nvfp4Product.of(self.runtime.programs, stored)

    def describe(self, projection: Projection) -> str:
        """What multiplies by a projection of experts, and why, in words."""
        if projection.scheme is not WeightScheme.NVFP4:
            return super().describe(projection)
        if projection.static_input:
            return "triton (fp4 units)"
        return "triton (bf16 units: the checkpoint has no scale for the input)"
