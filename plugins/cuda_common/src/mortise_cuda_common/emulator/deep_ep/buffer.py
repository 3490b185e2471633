"""``deep_ep.Buffer`` over torch.distributed."""

from __future__ import annotations

from mortise_cuda_common.emulator.deep_ep.low_latency_calls import LowLatencyCalls
from mortise_cuda_common.emulator.deep_ep.normal_calls import NormalCalls


class EmulatedBuffer(NormalCalls, LowLatencyCalls):
    """Both modes on one memory, as the vendor has it."""
