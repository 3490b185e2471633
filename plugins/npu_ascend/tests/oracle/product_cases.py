"""Calls of the matrix products, grouped and not."""

from __future__ import annotations

from typing import Any, Final

import torch
from plugins.npu_ascend.tests.oracle.case import Case

M, K, N, E = 4, 256, 256, 2

CHIP: Final = ("generation", "strict", "tiled", "differs", "found")

BF16: Final = torch.bfloat16
ROWS: Final = torch.ones(M, K, dtype=BF16)
INT8_ROWS: Final = torch.ones(M, K, dtype=torch.int8)
INT4_ROWS: Final = torch.ones(M, K // 8, dtype=torch.int32)
FLOAT: Final = torch.ones(E, K, N, dtype=BF16)
INT8: Final = torch.ones(E, K, N, dtype=torch.int8)
INT4: Final = torch.ones(E, K, N // 8, dtype=torch.int32)
ENDS: Final = torch.tensor([1, 3])
ROW_SCALE: Final = torch.ones(M)
COLUMN_SCALE: Final = torch.ones(E, N)
WORDS: Final = torch.ones(E, N, dtype=torch.int64)


DESTROYED: Final = (
    "a strict chip overwrites int8 rows that meet int4 weights, as the device does; the schema "
    "says that no argument changes"
)


def grouped(says: str, x: torch.Tensor, weight: torch.Tensor, **asked: Any) -> Case:
    """A product of the rows of experts, of which those after the last one belong to none."""
    chip = {name: asked.pop(name) for name in CHIP if name in asked}
    kwargs = {"group_list": ENDS, "split_item": 2, "group_type": 0} | asked
    return Case("npu_grouped_matmul", says, ([x], [weight]), kwargs, **chip)


def int8(says: str, **asked: Any) -> Case:
    scales = {"scale": [COLUMN_SCALE.bfloat16()], "per_token_scale": [ROW_SCALE]}
    return grouped(says, INT8_ROWS, INT8, **(scales | {"output_dtype": BF16} | asked))


def int4_weights(says: str, **chip: Any) -> Case:
    scales = {"scale": [WORDS.view(E, 1, N)], "per_token_scale": [ROW_SCALE]}
    more = {"bias": [COLUMN_SCALE], "group_list_type": 1, "output_dtype": BF16}
    return grouped(says, INT8_ROWS, INT4, tiled=True, **scales, **more, **chip)


GROUPED: Final = (
    *(grouped(f"{dtype}", ROWS.to(dtype), FLOAT.to(dtype)) for dtype in (BF16, torch.float16)),
    grouped("counts", ROWS, FLOAT, group_list_type=1),
    grouped("a transposed weight", ROWS, torch.ones(E, N, K, dtype=BF16).transpose(1, 2)),
    grouped("one result", ROWS, FLOAT, split_item=3),
    Case(
        "npu_grouped_matmul",
        "no groups",
        ([ROWS, ROWS], [FLOAT[0], FLOAT[1]]),
        {"split_item": 0, "group_type": -1},
    ),
    Case(
        "npu_grouped_matmul",
        "a list of weights",
        ([ROWS], [FLOAT[0], FLOAT[1]]),
        {"group_list": ENDS, "split_item": 2, "group_type": 0},
    ),
    Case(
        "npu_grouped_matmul.List",
        "ends as numbers",
        ([ROWS], [FLOAT[0], FLOAT[1]]),
        {"group_list": [1, M], "split_item": 2},
    ),
    int8("int8"),
    int8("int8 and a bias", bias=[torch.ones(E, N, dtype=torch.int32)]),
    int8("int8 to fp16", scale=[COLUMN_SCALE], output_dtype=torch.float16),
    int8("int8 to bf16 of the newest", scale=[COLUMN_SCALE], generation="A5"),
    grouped("int8 sums", INT8_ROWS, INT8, output_dtype=torch.int32),
    grouped("int8 static, the dtype not said", INT8_ROWS, INT8, scale=[WORDS]),
    int4_weights("int8 rows, int4 weights"),
    int4_weights(
        "int8 rows, int4 weights, strict",
        strict=True,
        differs=DESTROYED,
        found="x is not defined as mutable but was mutated",
    ),
    *(
        grouped(
            f"int4, scales {tuple(scale.shape)}",
            INT4_ROWS,
            INT4,
            scale=[scale],
            per_token_scale=[ROW_SCALE],
            output_dtype=BF16,
        )
        for scale in (WORDS, WORDS.view(E, 1, N).repeat(1, 2, 1))
    ),
    grouped(
        "int8 weights",
        ROWS,
        INT8,
        antiquant_scale=[COLUMN_SCALE.bfloat16()],
        antiquant_offset=[COLUMN_SCALE.bfloat16()],
    ),
    grouped("int4 weights", ROWS, INT4, antiquant_scale=[COLUMN_SCALE.bfloat16()]),
)

FUSED: Final = (
    Case(
        "npu_grouped_matmul_swiglu_quant",
        "int8",
        (INT8_ROWS, INT8, ENDS, COLUMN_SCALE, ROW_SCALE),
        tiled=True,
    ),
    Case(
        "npu_grouped_matmul_swiglu_quant_v2",
        "int8",
        (INT8_ROWS, [INT8], [COLUMN_SCALE], ROW_SCALE, ENDS),
        tiled=True,
    ),
    Case(
        "npu_grouped_matmul_swiglu_quant_v2",
        "int4, counts, smooth",
        (INT4_ROWS, [INT4], [WORDS], ROW_SCALE, ENDS),
        {"smooth_scale": torch.ones(E, N // 2), "group_list_type": 1},
    ),
    Case(
        "npu_grouped_matmul_swiglu_quant_v2",
        "int8 rows, int4 weights",
        (INT8_ROWS, [INT4], [WORDS], ROW_SCALE, ENDS),
        {"weight_assist_matrix": [COLUMN_SCALE]},
    ),
    *(
        Case(
            "npu_grouped_matmul_finalize_routing",
            f"{rows} rows",
            (INT8_ROWS, INT8, ENDS),
            {
                "scale": COLUMN_SCALE,
                "pertoken_scale": ROW_SCALE,
                "shared_input": torch.ones(1, N, dtype=BF16),
                "logit": ROW_SCALE,
                "row_index": torch.zeros(M, dtype=torch.int64),
                "output_bs": rows,
                "group_list_type": 0,
            },
            tiled=True,
        )
        for rows in (0, 2)
    ),
)


def quantised(says: str, x1: torch.Tensor, x2: torch.Tensor, **asked: Any) -> Case:
    scale = asked.pop("scale", torch.ones(N))
    return Case("npu_quant_matmul", says, (x1, x2, scale), asked)


PRODUCTS: Final = (
    quantised("the dtype not said", INT8_ROWS, INT8[0], scale=torch.ones(N, dtype=torch.int64)),
    quantised(
        "dynamic",
        INT8_ROWS,
        INT8[0],
        pertoken_scale=ROW_SCALE,
        bias=torch.ones(N, dtype=torch.int32),
        output_dtype=BF16,
    ),
    quantised("one scale", INT8_ROWS, INT8[0], scale=torch.ones(1), output_dtype=torch.float16),
    quantised("a batch", INT8_ROWS.view(2, 2, K), INT8, output_dtype=torch.float16),
    quantised("sums", INT8_ROWS, INT8[0], output_dtype=torch.int32),
    quantised("int4", INT4_ROWS, INT4[0], pertoken_scale=ROW_SCALE, output_dtype=BF16),
    quantised(
        "transposed int4",
        INT4_ROWS,
        torch.ones(N, K // 8, dtype=torch.int32).T,
        pertoken_scale=ROW_SCALE,
        output_dtype=torch.float16,
    ),
    *(
        Case(
            "npu_weight_quant_batchmatmul",
            f"{weight.dtype}",
            (ROWS, weight, torch.ones(N, dtype=BF16)),
        )
        for weight in (INT8[0], INT4[0])
    ),
    Case(
        "npu_weight_quant_batchmatmul",
        "groups, offsets and a bias",
        (ROWS, INT4[0], torch.ones(2, N, dtype=BF16), torch.ones(2, N, dtype=BF16)),
        {"bias": torch.ones(N), "antiquant_group_size": 128},
    ),
    Case(
        "npu_weight_quant_batchmatmul",
        "int8 results",
        (ROWS.half(), INT8[0], torch.ones(N).half()),
        {"quant_scale": torch.ones(N)},
    ),
)

CASES: Final = (*GROUPED, *FUSED, *PRODUCTS)
