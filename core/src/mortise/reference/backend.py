"""The backend class of the reference: each hook hands over to the function of the same name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import (
    Backend,
    BindContext,
    Capabilities,
    ConfigError,
    DispatchDtype,
    IndexKeyDtype,
    Support,
    WeightScheme,
    hookimpl,
)
from mortise.reference import attention, dispatch, moe, projections, qkv, support
from mortise.reference.support import COMPUTE_DTYPES

if TYPE_CHECKING:
    from mortise.plugin import (
        DispatchDecision,
        DispatchedTokens,
        DispatchRequest,
        ExpertLayerRequest,
        ExpertWeights,
        ForwardMode,
        IndexKeyPages,
        LinearLayerRequest,
        LinearWeight,
        NotSupported,
        PagedMQAMetadata,
        QKVParts,
        QKVShape,
        TokenDispatcher,
        TokenDispatcherRequest,
    )

DEFAULT_DEVICE: Final = "cpu"
DEFAULT_NUM_WORKERS: Final = 4
SCHEMES: Final = frozenset(WeightScheme)
PAGE_SIZE: Final = 64


class ReferenceBackend(Backend):
    """Plain torch on one torch device.

    Args:
        device: where its tensors live.
        num_workers: workers that a schedule is split among; the result does not depend on it.
    """

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self._capabilities = Capabilities(
            device=device,
            emulated=False,
            schemes=SCHEMES,
            dispatch_dtypes=frozenset(DispatchDtype),
            compute_dtypes=COMPUTE_DTYPES,
            page_sizes=frozenset({PAGE_SIZE}),
            num_workers=num_workers,
            index_key_dtypes=(IndexKeyDtype.COMPUTE, IndexKeyDtype.FP8_E4M3),
        )

    @classmethod
    def create(cls, context: BindContext) -> ReferenceBackend:
        """Check the options; ``num_workers`` is the only one."""
        options = dict(context.options)
        num_workers = options.pop("num_workers", DEFAULT_NUM_WORKERS)
        if options:
            raise ConfigError(
                f"unknown options of backend reference: {', '.join(sorted(options))}",
                expected="num_workers",
                remedy="remove them",
            )
        # True is an int to Python, and no number to a reader.
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
            raise ConfigError(
                f"option num_workers of backend reference is {num_workers!r}",
                expected="an integer of at least 1",
            )
        return cls(_usable_device(context.device or DEFAULT_DEVICE), num_workers)

    def capabilities(self) -> Capabilities:
        """Facts of plain torch: every scheme, every format of rows."""
        return self._capabilities

    def supports(self, request: ExpertLayerRequest) -> Support:
        """Serve experts of every scheme whose shapes their layouts can have."""
        return support.of_experts(request)

    def supports_linear(self, request: LinearLayerRequest) -> Support:
        """Serve projections of every scheme whose shapes their layouts can have."""
        return support.of_projection(request)

    @hookimpl
    def resolve_dispatch_dtype(self, request: DispatchRequest) -> DispatchDecision:
        """Answer by the order of authority."""
        return dispatch.resolve_dispatch_dtype(request)

    @hookimpl
    def prepare_expert_weights(
        self, experts: ExpertWeights, decision: DispatchDecision
    ) -> ExpertWeights:
        """Widen quantised weights once."""
        return moe.prepare_expert_weights(experts, decision)

    @hookimpl
    def prepare_linear_weight(self, linear: LinearWeight) -> LinearWeight:
        """Widen the weight once."""
        return projections.prepare_linear_weight(linear)

    @hookimpl
    def create_token_dispatcher(
        self, request: TokenDispatcherRequest
    ) -> TokenDispatcher | NotSupported:
        """Serve one process."""
        return dispatch.create_token_dispatcher(request)

    @hookimpl
    def paged_mqa_metadata(
        self, context_lens: torch.Tensor, block_size: int, num_workers: int, mode: ForwardMode
    ) -> PagedMQAMetadata:
        """Plan one forward pass."""
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
        """Score the cached keys."""
        return attention.paged_mqa_logits(query, key_pages, weights, page_table, metadata)

    @hookimpl
    def quantized_moe_apply(
        self, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Run the experts one after the other."""
        return moe.quantized_moe_apply(tokens, experts, out_dtype)

    @hookimpl
    def quantized_linear(
        self, rows: torch.Tensor, linear: LinearWeight, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply rows by one projection."""
        return projections.quantized_linear(rows, linear, out_dtype)

    @hookimpl
    def qkv_split(
        self, projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape
    ) -> QKVParts:
        """Cut the projections along their layout."""
        return qkv.qkv_split(projected_qkvz, projected_ba, shape)


def _usable_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # Torch names every device type it ever knew; the first line says what happened.
        raise ConfigError(
            f"torch cannot use device {text!r}: {str(error).splitlines()[0]}",
            expected="a torch device of this machine, for example cpu",
        ) from error
    return device
