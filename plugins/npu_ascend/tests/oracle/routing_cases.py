"""Calls of the routing, gating and indexer operators."""

from __future__ import annotations

from typing import Any, Final

import torch
from plugins.npu_ascend.tests.oracle.case import Case

T, H, E, K = 4, 64, 4, 2

ROWS: Final = torch.linspace(-2, 2, T * H).view(T, H).bfloat16()
EXPERTS: Final = torch.tensor([[3, 0], [1, 2], [2, 1], [0, 2]], dtype=torch.int32)
COLUMNS: Final = torch.arange(T * K, dtype=torch.int32).view(K, T).T.contiguous()
PLACES: Final = torch.arange(T * K, dtype=torch.int32)
WEIGHTS: Final = torch.full((T, K), 0.5).bfloat16()
COPIED: Final = ROWS.repeat(K, 1)
ONE: Final = torch.ones(1)

UNASKED_NUMBERS: Final = (
    "without `expert_tokens_num_flag` the numbers of rows have their usual shape and are "
    "unwritten, as torch_npu allocates them; the shape function says they have no axis"
)
UNASKED_SCALES: Final = (
    "with `quant_mode` 0 the scales have one axis and are unwritten, as torch_npu allocates them; "
    "the shape function says they have no axis"
)


def second(says: str, *, generation: str = "A2", differs: str | None = None, **asked: Any) -> Case:
    """A call of ``npu_moe_init_routing_v2``."""
    numbers = {"expert_num": E, "expert_tokens_num_flag": True, "expert_tokens_num_type": 1}
    kwargs = numbers | asked
    rows = kwargs.pop("x", ROWS)
    return Case(
        "npu_moe_init_routing_v2", says, (rows, EXPERTS), kwargs, generation, differs=differs
    )


def finalized(says: str, **changed: Any) -> Case:
    arguments = {
        "expanded_permuted_rows": COPIED,
        "skip1": None,
        "skip2": None,
        "bias": None,
        "scales": WEIGHTS,
        "expanded_src_to_dst_row": PLACES,
        "export_for_source_row": None,
    }
    return Case("npu_moe_finalize_routing", says, (), arguments | changed)


def indexed(says: str, *, generation: str = "A2", **changed: Any) -> Case:
    shape = (2, 3, 8, 128)
    arguments = {
        "query": torch.ones(shape).bfloat16(),
        "key": torch.ones(2, 16, 1, 128).bfloat16(),
        "weights": torch.ones(shape[:3]).bfloat16(),
        "sparse_count": 16,
    }
    return Case("npu_lightning_indexer", says, (), arguments | changed, generation)


def lengths(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


FIRST_GENERATION: Final = (
    *(
        Case("npu_moe_init_routing", f"{wanted} tokens", (ROWS.to(dtype), COLUMNS, EXPERTS, wanted))
        for wanted, dtype in ((T, torch.bfloat16), (2, torch.float32), (9, torch.float16))
    ),
    Case("npu_moe_compute_expert_tokens", "ends", (EXPERTS.flatten().sort().values, E)),
    finalized("weights"),
    finalized("float32 weights", scales=WEIGHTS.float()),
    finalized("no weights", scales=None, k=K, drop_pad_mode=2),
    finalized(
        "everything, row by row",
        skip1=ROWS,
        skip2=ROWS,
        bias=ROWS,
        export_for_source_row=EXPERTS,
        drop_pad_mode=2,
    ),
    *(
        finalized(
            f"padded, mode {mode}",
            expanded_permuted_rows=COPIED.view(E, -1, H),
            drop_pad_mode=mode,
        )
        for mode in (1, 3)
    ),
)

SECOND_GENERATION: Final = (
    second("counts"),
    second("ends", expert_tokens_num_type=0),
    second("pairs", expert_tokens_num_type=2),
    second("a range", active_expert_range=[1, 3]),
    second("the other index", row_idx_type=1),
    second("few rows", active_num=3),
    second("no numbers", expert_tokens_num_flag=False, differs=UNASKED_NUMBERS),
    second("scales that move", scale=torch.ones(T)),
    second("int8 rows", x=ROWS.char(), scale=torch.ones(T)),
    second("float32 rows", x=ROWS.float()),
    second("static", quant_mode=0, scale=ONE, offset=ONE, differs=UNASKED_SCALES),
    second("dynamic", quant_mode=1),
    second("smooth", quant_mode=1, scale=torch.ones(E, H)),
    second("smooth for all", quant_mode=1, scale=torch.ones(1, H), active_expert_range=[1, 3]),
    second("padded", drop_pad_mode=1, expert_capacity=2),
    second("padded and dynamic", drop_pad_mode=1, expert_capacity=2, quant_mode=1),
    second("newest", generation="A5", active_num=T * K),
    second("int4 of the newest", generation="A5", quant_mode=13, x_dtype=285),
)

PERMUTATION: Final = (
    Case("npu_moe_token_permute", "all", (ROWS, EXPERTS)),
    Case("npu_moe_token_permute", "one expert", (ROWS, EXPERTS[:, 0].long())),
    *(Case("npu_moe_token_permute", f"{rows} rows", (ROWS, EXPERTS, rows)) for rows in (3, 99, -2)),
    Case("npu_moe_token_unpermute", "no weights", (COPIED, PLACES)),
    Case("npu_moe_token_unpermute", "weights", (COPIED, PLACES, WEIGHTS)),
    Case("npu_moe_token_unpermute", "other dtypes", (COPIED, PLACES.long(), WEIGHTS.float())),
    *(
        Case(
            "npu_moe_re_routing",
            f"{tokens.dtype}, {counts.dtype}, scales: {scales is not None}",
            (tokens, counts),
            {"per_token_scales": scales},
        )
        for tokens in (ROWS, ROWS.char())
        for counts in (torch.tensor([[1, 1], [2, 0]], dtype=torch.int32), torch.ones(2, 2).long())
        for scales in (None, torch.ones(T))
    ),
)

GATING: Final = (
    Case("npu_moe_gating_top_k", "softmax", (ROWS, 3)),
    Case(
        "npu_moe_gating_top_k",
        "groups, sigmoid, a bias and all weights",
        (ROWS.float(), 3),
        {
            "bias": torch.ones(H),
            "k_group": 2,
            "group_count": 4,
            "group_select_mode": 1,
            "norm_type": 1,
            "out_flag": True,
        },
    ),
    Case(
        "npu_moe_gating_top_k",
        "from a table",
        (ROWS, K),
        {"input_ids": torch.arange(T), "tid2eid": EXPERTS},
    ),
    Case("npu_moe_gating_top_k", "softplus", (ROWS.half(), 3), {"norm_type": 2}, "A5"),
    Case("npu_moe_gating_top_k_softmax", "two axes", (ROWS, None, 3)),
    Case(
        "npu_moe_gating_top_k_softmax",
        "three axes, some finished",
        (ROWS.view(2, 2, H), torch.tensor([[True, False], [False, False]]), 3),
    ),
)

FLAT: Final = {
    "query": torch.ones(6, 8, 128).half(),
    "weights": torch.ones(6, 8).half(),
    "layout_query": "TND",
    "actual_seq_lengths_query": lengths(2, 6),
}
BLOCKS: Final = {
    "layout_key": "PA_BSND",
    "block_table": lengths(0, 1).view(2, 1),
    "actual_seq_lengths_key": lengths(9, 16),
}

INDEXER: Final = (
    indexed("in rows"),
    indexed("with scores", return_value=True),
    indexed("more than there are", sparse_count=64, sparse_mode=0),
    indexed("float32 weights", weights=torch.ones(2, 3, 8)),
    indexed("newest", generation="A5"),
    indexed("in blocks", **BLOCKS),
    indexed("flat, in blocks", **FLAT, **BLOCKS, key=torch.ones(2, 16, 1, 128).half()),
    *(
        indexed(
            f"flat, scores: {scores}",
            **FLAT,
            key=torch.ones(9, 1, 128).half(),
            layout_key="TND",
            actual_seq_lengths_key=lengths(3, 9),
            return_value=scores,
        )
        for scores in (False, True)
    ),
)

CASES: Final = (*FIRST_GENERATION, *SECOND_GENERATION, *PERMUTATION, *GATING, *INDEXER)
