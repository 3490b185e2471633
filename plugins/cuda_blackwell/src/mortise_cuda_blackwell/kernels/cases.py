"""What the cases of these kernels, compiled ahead of time, have in common."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from mortise_cuda_common.chip import Architecture

BLACKWELL: Final = (Architecture.SM100, Architecture.SM103)

COUNTS: Final = MappingProxyType({"first_rows": "*i32", "counts": "*i32"})
"""The last parameters of every program: which rows belong to which expert."""

STRIDES: Final = MappingProxyType({"row_stride": "i32", "scale_row_stride": "i32"})
"""Of rows and of their scales."""

ADJACENT: Final = MappingProxyType({"scale_column_stride": 1})
"""A stride of 1 is compiled in: scales as dispatched rows have them."""

FP4_INSTRUCTION: Final = MappingProxyType(
    dict.fromkeys(BLACKWELL, r"tcgen05\.mma\S*kind::mxf4nvf4\S*scale_vec::4X")
)
"""The product of float4 by float4 under a scale for each 16 columns."""

BF16_INSTRUCTION: Final = MappingProxyType(dict.fromkeys(BLACKWELL, r"tcgen05\.mma\S*kind::f16"))
"""The product of bfloat16."""
