"""What ``mortise doctor`` says of a run on this device: libraries, variables, and the buffer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mortise.plugin import (
    BackendUnusableError,
    ConfigError,
    DispatchMode,
    Finding,
    ModelRole,
    TokenDispatcherRequest,
    Verdict,
)
from mortise_npu_ascend import vendor
from mortise_npu_ascend.buffer_size import ExchangeSize, configured_megabytes, required_megabytes
from mortise_npu_ascend.dispatch import Generation
from mortise_npu_ascend.environment import BUFFER, EXPERT_COUNTS, INT8_DISPATCH
from mortise_npu_ascend.exchange_library import LIBRARY, MOST_TOKENS, SOURCE, unserved
from mortise_npu_ascend.options import read_options
from mortise_npu_ascend.qkv import TRITON

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.plugin import DoctorRequest
    from mortise_npu_ascend.environment import VendorEnvironment
    from mortise_npu_ascend.options import Options

SUPPOSED_PROCESSES: Final = 8
"""The cards of one machine: what one process is told that several would need."""

LIBRARY_CHECK: Final = "exchange"
TOKENS_CHECK: Final = "tokens of a step"


def findings(request: DoctorRequest, environment: VendorEnvironment) -> Iterator[Finding]:
    """Look at what can be looked at without touching the device or importing its libraries.

    Args:
        request: the run.
        environment: what the vendor's libraries find.

    Raises:
        ConfigError: the backend's table of the configuration is wrong.
    """
    options = read_options(request.options)
    if request.device == vendor.EMULATED:
        chip = options.chip or vendor.DEFAULT_GENERATION
        yield Finding("device", Verdict.OK, f"an emulated Ascend {chip}, which needs no library")
    else:
        yield _torch_npu()
        yield _triton()
    yield from _variables(environment)
    if request.device != vendor.EMULATED and options.exchange != "portable":
        yield from _exchange(request, options, environment)


def _torch_npu() -> Finding:
    try:
        vendor.require_matching_version()
    except BackendUnusableError as error:
        return Finding("torch_npu", Verdict.FAIL, error.what, error.remedy or "")
    version = importlib.metadata.version(vendor.DISTRIBUTION)
    return Finding("torch_npu", Verdict.OK, f"{version}, made for this torch")


def _triton() -> Finding:
    try:
        version = importlib.metadata.version(TRITON)
    except importlib.metadata.PackageNotFoundError:
        found = f"{TRITON} is not installed: fused projections are split by torch's operators"
        return Finding(TRITON, Verdict.NOTE, found)
    return Finding(TRITON, Verdict.OK, version)


def _variables(environment: VendorEnvironment) -> Iterator[Finding]:
    """Those that decide for all layers of a process what is decided for each of them."""
    if environment.int8_dispatch is not None:
        yield Finding(
            INT8_DISPATCH,
            Verdict.WARN,
            f"is {environment.int8_dispatch!r} and is not heard",
            "unset it; the format of each layer's rows is decided by itself (dispatch.dtype)",
        )
    if environment.expert_counts not in (None, "0", "1"):
        yield Finding(
            EXPERT_COUNTS,
            Verdict.FAIL,
            f"is {environment.expert_counts!r}, which {LIBRARY} does not take",
            "set it to 1, or unset it",
        )


def _exchange(
    request: DoctorRequest, options: Options, environment: VendorEnvironment
) -> Iterator[Finding]:
    several = request.world_size > 1
    if several and importlib.util.find_spec(LIBRARY) is None:
        demanded = options.exchange == "deep_ep"
        yield Finding(
            LIBRARY_CHECK,
            Verdict.FAIL if demanded else Verdict.NOTE,
            f"{LIBRARY} is not installed"
            + ("" if demanded else ": rows travel by the core's exchange over HCCL"),
            f"build and install it: {SOURCE}",
        )
        return
    if several and request.max_tokens > MOST_TOKENS:
        yield Finding(
            TOKENS_CHECK,
            Verdict.FAIL,
            f"up to {request.max_tokens}, and DeepEP's normal exchange takes {MOST_TOKENS}",
            f"set scheduler.max_num_batched_tokens to at most {MOST_TOKENS}",
        )
    yield from _buffer(request, options, environment)


@dataclass(frozen=True, slots=True)
class _Need:
    """The buffer of one exchange on one generation of the chip."""

    mode: DispatchMode
    generation: Generation
    megabytes: int


def _buffer(
    request: DoctorRequest, options: Options, environment: VendorEnvironment
) -> Iterator[Finding]:
    if not request.num_experts or not request.hidden_size:
        return
    needs = list(_needs(request, options, environment))
    if not needs:
        return
    try:
        there, name = configured_megabytes(environment)
    except ConfigError as error:
        yield Finding(BUFFER, Verdict.FAIL, error.what, error.remedy or "")
        return
    told = "; ".join(f"{one.mode} on {one.generation} {one.megabytes}" for one in needs)
    if request.world_size == 1:
        found = f"{SUPPOSED_PROCESSES} processes would need, in MB: {told}"
        yield Finding(name, Verdict.NOTE, found)
        return
    most, least = (choose(one.megabytes for one in needs) for choose in (max, min))
    verdict = Verdict.OK if there >= most else Verdict.WARN if there >= least else Verdict.FAIL
    yield Finding(
        name,
        verdict,
        f"gives DeepEP {there} MB; {request.world_size} processes need, in MB: {told}",
        "" if verdict is Verdict.OK else f"set {name} to {most} on every rank, before they start",
    )


def _needs(
    request: DoctorRequest, options: Options, environment: VendorEnvironment
) -> Iterator[_Need]:
    """Of every exchange that DeepEP carries; of every generation where the chip is not said."""
    world_size = request.world_size if request.world_size > 1 else SUPPOSED_PROCESSES
    modes = request.modes if request.world_size > 1 else tuple(DispatchMode)
    for mode in modes:
        for generation in Generation if options.chip is None else (options.chip,):
            asked = TokenDispatcherRequest(
                role=ModelRole.MAIN,
                layer="any",
                num_experts=request.num_experts,
                num_experts_per_tok=request.num_experts_per_tok,
                hidden_size=request.hidden_size,
                world_size=world_size,
                mode=mode,
                max_tokens_per_rank=request.max_tokens_per_rank,
            )
            if request.num_experts % world_size or unserved(asked, generation) is not None:
                continue
            normal = mode is DispatchMode.NORMAL
            size = ExchangeSize(
                generation=generation,
                mode=mode,
                max_tokens=min(request.max_tokens, MOST_TOKENS)
                if normal
                else request.max_tokens_per_rank,
                world_size=world_size,
                num_experts=request.num_experts,
                num_experts_per_tok=request.num_experts_per_tok,
                hidden_size=request.hidden_size,
                in_two_levels=environment.in_two_levels,
            )
            yield _Need(mode, generation, required_megabytes(size))
