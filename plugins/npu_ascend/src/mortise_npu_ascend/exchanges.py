"""Who carries the rows of a layer: the routing operators, DeepEP, or the core's own exchange."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist

from mortise.plugin import (
    NOT_SUPPORTED,
    BackendUnusableError,
    DispatchMode,
    NotSupported,
    ReasonCode,
)
from mortise_npu_ascend.environment import INT8_DISPATCH
from mortise_npu_ascend.exchange_dispatchers import (
    Connection,
    LowLatencyExchange,
    NormalExchange,
)
from mortise_npu_ascend.exchange_format import format_arguments
from mortise_npu_ascend.exchange_library import LIBRARY, SOURCE, Refusal, load_library, refusal
from mortise_npu_ascend.token_dispatcher import ROUTED, RoutingDispatcher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.plugin import TokenDispatcher, TokenDispatcherRequest
    from mortise_npu_ascend.environment import VendorEnvironment
    from mortise_npu_ascend.vendor import Vendor

Choice = Literal["auto", "deep_ep", "portable"]
"""``auto`` is DeepEP where it carries a layer's rows, and else the core's exchange over HCCL."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """The library, and the arguments that state the format of a layer's rows to it."""

    library: Any
    arguments: Mapping[str, object]


class Exchanges:
    """The exchanges of one backend, which share the connections between its ranks.

    Args:
        vendor: the operators and their device.
        choice: what the configuration says.
        environment: what the vendor's libraries find.
    """

    def __init__(self, vendor: Vendor, choice: Choice, environment: VendorEnvironment) -> None:
        self._vendor = vendor
        self._choice = choice
        self._environment = environment
        self._connections: dict[int, Connection] = {}

    def create_token_dispatcher(
        self, request: TokenDispatcherRequest
    ) -> TokenDispatcher | NotSupported:
        """Make the exchange of one layer and mode, or leave it to the core.

        Warns:
            RuntimeWarning: the core's exchange stands in for DeepEP, and why; or the variable that
                makes DeepEP quantise is set, and is not heard.

        Raises:
            BackendUnusableError: the configuration demands DeepEP, and it does not carry the rows;
                or it is installed and cannot be imported.
        """
        if request.world_size == 1:
            routed = request.format is None or request.format.dtype in ROUTED
            return RoutingDispatcher(self._vendor, request) if routed else NOT_SUPPORTED
        if self._choice == "portable":
            return NOT_SUPPORTED
        planned = self._planned(request)
        if not _every_rank(request, not isinstance(planned, Refusal)):
            if not isinstance(planned, Refusal):
                planned = Refusal("it does not carry the rows of another process")
            return self._refused(request, planned)
        assert not isinstance(planned, Refusal)
        self._tell_what_is_not_heard()
        kind = NormalExchange if request.mode is DispatchMode.NORMAL else LowLatencyExchange
        return kind(request, self._connection(planned.library, request), planned.arguments)

    def _planned(self, request: TokenDispatcherRequest) -> _Plan | Refusal:
        """How DeepEP would be called, or why it cannot be."""
        why = refusal(request, self._vendor, self._environment)
        if why is not None:
            return why
        library = load_library(self._vendor, self._environment)
        if library is None:
            return Refusal(f"{LIBRARY} is not installed", f"build and install it: {SOURCE}")
        if request.format is None:
            return Refusal("in which format the rows travel is not decided yet")
        buffer, normal = library.Buffer, request.mode is DispatchMode.NORMAL
        arguments = format_arguments(
            buffer.dispatch if normal else buffer.low_latency_dispatch,
            request.mode,
            request.format.dtype,
            self._vendor.generation,
            self._environment,
        )
        return arguments if isinstance(arguments, Refusal) else _Plan(library, arguments)

    def _connection(self, library: Any, request: TokenDispatcherRequest) -> Connection:
        """The one buffer of a group, which serves both modes and every layer."""
        group = request.process_group
        if id(group) not in self._connections:
            # It keeps the group, so that no other can have its number.
            buffer = library.Buffer(
                group,
                low_latency_mode=True,
                num_qps_per_rank=request.num_experts // request.world_size,
            )
            ends = self._environment.counts_are_ends
            self._connections[id(group)] = Connection(buffer, counts_are_ends=ends)
        return self._connections[id(group)]

    def _refused(self, request: TokenDispatcherRequest, why: Refusal) -> NotSupported:
        if self._choice == "deep_ep":
            raise BackendUnusableError(
                f"layer {request.layer}: DeepEP does not carry its rows: {why.reason}",
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                details=["option exchange of backend npu_ascend is 'deep_ep'"],
                remedy=why.remedy or "set it to 'auto' or 'portable': the core has an exchange",
            )
        if not why.expected:
            advice = f" ({why.remedy})" if why.remedy else ""
            warnings.warn(
                f"the core's exchange sends tokens to their experts instead of DeepEP: {why.reason}"
                f"{advice}",
                RuntimeWarning,
                stacklevel=2,
            )
        return NOT_SUPPORTED

    def _tell_what_is_not_heard(self) -> None:
        if self._environment.int8_dispatch is not None:
            warnings.warn(
                f"the environment variable {INT8_DISPATCH} is set and is not heard: in which format"
                " rows travel is decided for each layer (dispatch.dtype)",
                RuntimeWarning,
                stacklevel=2,
            )


def _every_rank(request: TokenDispatcherRequest, own: bool) -> bool:
    """Whether all ranks say yes: half of them in one exchange and half in another would wait."""
    answers = torch.empty(request.world_size, dtype=torch.int64)
    group = cast("dist.ProcessGroup", request.process_group)
    dist.all_to_all_single(answers, torch.full_like(answers, int(own)), group=group)
    return bool(answers.all())
