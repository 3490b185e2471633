"""Dtypes as torch_npu's integer arguments give them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

INT4: Final = 285
HIFLOAT8: Final = 290
FLOAT8_E5M2: Final = 291
FLOAT8_E4M3FN: Final = 292
FLOAT8_E8M0FNU: Final = 293
FLOAT4_E2M1FN_X2: Final = 296
FLOAT4_E1M2FN_X2: Final = 297
"""Dtypes that torch_npu adds to torch's own, by the integers that it gives them."""

QINT8: Final = 12
QUINT8: Final = 13
QINT32: Final = 14
QUINT4X2: Final = 16
"""Dtypes that only ask for something: the result is a plain integer tensor.

Torch passes a ``torch.dtype`` as this integer where the schema says ``int``. ``QUINT4X2`` asks for
int4 in words of eight, of dtype int32.
"""

_TORCH_DTYPES: Final[Mapping[int, torch.dtype]] = MappingProxyType(
    {
        0: torch.uint8,
        1: torch.int8,
        2: torch.int16,
        3: torch.int32,
        4: torch.int64,
        5: torch.float16,
        6: torch.float32,
        7: torch.float64,
        11: torch.bool,
        15: torch.bfloat16,
        23: torch.float8_e5m2,
        24: torch.float8_e4m3fn,
        FLOAT8_E5M2: torch.float8_e5m2,
        FLOAT8_E4M3FN: torch.float8_e4m3fn,
    }
)


def dtype_of(number: int | None) -> torch.dtype | None:
    """The dtype of tensors that a number means; None for None and where torch has no such dtype."""
    return None if number is None else _TORCH_DTYPES.get(number)
