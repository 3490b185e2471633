"""Calls of the quantisers, the word packers and the activations that quantise."""

from __future__ import annotations

from typing import Any, Final

import torch
from plugins.npu_ascend.tests.oracle.case import Case

M, H, E = 4, 64, 2

ROWS: Final = torch.linspace(-2, 2, M * H).view(M, H).bfloat16()
CUBE: Final = ROWS.view(2, 2, H).half()
ENDS: Final = torch.tensor([1, M], dtype=torch.int32)
COUNTS: Final = torch.tensor([1, 2])


def dynamic(says: str, x: torch.Tensor, generation: str = "A2", **asked: Any) -> tuple[Case, ...]:
    return tuple(
        Case(f"npu_dynamic_quant{kind}", says, (x,), asked, generation)
        for kind in ("", "_asymmetric")
    )


DYNAMIC: Final = (
    *dynamic("rows", ROWS),
    *dynamic("three axes", CUBE),
    *dynamic("int8", ROWS, dst_type=torch.int8),
    *dynamic("int4 words", ROWS, dst_type=torch.quint4x2),
    *dynamic("smooth", ROWS, smooth_scales=torch.ones(H).bfloat16()),
    *dynamic("smooth experts", ROWS, smooth_scales=torch.ones(E, H).bfloat16(), group_index=ENDS),
    *(
        Case("npu_dynamic_quant", mode, (ROWS,), {"quant_mode": mode}, "A5")
        for mode in ("pertensor", "perchannel")
    ),
    *dynamic("newest", ROWS, generation="A5"),
)

BY_SCALE: Final = (
    *(
        Case(
            "npu_quantize",
            f"to {dtype}, divided: {divided}",
            (ROWS, torch.ones(H).bfloat16(), torch.ones(H).bfloat16()),
            {"dtype": dtype, "axis": -1, "div_mode": divided},
        )
        for dtype, divided in (
            (torch.qint8, True),
            (torch.quint8, True),
            (torch.qint32, True),
            (torch.qint8, False),
            (torch.quint4x2, False),
        )
    ),
)

WORDS: Final = (
    Case("npu_trans_quant_param", "scales", (torch.ones(H),)),
    Case("npu_trans_quant_param", "one axis more", (torch.ones(1, H),)),
    Case("npu_trans_quant_param", "offsets", (torch.ones(1), torch.ones(H))),
    Case("npu_convert_weight_to_int4pack", "matrix", (torch.ones(M, H, dtype=torch.int32),)),
    Case("npu_convert_weight_to_int4pack", "experts", (torch.ones(E, M, H, dtype=torch.int32),)),
)

SWIGLU: Final = (
    Case("npu_swiglu", "last axis", (CUBE,)),
    Case("npu_swiglu", "first axis", (ROWS.float(), 0)),
    Case(
        "npu_dequant_swiglu_quant",
        "static",
        (ROWS,),
        {"quant_scale": torch.ones(1, H // 2), "quant_offset": torch.ones(1, H // 2)},
    ),
    Case("npu_dequant_swiglu_quant", "dynamic", (ROWS,), {"quant_mode": 1}),
    Case(
        "npu_dequant_swiglu_quant",
        "products of experts",
        (ROWS.int(),),
        {
            "weight_scale": torch.ones(E, H),
            "activation_scale": torch.ones(M),
            "quant_scale": torch.ones(E, H // 2),
            "group_index": COUNTS,
            "activate_left": True,
            "quant_mode": 1,
        },
    ),
    Case(
        "npu_swiglu_quant",
        "dynamic",
        (ROWS,),
        {
            "smooth_scales": torch.ones(E, H // 2),
            "group_index": ENDS,
            "quant_mode": 1,
            "dst_type": torch.int8,
        },
    ),
)

CASES: Final = (*DYNAMIC, *BY_SCALE, *WORDS, *SWIGLU)
