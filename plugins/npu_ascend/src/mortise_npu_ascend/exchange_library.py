"""DeepEP's port to this device: whether it is there, and which exchanges it takes."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mortise.plugin import BackendUnusableError, DispatchDtype, DispatchMode, ReasonCode
from mortise_npu_ascend.buffer_size import ExchangeSize, configured_megabytes, required_megabytes
from mortise_npu_ascend.dispatch import Generation

if TYPE_CHECKING:
    from mortise.plugin import TokenDispatcherRequest
    from mortise_npu_ascend.environment import VendorEnvironment
    from mortise_npu_ascend.vendor import Vendor

LIBRARY: Final = "deep_ep"
SOURCE: Final = "github.com/sgl-project/sgl-kernel-npu"

MOST_TOKENS: Final = 8192
"""Tokens of one rank in a normal exchange; more takes variables that make it go round by round."""

MOST_LOW_LATENCY_TOKENS: Final = 512
MOST_EXPERTS: Final = 512
MOST_CHOICES: Final = 16
MOST_HIDDEN: Final = 7168
CARRIED: Final = frozenset({DispatchDtype.BF16, DispatchDtype.INT8})

# Beyond, rows go between machines and the port asks an environment variable for their format.
MOST_RANKS_OF_ONE_A2: Final = 15
# Those that its table of recommendations has; it looks there before it does anything.
WORLD_SIZES: Final = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)


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


def load_library(vendor: Vendor, environment: VendorEnvironment) -> Any | None:
    """The module ``deep_ep``, what stands in for it on an emulated chip, or None without it.

    Importing it changes two variables of this process, by which it finds its own kernels
    (``ASCEND_CUSTOM_OPP_PATH``, ``LD_LIBRARY_PATH``). So it is imported only where several ranks
    exchange rows through it.

    Raises:
        BackendUnusableError: it is installed and cannot be imported.
    """
    if vendor.emulated:
        from mortise_npu_ascend.emulator.deep_ep import EmulatedDeepEp

        return EmulatedDeepEp(vendor.torch_npu.chip, environment)
    if importlib.util.find_spec(LIBRARY) is None:
        return None
    try:
        return importlib.import_module(LIBRARY)
    except Exception as error:
        raise BackendUnusableError(
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            reason=ReasonCode.IMPORT_FAILED,
            details=[f"while importing {LIBRARY}, which exchanges rows between devices"],
            remedy=f"build {LIBRARY} of {SOURCE} for this CANN and chip, uninstall it, or set"
            " option exchange of backend npu_ascend to 'portable'",
        ) from error


def refusal(
    request: TokenDispatcherRequest, vendor: Vendor, environment: VendorEnvironment
) -> Refusal | None:
    """Why DeepEP cannot carry the rows of a layer, before the library is looked at; None if it can.

    Limits are those of its manuals and, where they are narrower, of its kernels.
    """
    return (
        _of_format(request)
        or unserved(request, vendor.generation)
        or _of_buffer(request, vendor, environment)
    )


def unserved(request: TokenDispatcherRequest, generation: Generation) -> Refusal | None:
    """Why DeepEP does not take the sizes of a layer, or so many ranks; None if it does."""
    return _of_sizes(request, generation) or _of_ranks(request, generation)


def _of_format(request: TokenDispatcherRequest) -> Refusal | None:
    if request.format is None or request.format.dtype in CARRIED:
        return None
    dtype = request.format.dtype
    return Refusal(f"it carries no {dtype.value} rows", expected=dtype is DispatchDtype.FP32)


def _of_sizes(request: TokenDispatcherRequest, generation: Generation) -> Refusal | None:
    hidden, lowest, step = request.hidden_size, 1024, 1
    if generation is Generation.A2:
        lowest, step = (7168, 1) if request.mode is DispatchMode.NORMAL else (32, 32)
    if not lowest <= hidden <= MOST_HIDDEN or hidden % step:
        sizes = f"of {lowest}" if lowest == MOST_HIDDEN else f"from {lowest} to {MOST_HIDDEN}"
        return Refusal(
            f"on {generation} it takes hidden sizes {sizes}, and this model has {hidden}"
        )
    if request.num_experts > MOST_EXPERTS:
        return Refusal(f"it takes {MOST_EXPERTS} experts, and there are {request.num_experts}")
    if request.num_experts_per_tok > MOST_CHOICES:
        chosen = request.num_experts_per_tok
        return Refusal(f"it takes {MOST_CHOICES} experts of a token, and there are {chosen}")
    most = MOST_LOW_LATENCY_TOKENS
    if request.mode is DispatchMode.LOW_LATENCY and request.max_tokens_per_rank > most:
        return Refusal(
            f"its low-latency exchange takes {most} tokens of a rank, and"
            f" dispatch.max_tokens_per_rank is {request.max_tokens_per_rank}",
            f"set dispatch.max_tokens_per_rank to at most {most}",
        )
    return None


def _of_ranks(request: TokenDispatcherRequest, generation: Generation) -> Refusal | None:
    if request.mode is not DispatchMode.NORMAL:
        return None
    if request.world_size not in WORLD_SIZES:
        sizes = ", ".join(map(str, WORLD_SIZES))
        return Refusal(f"it takes {sizes} processes, and there are {request.world_size}")
    if generation is Generation.A2 and request.world_size > MOST_RANKS_OF_ONE_A2:
        return Refusal(
            "between machines of A2 an environment variable alone tells it in which format rows"
            " travel, for the whole process"
        )
    return None


def _of_buffer(
    request: TokenDispatcherRequest, vendor: Vendor, environment: VendorEnvironment
) -> Refusal | None:
    """How many tokens a normal exchange may have is not known here; ``mortise doctor`` says."""
    if vendor.emulated or request.mode is not DispatchMode.LOW_LATENCY:
        return None
    size = ExchangeSize(
        generation=vendor.generation,
        mode=request.mode,
        max_tokens=request.max_tokens_per_rank,
        world_size=request.world_size,
        num_experts=request.num_experts,
        num_experts_per_tok=request.num_experts_per_tok,
        hidden_size=request.hidden_size,
        in_two_levels=environment.in_two_levels,
    )
    needed, (there, name) = required_megabytes(size), configured_megabytes(environment)
    if needed <= there:
        return None
    return Refusal(
        f"its low-latency exchange needs a buffer of {needed} MB, and {name} gives it {there}",
        f"set {name} to {needed} on every rank before the processes start, or lower"
        " dispatch.max_tokens_per_rank",
    )
