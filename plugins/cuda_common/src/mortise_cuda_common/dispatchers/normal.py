"""The exchange of variable size through DeepEP: as many rows as there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mortise.formats.fp8 import pack_ue8m0
from mortise.formats.outgoing import routing_weights_of_experts
from mortise.plugin import DispatchedTokens, GroupListKind, RowLayout, ScaleFormat
from mortise_cuda_common.dispatchers.checks import arrived, check_made, check_outgoing
from mortise_cuda_common.dispatchers.expansion import expansion
from mortise_cuda_common.kernels.fp8_rows import quantise_rows
from mortise_cuda_common.kernels.permutation import unpermute

if TYPE_CHECKING:
    from mortise.plugin import (
        DispatchFormat,
        DispatchHandle,
        Routing,
        TokenDispatcherRequest,
    )
    from mortise_cuda_common.dispatchers.connection import Connection
    from mortise_cuda_common.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalHandle:
    """What brings rows home.

    Args:
        kept: the library's handle.
        row_of_NK: int32, the row of each choice of the received rows, -1 where it has none.
        weights_NK: float32, their routing weights.
        num_rows: rows of this rank's experts, with padding.
    """

    kept: Any
    row_of_NK: torch.Tensor
    weights_NK: torch.Tensor
    num_rows: int


class NormalExchange:
    """``Buffer.dispatch`` and ``Buffer.combine``.

    A token's row is quantised at home, as the format says, and travels once to each rank that
    holds one of its experts, with the routing weights. There it becomes a row for each of them, by
    expert, then source rank and token. On the way back the rows of one rank are weighted and
    summed in float32, rounded to bfloat16, and the library sums those of all ranks in float32.

    Args:
        runtime: the chip.
        request: the layer; all ranks ask for the same.
        connection: between the ranks.
    """

    def __init__(
        self, runtime: Runtime, request: TokenDispatcherRequest, connection: Connection
    ) -> None:
        self._runtime = runtime
        self._request = request
        self._connection = connection

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, NormalHandle]:
        """Send the rows; every rank calls this, also one without tokens.

        Raises:
            ContractError: another format than the exchange was made for, rows of another dtype, or
                an exchange that was not received.
        """
        check_outgoing(hidden_TH, format, self._request)
        received, local_ids, weights, counts, kept = self._send(hidden_TH, routing, format)
        received_rows, received_scales = arrived(received, format, self._request.layer)
        aligned = format.row_layout is RowLayout.GROUPED_ALIGNED
        places = expansion(local_ids.long(), counts, format.alignment if aligned else 1)
        rows = places.apply(received_rows)
        scales = None if received_scales is None else places.apply_to_scales(received_scales)
        tokens = DispatchedTokens(
            rows=rows,
            scales=scales,
            group_list=torch.tensor(counts, dtype=torch.int64, device=rows.device),
            group_list_kind=GroupListKind.COUNTS,
            group_counts=tuple(counts),
            format=format,
        )
        handle = NormalHandle(
            kept=kept, row_of_NK=places.row_of_NK, weights_NK=weights, num_rows=rows.shape[0]
        )
        return tokens, handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Bring the experts' rows home and sum them; every rank calls this.

        Raises:
            ContractError: not a bfloat16 row for each that was dispatched.
        """
        assert isinstance(handle, NormalHandle)
        check_made(rows_RH, handle.num_rows, self._request)
        reduced_NH = unpermute(self._runtime.programs, rows_RH, handle.row_of_NK, handle.weights_NK)
        buffer = self._connection.normal(self._request.layer)
        combined, _, _ = buffer.combine(reduced_NH, handle.kept)
        result: torch.Tensor = combined
        return result

    def _send(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[Any, torch.Tensor, torch.Tensor, list[int], Any]:
        """What came: rows, local experts and weights ``[N, K]``, counts, the library's handle."""
        buffer = self._connection.normal(self._request.layer)
        ids_TK = self._connection.ids(routing.topk_ids)
        to_rank, to_machine, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(
            ids_TK, self._request.num_experts
        )
        received, local_ids, weights, counts, kept, _ = buffer.dispatch(
            self._outgoing(hidden_TH.contiguous(), format.scale_format),
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_machine,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=to_expert,
            topk_idx=ids_TK,
            topk_weights=routing_weights_of_experts(routing).contiguous(),
            # Counts as they are: places are aligned here.
            expert_alignment=1,
        )
        return received, local_ids, weights, list(counts), kept

    def _outgoing(
        self, hidden_TH: torch.Tensor, scale_format: ScaleFormat | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What is sent: bfloat16 rows as they are, or fp8 rows with their scales."""
        if scale_format is None:
            return hidden_TH
        rows = quantise_rows(self._runtime.programs, hidden_TH, None, scale_format)
        assert rows.scales is not None
        packed = scale_format is ScaleFormat.UE8M0
        return rows.values, pack_ue8m0(rows.scales.contiguous()) if packed else rows.scales
