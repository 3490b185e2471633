"""What stands in for the module ``deep_ep`` on one emulated chip."""

# Names, arguments, results and refusals are those of ``deep_ep.Buffer`` (deepseek-ai/DeepEP at
# dd758ca and v1.2.1, MIT licence), so that code which calls the one calls the other.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mortise_cuda_common.emulator.deep_ep.buffer import EmulatedBuffer
from mortise_cuda_common.emulator.deep_ep.config import Config
from mortise_cuda_common.emulator.deep_ep.event import EventOverlap

if TYPE_CHECKING:
    from mortise_cuda_common.chip import Chip


@dataclass(frozen=True)
class EmulatedDeepEP:
    """The module on one chip.

    Attributes:
        chip: which.
        queue_depth: what the variable ``NVSHMEM_QP_DEPTH`` would say.
        seed: of the order in which rows of the low-latency exchange arrive.
    """

    chip: Chip
    queue_depth: int = 1024
    seed: int = 0

    __version__ = "emulated"
    Config = Config
    EventOverlap = EventOverlap
    topk_idx_t = torch.int64

    @property
    def Buffer(self) -> type[EmulatedBuffer]:  # noqa: N802 - the vendor's name
        """The class of the buffers, which belong to this chip."""
        members = {"chip": self.chip, "nvshmem_qp_depth": self.queue_depth, "seed": self.seed}
        return type("Buffer", (EmulatedBuffer,), members)
