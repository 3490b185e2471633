"""One buffer of DeepEP between the ranks of a group, opened when rows first go through it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mortise.plugin import ContractError, DispatchMode, ReasonCode
from mortise_cuda_common.libraries.deep_ep import BufferSize

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from mortise.plugin import TokenDispatcherRequest
    from mortise_cuda_common.libraries.deep_ep import DeepEP


class Connection:
    """Serves all layers and both modes, as the library wants it: it has one NVSHMEM in a process.

    Layers say how large it must be while the model is built; it is opened by the first exchange,
    which every rank takes part in. Low-latency exchanges share flags, which must be zero when one
    begins and lie where its sizes say: the library clears them behind an exchange of the same
    sizes only, so after any other exchange they are cleaned here.

    Args:
        library: which makes the buffer.
        group: the ranks.
    """

    __slots__ = ("_buffer", "_clean_for", "_group", "_size", "_waiting", "library")

    def __init__(self, library: DeepEP, group: dist.ProcessGroup) -> None:
        self.library = library
        self._group = group
        self._size = BufferSize()
        self._buffer: Any | None = None
        self._clean_for: tuple[int, int, int] | None = None
        self._waiting = ""

    def fits(self, request: TokenDispatcherRequest) -> bool:
        """Whether the buffer is large enough for a layer, or can still become so.

        Raises:
            BackendUnusableError: the library has no buffer for it.
        """
        needed = self._with(request)
        return self._buffer is None or needed == self._size

    def make_room(self, request: TokenDispatcherRequest) -> None:
        """Have it opened large enough for a layer."""
        assert self.fits(request)
        self._size = self._with(request)

    def normal(self, layer: str) -> Any:
        """The buffer, for a normal exchange; it leaves the flags of low-latency ones dirty."""
        self._nothing_waits(layer)
        self._clean_for = None
        return self._opened()

    def low_latency(self, request: TokenDispatcherRequest) -> Any:
        """The buffer, for a low-latency exchange of these sizes."""
        self._nothing_waits(request.layer)
        sizes = (request.max_tokens_per_rank, request.hidden_size, request.num_experts)
        is_new = self._buffer is None
        buffer = self._opened()
        if self._clean_for != sizes and not is_new:
            buffer.clean_low_latency_buffer(*sizes)
        self._clean_for = sizes
        return buffer

    def wait(self, layer: str) -> None:
        """An exchange of this layer is under way: no other may begin before it was received."""
        self._waiting = layer

    def received(self) -> None:
        """It is not any more."""
        self._waiting = ""

    def ids(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Experts' numbers as the library takes them."""
        return ids_TK.to(self.library.id_dtype).contiguous()

    def _nothing_waits(self, layer: str) -> None:
        if self._waiting:
            raise ContractError(
                f"layer {layer}: an exchange begins while that of layer {self._waiting} has not"
                " been received",
                reason=ReasonCode.CONTRACT_BROKEN,
                expected="receive() of the dispatched tokens before the next exchange: DeepEP"
                " clears the flags that it waits for",
            )

    def _opened(self) -> Any:
        if self._buffer is None:
            self._buffer = self.library.open(self._group, self._size)
        return self._buffer

    def _with(self, request: TokenDispatcherRequest) -> BufferSize:
        size, needed = self._size, self._needed(request)
        return replace(
            size,
            nvlink_bytes=max(size.nvlink_bytes, needed.nvlink_bytes),
            rdma_bytes=max(size.rdma_bytes, needed.rdma_bytes),
            low_latency=size.low_latency or needed.low_latency,
            num_queue_pairs=max(size.num_queue_pairs, needed.num_queue_pairs),
        )

    def _needed(self, request: TokenDispatcherRequest) -> BufferSize:
        if request.mode is DispatchMode.NORMAL:
            return self.library.normal_size(request.hidden_size, request.world_size)
        return self.library.low_latency_size(
            request.max_tokens_per_rank,
            request.hidden_size,
            request.world_size,
            request.num_experts,
        )
