"""How much memory the exchanges want, by the vendor's formulas."""

# csrc/legacy/config.hpp of deepseek-ai/DeepEP.

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mortise_cuda_common.emulator.deep_ep.refusal import need

MOST_NVLINK_PEERS: Final = 8
ALIGNMENT: Final = 128
_MOST_CHOICES: Final = 128
_MOST_SCALES: Final = 128
_SOURCE_META: Final = 8
_ID: Final = 8
_FLOAT: Final = 4
_INT4: Final = 16
_BF16: Final = 2


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of the queues of a normal exchange.

    Attributes:
        num_sms: multiprocessors that exchange; two of them are a channel.
        num_max_nvl_chunked_send_tokens: of one chunk, over NVLink.
        num_max_nvl_chunked_recv_tokens: of one queue, over NVLink.
        num_max_rdma_chunked_send_tokens: of one chunk, between machines.
        num_max_rdma_chunked_recv_tokens: of one queue, between machines.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        need(self.num_sms >= 0, "num_sms >= 0")
        need(
            0 < self.num_max_nvl_chunked_send_tokens < self.num_max_nvl_chunked_recv_tokens,
            "num_max_nvl_chunked_send_tokens < num_max_nvl_chunked_recv_tokens",
        )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes over NVLink, for rows of ``hidden_bytes``."""
        nvlink_ranks = min(num_ranks, MOST_NVLINK_PEERS)
        machines = max(num_ranks // MOST_NVLINK_PEERS, 1)
        of_token = hidden_bytes + _SOURCE_META + _MOST_CHOICES * (_ID + _FLOAT) + _MOST_SCALES * 4
        of_queue = (2 * machines + 3) * 4 + self.num_max_nvl_chunked_recv_tokens * of_token
        return _aligned(self.num_sms // 2 * nvlink_ranks * of_queue)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes between machines; none for the ranks of one."""
        if num_ranks <= MOST_NVLINK_PEERS:
            return 0
        machines = num_ranks // MOST_NVLINK_PEERS
        received = self.num_max_rdma_chunked_recv_tokens
        of_token = hidden_bytes + _SOURCE_META + _MOST_CHOICES * (_ID + _FLOAT) + _MOST_SCALES * 4
        of_queue = 2 * ((MOST_NVLINK_PEERS * 2 + 2) * 4 + received * (of_token + _INT4))
        return _aligned(self.num_sms // 2 * machines * of_queue)

    def needed_nvl_bytes(
        self, num_ranks: int, row_bytes: int, num_choices: int, num_scales: int
    ) -> int:
        """Bytes that one dispatch uses within a machine."""
        queues = self.num_sms // 2 * num_ranks
        of_token = row_bytes + 4 + num_choices * (_ID + _FLOAT) + num_scales * _FLOAT
        of_queue = 4 * 4 + self.num_max_nvl_chunked_recv_tokens * of_token
        return num_ranks * num_ranks * 4 + queues * of_queue


def low_latency_bytes(tokens: int, hidden: int, num_experts: int) -> int:
    """Bytes of both buffers of a low-latency exchange, of bf16 rows."""
    scales = hidden // 128
    of_dispatch = _INT4 + max(hidden * _BF16, hidden + scales * _FLOAT)
    of_combine = scales * 2 * _BF16 + hidden * _BF16
    send = max(tokens * of_dispatch, num_experts * tokens * of_combine)
    receive = num_experts * tokens * max(of_dispatch, of_combine)
    signals = _aligned(num_experts * 4)
    return 2 * (send + receive + signals)


def low_latency_hint(tokens: int, hidden: int, num_experts: int) -> int:
    """The bytes that are recommended, always more than are used."""
    used = low_latency_bytes(tokens, hidden, num_experts)
    return (used + ALIGNMENT) // ALIGNMENT * ALIGNMENT


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
