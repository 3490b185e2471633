"""What the emulated chips of each generation can and cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.dispatch import Generation

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FACTS", "ChipFacts", "Generation"]


@dataclass(frozen=True)
class ChipFacts:
    """Facts of one generation, from the manuals of the operators.

    Attributes:
        soc: how the names of its chips begin, as ``torch_npu.npu.get_device_name`` gives them.
        internal_formats: the default of ``torch_npu.npu.config.allow_internal_format``.
        float8: whether its matrix units and quantisers know float8.
        int4_rows: whether a grouped product takes int4 rows with int4 weights (W4A4).
        int8_outputs: (dtype of the weight's scale, dtype of the result) of an int8 grouped product
            with one scale per row.
        routing_quant_modes: values of ``quant_mode`` that ``npu_moe_init_routing_v2`` takes here
            and the emulator computes; -1 none, 0 static int8, 1 dynamic int8, 13 dynamic int4.
    """

    soc: str
    internal_formats: bool
    float8: bool
    int4_rows: bool
    int8_outputs: frozenset[tuple[torch.dtype, torch.dtype]]
    routing_quant_modes: frozenset[int] = frozenset({-1, 0, 1})


_OLDER_OUTPUTS: Final = frozenset(
    {(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)}
)

FACTS: Final[Mapping[Generation, ChipFacts]] = MappingProxyType(
    {
        Generation.A2: ChipFacts(
            soc="Ascend910B",
            internal_formats=True,
            float8=False,
            int4_rows=True,
            int8_outputs=_OLDER_OUTPUTS,
        ),
        Generation.A3: ChipFacts(
            soc="Ascend910_93",
            internal_formats=False,
            float8=False,
            int4_rows=True,
            int8_outputs=_OLDER_OUTPUTS,
        ),
        Generation.A5: ChipFacts(
            soc="Ascend950",
            internal_formats=False,
            float8=True,
            int4_rows=False,
            int8_outputs=_OLDER_OUTPUTS | {(torch.float32, torch.bfloat16)},
            routing_quant_modes=frozenset({-1, 0, 1, 13}),
        ),
    }
)
"""By generation; A5's default for internal formats is undocumented, so the stricter one stands."""
