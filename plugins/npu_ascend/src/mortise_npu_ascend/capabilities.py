"""What each generation of the chip serves."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise.plugin import Capabilities, DispatchDtype, WeightScheme
from mortise_npu_ascend.dispatch import Generation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise_npu_ascend.vendor import Vendor

COMPUTE_DTYPES: Final = (torch.bfloat16, torch.float32)
"""Dtypes of the hidden state, best first; float32 is for unquantised models."""

QUANTISED_DTYPES: Final = (torch.bfloat16,)
"""Dtypes that quantised products give back: the chip's quantisers take no float32 rows."""

PAGE_SIZE: Final = 64

_OLDER: Final = frozenset(
    {
        WeightScheme.FLOAT,
        WeightScheme.W8A8,
        WeightScheme.W4A8,
        WeightScheme.W4A4,
        WeightScheme.W4A16,
    }
)

SCHEMES: Final[Mapping[Generation, frozenset[WeightScheme]]] = MappingProxyType(
    {
        Generation.A2: _OLDER,
        Generation.A3: _OLDER,
        # Its tables of the grouped product list int8 rows with int4 weights and no int4 rows.
        Generation.A5: _OLDER - {WeightScheme.W4A4},
    }
)

DISPATCH_DTYPES: Final = frozenset({DispatchDtype.FP32, DispatchDtype.BF16, DispatchDtype.INT8})
"""Rows that some experts consume here; the A5 could send fp8, for which it has no experts."""

EMULATED_WORKERS: Final = 24
"""Stands for the matrix units of an emulated chip; chips of one generation differ in theirs."""


def capabilities_of(vendor: Vendor, num_workers: int | None) -> Capabilities:
    """The facts of one bound backend.

    Args:
        vendor: the operators and their device.
        num_workers: what the configuration says, None if nothing.
    """
    return Capabilities(
        device=vendor.device,
        emulated=vendor.emulated,
        schemes=SCHEMES[vendor.generation],
        dispatch_dtypes=DISPATCH_DTYPES,
        compute_dtypes=COMPUTE_DTYPES,
        page_sizes=frozenset({PAGE_SIZE}),
        num_workers=num_workers or _matrix_units(vendor),
        process_group_backend="gloo" if vendor.emulated else "cpu:gloo,npu:hccl",
    )


def _matrix_units(vendor: Vendor) -> int:
    if vendor.emulated:
        return EMULATED_WORKERS
    limits = vendor.torch_npu.npu.get_device_limit(vendor.device.index)
    return int(limits["cube_core_num"])
