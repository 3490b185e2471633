"""Which dtypes a grouped product takes together, by generation: one table of modes."""

# Source: the tables of aclnnGroupedMatmulV5 and aclnnGroupedMatmulWeightNz (ops-transformer).

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.generation import Generation

if TYPE_CHECKING:
    from collections.abc import Mapping


class Mode(StrEnum):
    """Modes of a grouped product, by what the vendor's messages call them."""

    FLOAT = "non-quant"
    A8W8 = "A8W8 quant"
    A8W4 = "A8W4 weight quant"
    A4W4 = "A4W4 quant"
    A16W8 = "A16W8 antiquant"
    A16W4 = "A16W4 antiquant"


WORDS: Final = torch.int32
"""The dtype of eight int4 values: torch has none of four bits."""

MODES: Final[Mapping[tuple[torch.dtype, torch.dtype], Mode]] = MappingProxyType(
    {
        (torch.bfloat16, torch.bfloat16): Mode.FLOAT,
        (torch.float16, torch.float16): Mode.FLOAT,
        (torch.float32, torch.float32): Mode.FLOAT,
        (torch.int8, torch.int8): Mode.A8W8,
        (torch.int8, WORDS): Mode.A8W4,
        (WORDS, WORDS): Mode.A4W4,
        (torch.bfloat16, torch.int8): Mode.A16W8,
        (torch.float16, torch.int8): Mode.A16W8,
        (torch.bfloat16, WORDS): Mode.A16W4,
        (torch.float16, WORDS): Mode.A16W4,
    }
)
"""The mode that the dtypes of rows and weight ask for; any other pair is refused."""

WEIGHT_ONLY: Final = frozenset({Mode.A16W8, Mode.A16W4})
INT4_WEIGHTS: Final = frozenset({Mode.A8W4, Mode.A4W4})

ACTIVATIONS: Final = frozenset({0, 1, 2, 4, 5})
"""Values of ``act_type``: none, ReLU, GELU by tanh, fast GELU, SiLU; 3, exact GELU, is not."""

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_INT64, _UINT64 = torch.int64, torch.uint64


@dataclass(frozen=True)
class GroupedFacts:
    """What differs between generations in grouped products.

    Attributes:
        scale_outputs: (dtype of the weight's scale, dtype of the result) of int8 rows and weights
            without a scale for each row; int32 results need no scale. With one, see
            :attr:`ChipFacts.int8_outputs`.
        float_bias: dtypes of the bias by dtype of rows that are not quantised.
        weight_only_bias: the same where only the weight is quantised.
        int8_bias: dtypes of the bias by dtype of the result, int8 rows and weights.
        assist_bias: whether int4 weights with int8 rows need 8 times the sum of their columns.
        offset_of_int8: whether int8 weights with floating-point rows need an offset.
        ignores_activations: whether an activation that a kernel lacks is ignored, not refused.
        weight_only_groups: sizes of groups that int4 weights with floating-point rows may have;
            empty: any that divides K.
        pairs_for_float: whether group lists of pairs are taken with rows that are not quantised.
    """

    scale_outputs: frozenset[tuple[torch.dtype, torch.dtype]]
    float_bias: Mapping[torch.dtype, frozenset[torch.dtype]]
    weight_only_bias: Mapping[torch.dtype, frozenset[torch.dtype]]
    int8_bias: Mapping[torch.dtype, frozenset[torch.dtype]]
    assist_bias: bool
    offset_of_int8: bool
    ignores_activations: bool
    weight_only_groups: frozenset[int]
    pairs_for_float: bool


def _table(**sets: set[torch.dtype]) -> Mapping[torch.dtype, frozenset[torch.dtype]]:
    return MappingProxyType(
        {getattr(torch, name): frozenset(given) for name, given in sets.items()}
    )


_OLDER: Final = GroupedFacts(
    scale_outputs=frozenset(
        {(_INT64, torch.int8), (_UINT64, torch.int8), (_BF16, _BF16), (_FP32, _FP16)}
    ),
    float_bias=_table(bfloat16={_FP32}, float16={_FP16}, float32={_FP32}),
    weight_only_bias=_table(bfloat16={_FP32}, float16={_FP16}),
    int8_bias=_table(
        bfloat16={torch.int32, _BF16},
        float16={torch.int32, _BF16},
        int8={torch.int32},
        int32={torch.int32},
    ),
    assist_bias=True,
    offset_of_int8=True,
    ignores_activations=True,
    weight_only_groups=frozenset(),
    pairs_for_float=True,
)

GROUPED_FACTS: Final[Mapping[Generation, GroupedFacts]] = MappingProxyType(
    {
        Generation.A2: _OLDER,
        Generation.A3: _OLDER,
        Generation.A5: GroupedFacts(
            scale_outputs=frozenset(
                {(word, out) for word in (_INT64, _UINT64) for out in (_BF16, _FP16, torch.int8)}
                | {(_BF16, _BF16), (_FP32, _BF16), (_FP32, _FP16)}
            ),
            float_bias=_table(bfloat16={_BF16, _FP32}, float16={_FP16, _FP32}, float32={_FP32}),
            weight_only_bias=_table(bfloat16={_BF16, _FP32}, float16={_FP16}),
            int8_bias=_table(
                bfloat16={torch.int32, _BF16, _FP32},
                float16={torch.int32, _FP16, _FP32},
                int8={torch.int32},
                int32={torch.int32},
            ),
            assist_bias=False,
            offset_of_int8=False,
            ignores_activations=False,
            weight_only_groups=frozenset({32, 64, 128, 256}),
            pairs_for_float=False,
        ),
    }
)
"""By generation."""
