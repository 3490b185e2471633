"""A backend that runs the experts as the reference does, and counts their rows."""

from __future__ import annotations

from collections import Counter

import torch

from mortise.plugin import (
    Backend,
    BindContext,
    Capabilities,
    ConfigError,
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    ExpertLayerRequest,
    ExpertWeights,
    Support,
    WeightScheme,
    hookimpl,
)
from mortise.reference import moe


class ToyBackend(Backend):
    """Counts the rows that each layer's experts were given; made once per model role."""

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self.device = device
        self.num_workers = num_workers
        self.rows: Counter[str] = Counter()

    @classmethod
    def create(cls, context: BindContext) -> ToyBackend:
        """Check the options; a vendor's library would be imported here."""
        num_workers = context.options.get("num_workers", 1)
        if not isinstance(num_workers, int) or num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers!r}", expected="a number from 1")
        return cls(torch.device(context.device or "cpu"), num_workers)

    def capabilities(self) -> Capabilities:
        """What it serves here."""
        return Capabilities(
            device=self.device,
            emulated=False,
            schemes=frozenset({WeightScheme.FLOAT}),
            dispatch_dtypes=frozenset({DispatchDtype.FP32, DispatchDtype.BF16}),
            compute_dtypes=(torch.bfloat16, torch.float32),
            page_sizes=frozenset({64}),
            num_workers=self.num_workers,
        )

    def supports(self, request: ExpertLayerRequest) -> Support:
        """Take layers of unquantised experts."""
        schemes = {request.scheme_w13, request.scheme_w2}
        ok = schemes == {WeightScheme.FLOAT}
        return Support(ok=ok, reason="" if ok else f"its experts are {', '.join(schemes)}")

    @hookimpl
    def prepare_expert_weights(
        self, experts: ExpertWeights, decision: DispatchDecision
    ) -> ExpertWeights:
        """Leave the weights as they are; a chip would lay them out for its kernel."""
        return moe.prepare_expert_weights(experts, decision)

    @hookimpl
    def quantized_moe_apply(
        self, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Count the rows and hand them to the reference; a chip would run its kernel."""
        self.rows[experts.layer] += tokens.rows.shape[0]
        return moe.quantized_moe_apply(tokens, experts, out_dtype)
