"""The backend class of the Ascend NPU: each hook hands over to the module that answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import Backend, BindContext, DeviceProbe, hookimpl
from mortise_npu_ascend import attention, dispatch, doctor, moe, support, vendor, weights
from mortise_npu_ascend import linear as projections
from mortise_npu_ascend.capabilities import capabilities_of
from mortise_npu_ascend.environment import read_environment
from mortise_npu_ascend.exchanges import Exchanges
from mortise_npu_ascend.options import read_options
from mortise_npu_ascend.qkv import QKVSplitter

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mortise.plugin import (
        Capabilities,
        DispatchDecision,
        DispatchedTokens,
        DispatchRequest,
        DoctorRequest,
        ExpertLayerRequest,
        ExpertWeights,
        Finding,
        ForwardMode,
        IndexKeyPages,
        LinearLayerRequest,
        LinearWeight,
        NotSupported,
        PagedMQAMetadata,
        QKVParts,
        QKVShape,
        Support,
        TokenDispatcher,
        TokenDispatcherRequest,
    )
    from mortise_npu_ascend.environment import VendorEnvironment
    from mortise_npu_ascend.options import Options
    from mortise_npu_ascend.vendor import Vendor


class AscendBackend(Backend):
    """torch_npu's operators, on a device or emulated on the CPU; one object per model role.

    Args:
        loaded: the operators and their device.
        options: the checked table of the configuration.
        environment: what the vendor's libraries find.
    """

    def __init__(self, loaded: Vendor, options: Options, environment: VendorEnvironment) -> None:
        self._vendor = loaded
        self._capabilities = capabilities_of(loaded, options.num_workers)
        self._exchanges = Exchanges(loaded, options.exchange, environment)
        self._splitter = QKVSplitter.of(loaded, use_triton=options.triton)

    @classmethod
    def probe(cls) -> DeviceProbe:
        """Load torch_npu and ask the first device for its name."""
        return vendor.probe()

    @classmethod
    def doctor(cls, request: DoctorRequest) -> Sequence[Finding]:
        """Compare libraries, variables and HCCL's buffer with the run; nothing is imported."""
        return tuple(doctor.findings(request, read_environment()))

    @classmethod
    def create(cls, context: BindContext) -> AscendBackend:
        """Load torch_npu, or the emulator if ``device`` is ``emulated``."""
        options = read_options(context.options)
        loaded = vendor.load(context.device, options, context.local_rank)
        return cls(loaded, options, read_environment())

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
    def create_token_dispatcher(
        self, request: TokenDispatcherRequest
    ) -> TokenDispatcher | NotSupported:
        """Exchange rows by routing operators, by DeepEP, or leave it to the core."""
        return self._exchanges.create_token_dispatcher(request)

    @hookimpl
    def paged_mqa_metadata(
        self, context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode
    ) -> PagedMQAMetadata:
        """Own the lengths; nothing is planned."""
        return attention.paged_mqa_metadata(context_lens, block_size, num_workers, mode)

    @hookimpl
    def paged_mqa_logits(
        self,
        query: torch.Tensor,
        key_pages: IndexKeyPages,
        weights: torch.Tensor,
        page_table: torch.Tensor,
        metadata: PagedMQAMetadata,
    ) -> torch.Tensor:
        """Score the cached keys as the chip's own indexer does."""
        return attention.paged_mqa_logits(query, key_pages, weights, page_table, metadata)

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

    @hookimpl
    def qkv_split(
        self, projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape
    ) -> QKVParts:
        """Cut the projections by a Triton program, where there is Triton."""
        return self._splitter.split(projected_qkvz, projected_ba, shape)
