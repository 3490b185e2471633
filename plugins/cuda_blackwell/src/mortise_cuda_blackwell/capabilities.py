"""What a Blackwell GPU serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import Capabilities, DispatchDtype, IndexKeyDtype, WeightScheme
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.limits import COMMON_SCHEMES

if TYPE_CHECKING:
    from mortise_cuda_blackwell.options import Options
    from mortise_cuda_common.runtime import Runtime

NAME: Final = "cuda_blackwell"
ARCHITECTURES: Final = (Architecture.SM100, Architecture.SM103)

COMPUTE_DTYPES: Final = (torch.bfloat16, torch.float32)
"""Dtypes of the hidden state, best first; float32 is for unquantised models."""

SCHEMES: Final = COMMON_SCHEMES | {WeightScheme.NVFP4}

DISPATCH_DTYPES: Final = frozenset(
    {DispatchDtype.FP32, DispatchDtype.BF16, DispatchDtype.FP8_E4M3, DispatchDtype.NVFP4}
)

INDEX_KEY_DTYPES: Final = (IndexKeyDtype.FP8_E4M3, IndexKeyDtype.COMPUTE)
"""DeepGEMM scores fp8 keys alone; the backend's own program scores both."""

PAGE_SIZE: Final = 64


def capabilities_of(runtime: Runtime, options: Options) -> Capabilities:
    """The facts of one bound backend.

    Args:
        runtime: the chip and what computes on it.
        options: the checked table of the configuration.
    """
    return Capabilities(
        device=runtime.device,
        emulated=runtime.emulated,
        schemes=SCHEMES,
        dispatch_dtypes=DISPATCH_DTYPES,
        compute_dtypes=COMPUTE_DTYPES,
        page_sizes=frozenset({PAGE_SIZE}),
        num_workers=options.num_workers or runtime.chip.num_sms,
        max_native_next_n=_most_native_next_n(runtime, options),
        process_group_backend="gloo" if runtime.emulated else "cpu:gloo,cuda:nccl",
        index_key_dtypes=INDEX_KEY_DTYPES,
    )


def _most_native_next_n(runtime: Runtime, options: Options) -> int:
    """What DeepGEMM takes; the backend's own program makes a row of its own of every token."""
    deep_gemm = None if options.indexer == "triton" else runtime.deep_gemm
    return 1 if deep_gemm is None else deep_gemm.most_native_next_n
