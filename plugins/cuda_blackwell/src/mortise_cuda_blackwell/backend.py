"""The backend class of the NVIDIA Blackwell GPU: each hook hands over to what answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.plugin import Backend, BindContext, DeviceProbe, hookimpl
from mortise_cuda_blackwell import dispatch
from mortise_cuda_blackwell.capabilities import ARCHITECTURES, NAME, capabilities_of
from mortise_cuda_blackwell.loading import (
    library_choices,
    library_findings,
    load_flash_infer,
)
from mortise_cuda_blackwell.local import Nvfp4Dispatcher, carries
from mortise_cuda_blackwell.options import Options
from mortise_cuda_blackwell.select import BlackwellProducts
from mortise_cuda_common import doctor, loading, moe, qkv
from mortise_cuda_common import linear as projections
from mortise_cuda_common.choice import read_measurements
from mortise_cuda_common.decisions import decisions
from mortise_cuda_common.exchanges import Exchanges
from mortise_cuda_common.experts import prepare_expert_weights
from mortise_cuda_common.indexer import Indexer
from mortise_cuda_common.options import read_options
from mortise_cuda_common.warmup import launches

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mortise.plugin import (
        BackendChoice,
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
        WarmupJob,
        WarmupRequest,
    )
    from mortise_cuda_blackwell.libraries.flashinfer import FlashInfer
    from mortise_cuda_common.runtime import Runtime


class BlackwellBackend(Backend):
    """Triton programs, DeepGEMM and DeepEP, on a GPU or emulated; one object per model role.

    Args:
        runtime: the chip and what computes on it.
        options: the checked table of the configuration.
        flash_infer: FlashInfer, where the configuration asks for it.
    """

    def __init__(
        self, runtime: Runtime, options: Options, flash_infer: FlashInfer | None = None
    ) -> None:
        self._runtime = runtime
        self._flash_infer = flash_infer
        self._capabilities = capabilities_of(runtime, options)
        figures = read_measurements(options.runner_figures)
        self._products = BlackwellProducts(runtime, options.runner, flash_infer, figures)
        self._indexer = Indexer(runtime, options.indexer)
        self._exchanges = Exchanges(runtime, options.exchange, NAME)

    @classmethod
    def probe(cls) -> DeviceProbe:
        """Ask torch for the first GPU, and import DeepGEMM."""
        return loading.probe(ARCHITECTURES)

    @classmethod
    def doctor(cls, request: DoctorRequest) -> Sequence[Finding]:
        """Compare libraries and variables with the run; nothing is imported."""
        options = read_options(Options, NAME, request.options)
        findings = doctor.findings(request, options, options.architecture)
        return (*findings, *library_findings(request, options))

    @classmethod
    def create(cls, context: BindContext) -> BlackwellBackend:
        """Find the GPU and load the libraries, or their emulation if ``device`` is ``emulated``."""
        options = read_options(Options, NAME, context.options)
        runtime = loading.load_runtime(
            NAME, options.architectures, context, options, options.architecture
        )
        return cls(runtime, options, load_flash_infer(runtime, options))

    def capabilities(self) -> Capabilities:
        """Facts of the chip."""
        return self._capabilities

    def choices(self) -> Sequence[BackendChoice]:
        """Tell which libraries serve."""
        return (*decisions(self._runtime), *library_choices(self._flash_infer))

    def supports(self, request: ExpertLayerRequest) -> Support:
        """Serve experts that DeepGEMM or the Triton programs multiply."""
        return self._products.support(request)

    def supports_linear(self, request: LinearLayerRequest) -> Support:
        """Serve projections that they multiply."""
        return self._products.support_linear(request)

    def warmup(self, request: WarmupRequest) -> Sequence[WarmupJob]:
        """Compile what the model will launch; an emulated chip compiles nothing."""
        return [] if self._runtime.emulated else launches(self, self._runtime.device, request)

    @hookimpl
    def resolve_dispatch_dtype(self, request: DispatchRequest) -> DispatchDecision:
        """Answer by the order of authority and the chip's policy."""
        return dispatch.resolve_dispatch_dtype(request, self._products.alignment)

    @hookimpl
    def prepare_expert_weights(
        self, experts: ExpertWeights, decision: DispatchDecision
    ) -> ExpertWeights:
        """Lay both projections out for what multiplies them."""
        return prepare_expert_weights(self._products, experts)

    @hookimpl
    def prepare_linear_weight(self, linear: LinearWeight) -> LinearWeight:
        """Lay one projection out."""
        return projections.prepare_linear_weight(self._products, linear)

    @hookimpl
    def create_token_dispatcher(
        self, request: TokenDispatcherRequest
    ) -> TokenDispatcher | NotSupported:
        """Exchange rows by Triton programs, by DeepEP, or leave it to the core."""
        if carries(request):
            return Nvfp4Dispatcher(self._runtime, request)
        return self._exchanges.create_token_dispatcher(request)

    @hookimpl
    def paged_mqa_metadata(
        self, context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode
    ) -> PagedMQAMetadata:
        """Own the lengths and the schedule made from them."""
        return self._indexer.metadata(context_lens, block_size, num_workers, mode)

    @hookimpl
    def paged_mqa_logits(
        self,
        query: torch.Tensor,
        key_pages: IndexKeyPages,
        weights: torch.Tensor,
        page_table: torch.Tensor,
        metadata: PagedMQAMetadata,
    ) -> torch.Tensor:
        """Score the cached keys."""
        return self._indexer.logits(query, key_pages, weights, page_table, metadata)

    @hookimpl
    def quantized_moe_apply(
        self, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Run all experts at once."""
        return moe.quantized_moe_apply(self._products, tokens, experts, out_dtype)

    @hookimpl
    def quantized_linear(
        self, rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply rows by one projection."""
        return projections.quantized_linear(self._products, rows, linear, out_dtype)

    @hookimpl
    def qkv_split(
        self, projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape
    ) -> QKVParts:
        """Cut the projections by one Triton program."""
        return qkv.split(self._runtime, projected_qkvz, projected_ba, shape)
