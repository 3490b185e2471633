"""The memory that both exchanges go through: when it is dirty, and what is still under way."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from mortise_cuda_common.emulator.deep_ep.config import (
    ALIGNMENT,
    MOST_NVLINK_PEERS,
    Config,
    low_latency_bytes,
    low_latency_hint,
)
from mortise_cuda_common.emulator.deep_ep.packets import gather
from mortise_cuda_common.emulator.deep_ep.refusal import device_needs, need

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist

    from mortise_cuda_common.chip import Chip
    from mortise_cuda_common.emulator.deep_ep.low_latency import Shape

NORMAL_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
_MOST_FACTS = 8


class BufferMemory:
    """What a buffer is made of; every rank makes every call.

    What silicon leaves undefined is poison here; where it would hang or overwrite memory, a
    ``RuntimeError`` says so. One exchange of the low-latency mode at most may be under way: the
    next one clears the flags that the first still waits for (deepseek-ai/DeepEP issue 513).

    Args:
        group: the ranks.
        num_nvl_bytes: memory of the normal exchange.
        num_rdma_bytes: memory of the low-latency exchange.
        low_latency_mode: whether low-latency exchanges may go through it.
        num_qps_per_rank: at least as many as experts of a rank, for the low-latency exchange.
        explicitly_destroy: whether ``destroy`` will be called.
    """

    chip: Chip
    nvshmem_qp_depth: int
    seed: int
    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        need(num_nvl_bytes % ALIGNMENT == 0, "num_nvl_bytes % NUM_BUFFER_ALIGNMENT_BYTES == 0")
        need(num_rdma_bytes % ALIGNMENT == 0, "num_rdma_bytes % NUM_BUFFER_ALIGNMENT_BYTES == 0")
        ranks = group.size()
        need(
            ranks < MOST_NVLINK_PEERS or ranks % MOST_NVLINK_PEERS == 0,
            "num_ranks < NUM_MAX_NVL_PEERS or num_ranks % NUM_MAX_NVL_PEERS == 0",
        )
        need(
            not num_rdma_bytes or ranks > MOST_NVLINK_PEERS or low_latency_mode,
            "num_ranks > NUM_MAX_NVL_PEERS or low_latency_mode",
        )
        self.group = group
        self.rank = group.rank()
        self.group_size = ranks
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.num_qps_per_rank = num_qps_per_rank
        self.explicitly_destroy = explicitly_destroy
        self._generator = torch.Generator().manual_seed(1000 * self.seed + self.rank)
        self._waiting: Callable[[], None] | None = None
        self._clean_for: tuple[int, int, int] | None = None
        self._dirty = False
        self._agree("a buffer", num_nvl_bytes, num_rdma_bytes, int(low_latency_mode))

    def destroy(self) -> None:
        """Let go of the memory.

        Raises:
            AssertionError: it was not announced when the buffer was made.
        """
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,  # noqa: ARG004 - the vendor's signature
        num_experts: int,
    ) -> int:
        """Bytes of ``num_rdma_bytes`` for a low-latency exchange."""
        return low_latency_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Queues of a normal dispatch.

        Raises:
            AssertionError: a number of ranks that the library has no table of.
        """
        assert num_ranks in NORMAL_RANKS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(num_max_nvl_chunked_send_tokens=24 if num_ranks == 2 else 6)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Queues of a normal combine.

        Raises:
            AssertionError: a number of ranks that the library has no table of.
        """
        assert num_ranks in NORMAL_RANKS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(num_max_nvl_chunked_send_tokens=10 if num_ranks == 2 else 4)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Set the flags of both buffers to zero, as exchanges of these sizes want them.

        Raises:
            RuntimeError: what the library refuses, or an exchange is still under way.
        """
        need(self.low_latency_mode, "low_latency_mode")
        self._nothing_waits("clean_low_latency_buffer")
        shape = (num_max_dispatch_tokens_per_rank, hidden, num_experts)
        self._agree("a cleaning", *shape)
        self._dirty, self._clean_for = False, shape

    def begin_normal(self, what: str, *facts: int) -> None:
        """Refuse a normal exchange that cannot be, on every rank alike; it leaves memory dirty."""
        self._nothing_waits(what)
        self._agree(what, *facts)
        self._dirty = True

    def begin_low_latency(
        self, what: str, shape: Shape, async_finish: bool, return_recv_hook: bool
    ) -> None:
        """Refuse a low-latency exchange that cannot be, on every rank alike."""
        sizes = (shape.max_tokens, shape.hidden, shape.num_experts)
        self._agree(what, *sizes, shape.use_fp8, shape.round_scale, shape.use_ue8m0)
        used = low_latency_bytes(*sizes)
        need(used <= self.num_rdma_bytes, "layout.total_bytes <= num_rdma_bytes")
        need(not (async_finish and return_recv_hook), "not(async and return_recv_hook)")
        device_needs(
            self.num_qps_per_rank >= shape.num_experts // self.group_size,
            "ibgda_get_state()->num_rc_per_pe >= num_local_experts",
        )
        self._nothing_waits(what)
        device_needs(
            not self._dirty and self._clean_for in (None, sizes),
            f"{what} after other exchanges, without clean_low_latency_buffer",
        )
        self._clean_for = sizes

    def _nothing_waits(self, what: str) -> None:
        device_needs(
            self._waiting is None,
            f"{what} while another low-latency exchange was not received, which then waits forever",
        )

    def _agree(self, what: str, *facts: int) -> None:
        """Raise on every rank where they do not make the same call."""
        numbers = torch.zeros(_MOST_FACTS, dtype=torch.int64)
        numbers[: 1 + len(facts)] = torch.tensor([zlib.crc32(what.encode()), *map(int, facts)])
        every = gather(self.group, numbers)
        told = [row[1 : 1 + len(facts)].tolist() for row in every]
        device_needs(bool((every == every[0]).all()), f"ranks do not agree on {what}: {told}")

    def received(
        self, receive: Callable[[], None], return_recv_hook: bool
    ) -> Callable[[], None] | None:
        """Receive at once, or return what does it once."""
        if not return_recv_hook:
            receive()
            return None

        def hook() -> None:
            device_needs(self._waiting is hook, "a hook that was called before")
            self._waiting = None
            receive()

        self._waiting = hook
        return hook
