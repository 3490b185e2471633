"""A backend that runs unquantised experts with sums of its own; the reference does the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mortise.plugin import (
    Backend,
    Capabilities,
    ConfigError,
    DispatchDtype,
    Support,
    WeightScheme,
    hookimpl,
)
from mortise_toy.experts import block_weights, run_experts

if TYPE_CHECKING:
    from mortise.plugin import (
        BindContext,
        DispatchDecision,
        DispatchedTokens,
        ExpertLayerRequest,
        ExpertWeights,
    )


class ToyBackend(Backend):
    """One object per model role; what it keeps, it keeps on itself.

    Args:
        device: where its tensors live.
        columns: columns that are multiplied before their sum is added with compensation.
    """

    def __init__(self, device: torch.device, columns: int) -> None:
        self._device = device
        self._columns = columns

    @classmethod
    def create(cls, context: BindContext) -> ToyBackend:
        """Check the options; a vendor's library would be imported here."""
        options = dict(context.options)
        columns = options.pop("columns", 64)
        if options:
            raise ConfigError(f"unknown options: {', '.join(sorted(options))}", expected="columns")
        # True is an int to Python, and no number to a reader.
        if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
            raise ConfigError(f"columns is {columns!r}", expected="an integer of at least 1")
        return cls(torch.device(context.device or "cpu"), columns)

    def capabilities(self) -> Capabilities:
        """What it serves here."""
        return Capabilities(
            device=self._device,
            emulated=False,
            schemes=frozenset({WeightScheme.FLOAT}),
            dispatch_dtypes=frozenset({DispatchDtype.FP32, DispatchDtype.BF16}),
            compute_dtypes=(torch.bfloat16, torch.float32),
            page_sizes=frozenset({64}),
            num_workers=1,
        )

    def supports(self, request: ExpertLayerRequest) -> Support:
        """Take layers of unquantised experts."""
        quantised = {request.scheme_w13, request.scheme_w2} - {WeightScheme.FLOAT}
        if not quantised:
            return Support(ok=True)
        return Support(ok=False, reason=f"its experts are {', '.join(sorted(quantised))}")

    @hookimpl
    def prepare_expert_weights(
        self, experts: ExpertWeights, decision: DispatchDecision
    ) -> ExpertWeights:
        """Lay the weights out in blocks of columns, once."""
        return replace(experts, prepared=block_weights(experts, self._columns))

    @hookimpl
    def quantized_moe_apply(
        self, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply block by block; a chip would launch its kernel."""
        return run_experts(tokens, experts, out_dtype)
