"""What a Hopper GPU serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import Capabilities, DispatchDtype, IndexKeyDtype, WeightScheme
from mortise_cuda_common.chip import Architecture

if TYPE_CHECKING:
    from mortise_cuda_common.runtime import Runtime

NAME: Final = "cuda_hopper"
ARCHITECTURES: Final = (Architecture.SM90,)

COMPUTE_DTYPES: Final = (torch.bfloat16, torch.float32)
"""Dtypes of the hidden state, best first; float32 is for unquantised models."""

SCHEMES: Final = frozenset({WeightScheme.FLOAT, WeightScheme.FP8_BLOCK, WeightScheme.W4A16})

DISPATCH_DTYPES: Final = frozenset({DispatchDtype.FP32, DispatchDtype.BF16, DispatchDtype.FP8_E4M3})

INDEX_KEY_DTYPES: Final = (IndexKeyDtype.FP8_E4M3, IndexKeyDtype.COMPUTE)
"""DeepGEMM scores fp8 keys alone; the backend's own program scores both."""

PAGE_SIZE: Final = 64
MOST_NATIVE_NEXT_N: Final = 2


def capabilities_of(runtime: Runtime, num_workers: int | None) -> Capabilities:
    """The facts of one bound backend.

    Args:
        runtime: the chip and what computes on it.
        num_workers: what the configuration says, None if nothing.
    """
    return Capabilities(
        device=runtime.device,
        emulated=runtime.emulated,
        schemes=SCHEMES,
        dispatch_dtypes=DISPATCH_DTYPES,
        compute_dtypes=COMPUTE_DTYPES,
        page_sizes=frozenset({PAGE_SIZE}),
        num_workers=num_workers or runtime.chip.num_sms,
        max_native_next_n=MOST_NATIVE_NEXT_N,
        process_group_backend="gloo" if runtime.emulated else "cpu:gloo,cuda:nccl",
        index_key_dtypes=INDEX_KEY_DTYPES,
    )
