"""Who carries the rows of a layer: programs, DeepEP, or the core's own exchange."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.distributed as dist

from mortise.plugin import (
    NOT_SUPPORTED,
    BackendUnusableError,
    DispatchMode,
    NotSupported,
    ReasonCode,
)
from mortise_cuda_common.dispatchers.connection import Connection
from mortise_cuda_common.dispatchers.low_latency import LowLatencyExchange
from mortise_cuda_common.dispatchers.normal import NormalExchange
from mortise_cuda_common.environment import read_environment
from mortise_cuda_common.exchange_limits import (
    DEFAULT_QUEUE_DEPTH,
    Refusal,
    queue_depth,
    refusal,
)
from mortise_cuda_common.libraries.deep_ep import DeepEP
from mortise_cuda_common.local import PERMUTED, ProgramDispatcher

if TYPE_CHECKING:
    from mortise.plugin import TokenDispatcher, TokenDispatcherRequest
    from mortise_cuda_common.environment import VendorEnvironment
    from mortise_cuda_common.runtime import Runtime

Choice = Literal["auto", "deep_ep", "portable"]
"""``auto`` is DeepEP where it carries a layer's rows, and else the core's exchange over NCCL."""


class Exchanges:
    """The exchanges of one backend, which share a connection between its ranks.

    Args:
        runtime: the chip and what computes on it.
        choice: what the configuration says.
        backend: name of the backend, for messages.
        environment: what the library finds; None is that of this process.
    """

    def __init__(
        self,
        runtime: Runtime,
        choice: Choice,
        backend: str,
        environment: VendorEnvironment | None = None,
    ) -> None:
        self._runtime = runtime
        self._choice = choice
        self._backend = backend
        self._environment = read_environment() if environment is None else environment
        self._library: DeepEP | Refusal | None = None
        # The connection keeps the group, so that no other can have its number.
        self._connections: dict[int, Connection] = {}
        self._told: set[str] = set()

    def create_token_dispatcher(
        self, request: TokenDispatcherRequest
    ) -> TokenDispatcher | NotSupported:
        """Make the exchange of one layer and mode, or leave it to the core.

        Warns:
            RuntimeWarning: the core's exchange stands in for DeepEP, and why; once for each reason.

        Raises:
            BackendUnusableError: the configuration demands DeepEP, and it does not carry the rows.
        """
        if request.world_size == 1:
            permuted = request.format is not None and request.format.dtype in PERMUTED
            return ProgramDispatcher(self._runtime, request) if permuted else NOT_SUPPORTED
        if self._choice == "portable":
            return NOT_SUPPORTED
        planned = self._planned(request)
        if not _every_rank(request, not isinstance(planned, Refusal)):
            if not isinstance(planned, Refusal):
                planned = Refusal("it does not carry the rows of another process")
            return self._refused(request, planned)
        assert not isinstance(planned, Refusal)
        planned.make_room(request)
        if request.mode is DispatchMode.NORMAL:
            return NormalExchange(self._runtime, request, planned)
        return LowLatencyExchange(request, planned)

    def _planned(self, request: TokenDispatcherRequest) -> Connection | Refusal:
        """What the rows would go through, or why they cannot."""
        why = refusal(request, self._runtime.chip.num_sms, self._environment)
        if why is not None:
            return why
        if self._library is None:
            self._library = self._load()
        if isinstance(self._library, Refusal):
            return self._library
        group = cast("dist.ProcessGroup", request.process_group)
        if id(group) not in self._connections:
            self._connections[id(group)] = Connection(self._library, group)
        connection = self._connections[id(group)]
        try:
            fits = connection.fits(request)
        except BackendUnusableError as error:
            return Refusal(error.what, error.remedy or "")
        if not fits:
            return Refusal("its buffer is open already, and too small for a layer that came later")
        return connection

    def _load(self) -> DeepEP | Refusal:
        """The library, or why there is none: other ranks must hear of it before it is an error."""
        try:
            if self._runtime.emulated:
                depth = queue_depth(self._environment) or DEFAULT_QUEUE_DEPTH
                return DeepEP.emulated(self._runtime.chip, depth)
            return DeepEP.load()
        except BackendUnusableError as error:
            return Refusal(error.what, error.remedy or "")

    def _refused(self, request: TokenDispatcherRequest, why: Refusal) -> NotSupported:
        if self._choice == "deep_ep":
            raise BackendUnusableError(
                f"layer {request.layer}: DeepEP does not carry its rows: {why.reason}",
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                details=[f"option exchange of backend {self._backend} is 'deep_ep'"],
                remedy=why.remedy or "set it to 'auto' or 'portable': the core has an exchange",
            )
        if not why.expected and why.reason not in self._told:
            self._told.add(why.reason)
            advice = f" ({why.remedy})" if why.remedy else ""
            warnings.warn(
                f"the core's exchange sends tokens to their experts instead of DeepEP: {why.reason}"
                f"{advice}",
                RuntimeWarning,
                stacklevel=2,
            )
        return NOT_SUPPORTED


def _every_rank(request: TokenDispatcherRequest, own: bool) -> bool:
    """Whether all ranks say yes: half of them in one exchange and half in another would wait."""
    answers = torch.empty(request.world_size, dtype=torch.int64)
    group = cast("dist.ProcessGroup", request.process_group)
    dist.all_to_all_single(answers, torch.full_like(answers, int(own)), group=group)
    return bool(answers.all())
