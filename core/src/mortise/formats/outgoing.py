"""A layer's hidden state on its way out: checked, and brought into the dispatch format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.errors import CapacityError, ContractError
from mortise.formats.rows import quantise_rows
from mortise.spec.reasons import ReasonCode

if TYPE_CHECKING:
    from mortise.spec.dispatch import DispatchFormat, Routing


def outgoing_rows(
    hidden_TH: torch.Tensor, format: DispatchFormat, layer: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantise ``hidden_TH`` as :func:`quantise_rows` does, and name the layer if it cannot be.

    Raises:
        ContractError: ``hidden_TH`` is not of the unquantised dtype that the format states, or the
            format contradicts itself.
        QuantizationConfigError: the format has blocks that do not divide H.
    """
    try:
        return quantise_rows(hidden_TH, format)
    except ContractError as error:
        raise ContractError(
            f"layer {layer}: {error.what}",
            reason=error.reason,
            expected=error.expected,
            remedy=error.remedy,
        ) from None


def routing_weights_of_experts(routing: Routing) -> torch.Tensor:
    """The routing weights ``[T, K]`` in float32, zero where there is no expert."""
    return routing.topk_weights.float().masked_fill(routing.topk_ids < 0, 0.0)


def check_capacity(num_tokens: int, max_tokens_per_rank: int, layer: str) -> None:
    """Raise where a low-latency exchange is given more tokens than it was made for.

    Raises:
        CapacityError: with both numbers and the option to change.
    """
    if num_tokens > max_tokens_per_rank:
        raise CapacityError(
            f"layer {layer}: {num_tokens} tokens in a low-latency exchange",
            expected=f"at most {max_tokens_per_rank}, which is dispatch.max_tokens_per_rank",
            remedy="raise dispatch.max_tokens_per_rank on every rank, or use dispatch.mode normal",
        )


def check_expert_rows(rows: torch.Tensor, num_rows: int, hidden_size: int, layer: str) -> None:
    """Raise where what the experts made cannot be brought home.

    Raises:
        ContractError: fewer rows than were dispatched, another width, or quantised.
    """
    fits = rows.dim() >= 2 and rows.shape[:-1].numel() >= num_rows and rows.shape[-1] == hidden_size
    if not fits or rows.dtype not in {torch.float32, torch.bfloat16}:
        raise ContractError(
            f"layer {layer}: the experts made {rows.dtype} {list(rows.shape)} of {num_rows}"
            " dispatched rows",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"one float32 or bfloat16 row of {hidden_size} columns for each of them",
        )
