"""From a stored weight to its product on Blackwell: NVFP4 here, all others as on every chip."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from mortise.plugin import BackendUnusableError, ReasonCode, WeightScheme
from mortise_cuda_blackwell.capabilities import SCHEMES
from mortise_cuda_blackwell.layout import Nvfp4Weight
from mortise_cuda_blackwell.products.nvfp4 import Nvfp4Product, Nvfp4WeightOnlyProduct
from mortise_cuda_blackwell.products.nvfp4_flashinfer import Nvfp4FlashInferProduct
from mortise_cuda_common.choice import Runner
from mortise_cuda_common.limits import projection_of
from mortise_cuda_common.products.select import Products

if TYPE_CHECKING:
    from mortise.plugin import StoredWeight
    from mortise_cuda_blackwell.libraries.flashinfer import FlashInfer
    from mortise_cuda_common.choice import Measurement
    from mortise_cuda_common.limits import Projection
    from mortise_cuda_common.products.base import Product
    from mortise_cuda_common.runtime import Runtime


class BlackwellProducts(Products):
    """What one model role multiplies by on Blackwell.

    Args:
        runtime: the chip and what computes on it.
        runner: what the configuration asks for of other schemes than NVFP4.
        flash_infer: what NVFP4 rows in slots are multiplied by; None is Triton.
        measurements: figures that choose between DeepGEMM and Triton; None are the published ones.
    """

    def __init__(
        self,
        runtime: Runtime,
        runner: str = Runner.AUTO,
        flash_infer: FlashInfer | None = None,
        measurements: tuple[Measurement, ...] | None = None,
    ) -> None:
        super().__init__(runtime, runner, SCHEMES, measurements)
        self._flash_infer = flash_infer

    def of(self, stored: StoredWeight) -> Product:
        """Lay out the weight ``[E_l, N, K]`` of local experts, or ``[N, K]`` as of a single one.

        Warns:
            RuntimeWarning: FlashInfer was asked for and does not take these experts; why.

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
        product = Nvfp4Product.of(self.runtime.programs, stored)
        if self._flash_infer is None or stored.weight.dim() == 2:
            return product
        if problem := self._flash_infer.problem(product.weight):
            warnings.warn(
                "FlashInfer does not multiply some NVFP4 experts, this backend's own Triton"
                f" programs do: {problem}",
                RuntimeWarning,
                stacklevel=2,
            )
            return product
        return Nvfp4FlashInferProduct(
            product.programs,
            product.weight,
            product.input_scales,
            product.alphas,
            self._flash_infer,
        )

    def describe(self, projection: Projection) -> str:
        """What multiplies by a projection of experts, and why, in words."""
        if projection.scheme is not WeightScheme.NVFP4:
            return super().describe(projection)
        if projection.static_input:
            slots = "flashinfer where rows come in slots, else " if self._flash_infer else ""
            return f"{slots}triton (fp4 units)"
        return "triton (bf16 units: the checkpoint has no scale for the input)"
