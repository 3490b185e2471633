"""Which exchanges DeepEP does not carry, and why."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from mortise.plugin import DispatchDtype, DispatchMode, RowLayout
from mortise_cuda_common.environment import QUEUE_DEPTH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.plugin import TokenDispatcherRequest
    from mortise_cuda_common.environment import VendorEnvironment

CARRIED: Final = frozenset({DispatchDtype.BF16, DispatchDtype.FP8_E4M3})
LAYOUTS: Final[Mapping[DispatchMode, frozenset[RowLayout]]] = MappingProxyType(
    {
        DispatchMode.NORMAL: frozenset({RowLayout.GROUPED, RowLayout.GROUPED_ALIGNED}),
        DispatchMode.LOW_LATENCY: frozenset({RowLayout.MASKED}),
    }
)

# deep_ep/buffers/legacy.py, csrc/legacy/buffer.hpp and csrc/kernels/legacy of deepseek-ai/DeepEP at
# dd758ca; v1.2.1 has the same, but for the hidden size 3072 and for 48 and 96 ranks.
WORLD_SIZES: Final = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
"""Ranks for which the normal exchange has tables and kernels."""
RANKS_OF_ONE_MACHINE: Final = 8
HIDDEN_SIZES: Final = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""Hidden sizes for which kernels of the low-latency exchange are compiled."""
MOST_CHOICES: Final = 11
"""Experts of a token in the low-latency exchange."""
MOST_LOCAL_EXPERTS: Final = 1024
MOST_WARP_GROUPS: Final = 14
"""Experts that one multiprocessor can look after in the low-latency exchange."""
ROWS_OF_TMA: Final = 4
"""Places of the rows of an expert in the low-latency exchange are a multiple of it."""
DEFAULT_QUEUE_DEPTH: Final = 1024
"""What DeepEP sets where the variable is not set."""

_FP8_COLUMNS: Final = 128
_BF16_COLUMNS: Final = 8  # 128 bits


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why DeepEP does not carry a layer's rows.

    Args:
        reason: what it does not do.
        remedy: what the user could change; empty if nothing.
        expected: true where documents say so, and nobody wonders.
    """

    reason: str
    remedy: str = ""
    expected: bool = False


def refusal(
    request: TokenDispatcherRequest, num_sms: int, environment: VendorEnvironment
) -> Refusal | None:
    """Why DeepEP cannot carry the rows of a layer, before the library is looked at; None if it can.

    Args:
        request: the layer.
        num_sms: multiprocessors of the chip.
        environment: what the library finds.
    """
    return _of_format(request) or unserved(request, num_sms, environment)


def unserved(
    request: TokenDispatcherRequest, num_sms: int, environment: VendorEnvironment
) -> Refusal | None:
    """Why DeepEP does not take the sizes of a layer, or so many ranks; None if it does."""
    if request.num_experts % request.world_size:
        # Nobody does; the core says it better.
        return Refusal(
            f"{request.num_experts} experts are not shared evenly by {request.world_size} processes"
        )
    if request.mode is DispatchMode.NORMAL:
        return _of_normal(request)
    return _of_low_latency(request, num_sms) or _of_capacity(request, environment)


def queue_depth(environment: VendorEnvironment) -> int | None:
    """Work requests of a queue pair; None where the variable is not a number."""
    text = environment.queue_depth
    if text is None:
        return DEFAULT_QUEUE_DEPTH
    return int(text) if text.isdecimal() else None


def _of_format(request: TokenDispatcherRequest) -> Refusal | None:
    stated = request.format
    if stated is None:
        return Refusal("in which format the rows travel is not decided yet")
    if stated.dtype not in CARRIED:
        return Refusal(
            f"it carries no {stated.dtype.value} rows",
            expected=stated.dtype is DispatchDtype.FP32,
        )
    if stated.row_layout not in LAYOUTS[request.mode]:
        return Refusal(f"its {request.mode.value} exchange has no {stated.row_layout.value} rows")
    return None


def _of_normal(request: TokenDispatcherRequest) -> Refusal | None:
    if request.world_size not in WORLD_SIZES:
        sizes = ", ".join(map(str, WORLD_SIZES))
        return Refusal(f"it takes {sizes} processes, and there are {request.world_size}")
    fp8 = request.format is not None and request.format.dtype is DispatchDtype.FP8_E4M3
    columns = _FP8_COLUMNS if fp8 else _BF16_COLUMNS
    if request.hidden_size % columns:
        return Refusal(
            f"it takes hidden sizes that are a multiple of {columns}, and this model has"
            f" {request.hidden_size}"
        )
    local = request.num_experts // request.world_size
    if local > MOST_LOCAL_EXPERTS:
        return Refusal(f"it takes {MOST_LOCAL_EXPERTS} experts of a process, and there are {local}")
    return None


def _of_low_latency(request: TokenDispatcherRequest, num_sms: int) -> Refusal | None:
    world_size = request.world_size
    if world_size > RANKS_OF_ONE_MACHINE and world_size % RANKS_OF_ONE_MACHINE:
        return Refusal(
            f"it takes fewer than {RANKS_OF_ONE_MACHINE} processes or a multiple of it, and there"
            f" are {world_size}"
        )
    if request.hidden_size not in HIDDEN_SIZES:
        sizes = ", ".join(map(str, HIDDEN_SIZES))
        return Refusal(
            f"its low-latency exchange takes hidden sizes {sizes}, and this model has"
            f" {request.hidden_size}"
        )
    if request.num_experts_per_tok > MOST_CHOICES:
        chosen = request.num_experts_per_tok
        return Refusal(
            f"its low-latency exchange takes {MOST_CHOICES} experts of a token, and there are"
            f" {chosen}"
        )
    if request.num_experts > MOST_WARP_GROUPS * num_sms:
        return Refusal(
            f"its low-latency exchange takes {MOST_WARP_GROUPS * num_sms} experts on this chip, and"
            f" there are {request.num_experts}"
        )
    return None


def _of_capacity(request: TokenDispatcherRequest, environment: VendorEnvironment) -> Refusal | None:
    tokens, depth = request.max_tokens_per_rank, queue_depth(environment)
    if tokens < 1 or request.world_size * tokens % ROWS_OF_TMA:
        return Refusal(
            f"its low-latency exchange wants places for a multiple of {ROWS_OF_TMA} tokens, and"
            f" {request.world_size} processes of {tokens} have {request.world_size * tokens}",
            "set dispatch.max_tokens_per_rank to a multiple of 4 on every rank",
        )
    if depth is None:
        return Refusal(
            f"the environment variable {QUEUE_DEPTH} is {environment.queue_depth!r}, not a number",
            "unset it before the processes start",
        )
    needed = 2 * (tokens + 1)
    if needed > depth:
        return Refusal(
            f"its low-latency exchange needs queues of {needed} for"
            f" dispatch.max_tokens_per_rank {tokens}, and {QUEUE_DEPTH} makes them {depth}",
            f"set dispatch.max_tokens_per_rank to at most {depth // 2 - 1}, or {QUEUE_DEPTH} to at"
            f" least {needed} on every rank before the processes start",
        )
    return None
