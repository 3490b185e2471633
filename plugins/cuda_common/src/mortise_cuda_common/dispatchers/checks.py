"""What must be true of rows before they are sent, and of those that the experts made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.formats.outgoing import check_expert_rows
from mortise.plugin import ContractError, DispatchDtype, ReasonCode, ScaleFormat

if TYPE_CHECKING:
    from mortise.plugin import DispatchFormat, TokenDispatcherRequest


def check_outgoing(
    hidden_TH: torch.Tensor, format: DispatchFormat, request: TokenDispatcherRequest
) -> None:
    """Raise where rows are not those that the exchange was made for.

    Raises:
        ContractError: another format, or rows that are not bfloat16.
    """
    if format != request.format:
        raise ContractError(
            f"layer {request.layer}: {format.dtype.value} rows in an exchange of another format",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected=f"the format that was decided when the layer was built: {request.format}",
        )
    if hidden_TH.dtype is not torch.bfloat16:
        raise ContractError(
            f"layer {request.layer}: {hidden_TH.dtype} rows are to be sent",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="torch.bfloat16, which is sent as it is or as fp8",
        )


def check_made(rows_RH: torch.Tensor, num_rows: int, request: TokenDispatcherRequest) -> None:
    """Raise where DeepEP cannot bring home what the experts made.

    Raises:
        ContractError: fewer rows than were dispatched, or rows that are not bfloat16.
    """
    check_expert_rows(rows_RH, num_rows, request.hidden_size, request.layer)
    if rows_RH.dtype is not torch.bfloat16:
        raise ContractError(
            f"layer {request.layer}: the experts made {rows_RH.dtype} rows",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="torch.bfloat16, which DeepEP brings home",
        )


def arrived(
    received: object, format: DispatchFormat, layer: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales as the library gave them, if they are what it was asked for.

    Raises:
        ContractError: they are not: the library did not follow its arguments.
    """
    rows, scales = received if isinstance(received, tuple) else (received, None)
    wanted, wanted_scales = torch.bfloat16, None
    if format.dtype is DispatchDtype.FP8_E4M3:
        packed = format.scale_format is ScaleFormat.UE8M0
        wanted, wanted_scales = torch.float8_e4m3fn, torch.int32 if packed else torch.float32
    found = None if scales is None else scales.dtype
    if rows.dtype is wanted and found is wanted_scales:
        return rows, scales
    raise ContractError(
        f"layer {layer}: DeepEP was asked for {format.dtype.value} rows and sent {rows.dtype} with"
        f" scales {found}",
        reason=ReasonCode.CONTRACT_BROKEN,
        expected=f"{wanted} with scales {wanted_scales}",
        remedy='set option exchange of the backend to "portable"',
    )
