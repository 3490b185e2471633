"""What ``mortise doctor`` says of DeepEP: which exchanges of the run it carries, and its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import DispatchMode, Finding, ModelRole, TokenDispatcherRequest, Verdict
from mortise_cuda_common.emulator.deep_ep.config import Config, low_latency_hint
from mortise_cuda_common.exchange_limits import RANKS_OF_ONE_MACHINE, unserved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.plugin import DoctorRequest
    from mortise_cuda_common.environment import VendorEnvironment

MEGABYTE: Final = 1 << 20


def findings(
    request: DoctorRequest, num_sms: int, environment: VendorEnvironment, *, demanded: bool
) -> Iterator[Finding]:
    """Compare each exchange of a run of several processes with what DeepEP carries.

    Formats are decided layer by layer, so nothing is said of them. Sizes are those of bfloat16
    rows, by the library's formulas.

    Args:
        request: the run.
        num_sms: multiprocessors of the chip.
        environment: what the library finds.
        demanded: whether the configuration makes it an error where DeepEP does not carry rows.
    """
    if not request.num_experts or not request.hidden_size:
        return
    for mode in request.modes:
        name = f"DeepEP, {mode.value}"
        why = unserved(_asked(request, mode), num_sms, environment)
        if why is None:
            found = f"carries the model's rows{_memory(request, mode)}"
            yield Finding(name, Verdict.OK, found)
        else:
            verdict = Verdict.FAIL if demanded else Verdict.NOTE
            instead = "" if demanded else ": the core's exchange over NCCL does"
            yield Finding(name, verdict, f"{why.reason}{instead}", why.remedy)


def _asked(request: DoctorRequest, mode: DispatchMode) -> TokenDispatcherRequest:
    return TokenDispatcherRequest(
        role=ModelRole.MAIN,
        layer="any",
        num_experts=request.num_experts,
        num_experts_per_tok=request.num_experts_per_tok,
        hidden_size=request.hidden_size,
        world_size=request.world_size,
        mode=mode,
        max_tokens_per_rank=request.max_tokens_per_rank,
    )


def _memory(request: DoctorRequest, mode: DispatchMode) -> str:
    if mode is DispatchMode.LOW_LATENCY:
        needed = low_latency_hint(
            request.max_tokens_per_rank, request.hidden_size, request.num_experts
        )
    elif request.world_size <= RANKS_OF_ONE_MACHINE:
        row_bytes = request.hidden_size * torch.bfloat16.itemsize
        needed = Config().get_nvl_buffer_size_hint(row_bytes, request.world_size)
    else:
        # Between machines each version of the library has queues of its own length.
        return ""
    return f"; buffer of {-(-needed // MEGABYTE)} MB on each GPU"
