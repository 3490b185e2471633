"""The backend class of the Ascend NPU: each hook hands over to the module that answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import Backend, BindContext, DeviceProbe, hookimpl
from mortise_npu_ascend import dispatch, moe, support, vendor, weights
from mortise_npu_ascend import linear as projections
from mortise_npu_ascend.capabilities import capabilities_of
from mortise_npu_ascend.options import read_options

if TYPE_CHECKING:
    import torch

    from mortise.plugin import (
        Capabilities,
        DispatchDecision,
        DispatchedTokens,
        DispatchRequest,
        ExpertLayerRequest,
        ExpertWeights,
        LinearLayerRequest,
        LinearWeight,
        Support,
    )
    from mortise_npu_ascend.options import Options
    from mortise_npu_ascend.vendor import Vendor


class AscendBackend(Backend):
    """torch_npu's operators, on a device or emulated on the CPU; one object per model role.

    Args:
        loaded: the operators and their device.
        options: the checked table of the configuration.
    """

    def __init__(self, loaded: Vendor, options: Options) -> None:
        self._vendor = loaded
        self._capabilities = capabilities_of(loaded, options.num_workers)

    @classmethod
    def probe(cls) -> DeviceProbe:
        """Load torch_npu and ask the first device for its name."""
        return vendor.probe()

    @classmethod
    def create(cls, context: BindContext) -> AscendBackend:
        """Load torch_npu, or the emulator if ``device`` is ``emulated``."""
        options = read_options(context.options)
        return cls(vendor.load(context.device, options, context.local_rank), options)

    def capabilities(self) -> Capabilities:
        """Facts of the chip's generation."""
        return self._capabilities

    def supports(self, request: ExpertLayerRequest) -> Support:
        """Serve experts whose products the operators of this generation take."""
        return support.of_experts(request, self._vendor.generation)

    def supports_linear(self, request: LinearLayerRequest) -> Support:
        """Serve projections that the operators of this generation take."""
        return support.of_projection(request, self._vendor.generation)

    @hookimpl
    def resolve_dispatch_dtype(self, request: DispatchRequest) -> DispatchDecision:
        """Answer by the order of authority and the generation's policy."""
        return dispatch.resolve_dispatch_dtype(request, self._vendor.generation)

    @hookimpl
    def prepare_expert_weights(
        self, experts: ExpertWeights, decision: DispatchDecision
    ) -> ExpertWeights:
        """Transpose, pack and tile both projections."""
        return weights.prepare_expert_weights(self._vendor, experts)

    @hookimpl
    def prepare_linear_weight(self, linear: LinearWeight) -> LinearWeight:
        """Transpose, pack and tile one projection."""
        return projections.prepare_linear_weight(self._vendor, linear)

    @hookimpl
    def quantized_moe_apply(
        self, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Run all experts at once."""
        return moe.quantized_moe_apply(self._vendor, tokens, experts, out_dtype)

    @hookimpl
    def quantized_linear(
        self, rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply rows by one projection."""
        return projections.quantized_linear(self._vendor, rows, linear, out_dtype)
