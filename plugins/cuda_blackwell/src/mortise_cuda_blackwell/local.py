"""The exchange within one process of NVFP4 rows: quantised once a token, then moved as bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import DispatchDtype, DispatchFormat
from mortise_cuda_blackwell.kernels.nvfp4_rows import quantise_rows
from mortise_cuda_common.groups import Groups
from mortise_cuda_common.local import ProgramDispatcher

if TYPE_CHECKING:
    from mortise.plugin import (
        DispatchedTokens,
        DispatchHandle,
        Routing,
        TokenDispatcherRequest,
    )
    from mortise_cuda_common.local import LocalHandle
    from mortise_cuda_common.runtime import Runtime

COLUMN_MULTIPLE: Final = 64
"""Values and scales of so many columns are nine float32."""


def carries(request: TokenDispatcherRequest) -> bool:
    """Whether rows of a layer are NVFP4 that stay in this process."""
    is_nvfp4 = request.format is not None and request.format.dtype is DispatchDtype.NVFP4
    return is_nvfp4 and request.world_size == 1 and request.hidden_size % COLUMN_MULTIPLE == 0


class Nvfp4Dispatcher:
    """The programs that order rows by expert, given the bytes of NVFP4 rows as float32 numbers.

    A token is quantised once, whatever experts it is for. Its scales lie behind its values, so
    dispatched rows and scales are parts of wider rows. Nothing waits for the device.

    Args:
        runtime: runs the programs.
        request: a layer that :func:`carries` says yes of.
    """

    def __init__(self, runtime: Runtime, request: TokenDispatcherRequest) -> None:
        self._programs = runtime.programs
        self._moving = ProgramDispatcher(runtime, request)

    def dispatch(
        self, hidden_TH: torch.Tensor, routing: Routing, format: DispatchFormat
    ) -> tuple[DispatchedTokens, LocalHandle]:
        """Quantise under the global scale of the format, and order the rows of all choices.

        Raises:
            CapacityError: more tokens than a low-latency dispatch was made for.
        """
        assert format.global_scale is not None, "the check of formats lets no such one through"
        num_tokens, hidden_size = hidden_TH.shape
        groups = Groups.single(num_tokens, hidden_TH.device)
        global_scale = torch.full((1,), format.global_scale, device=hidden_TH.device)
        rows = quantise_rows(self._programs, hidden_TH.contiguous(), global_scale, groups)
        assert rows.scales is not None
        joined = torch.cat((rows.values, rows.scales.view(torch.uint8)), dim=1)
        moved, handle = self._moving.dispatch(
            joined.view(torch.float32), routing, _of_float32(format)
        )
        wide = moved.rows.view(torch.uint8)
        return replace(
            moved,
            rows=wide[..., : hidden_size // 2],
            scales=wide[..., hidden_size // 2 :].view(torch.float8_e4m3fn),
            format=format,
        ), handle

    def combine(self, rows_RH: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """Sum each token's rows by its routing weights.

        Raises:
            ContractError: fewer rows than were dispatched, or not a float row for each.
        """
        return self._moving.combine(rows_RH, handle)


def _of_float32(format: DispatchFormat) -> DispatchFormat:
    """Rows that are moved as they are, arranged as the format says."""
    return DispatchFormat(
        dtype=DispatchDtype.FP32,
        row_layout=format.row_layout,
        mode=format.mode,
        alignment=format.alignment,
    )
