"""The check before experts multiply rows: every combination is accepted, or refused once."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

import pytest
import torch

from mortise.errors import ContractError
from mortise.spec.consumer import check_dispatched_tokens
from mortise.spec.dispatch import (
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    GroupListKind,
    RoutingWeightSide,
    RowLayout,
    ScaleLayout,
)
from mortise.spec.experts import ExpertWeights
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import ScaleFormat, StoredWeight, WeightScheme

LAYER = "model.layers.7.mlp"
NUM_EXPERTS, ROWS, COLUMNS = 2, 3, 16

# Each format with each of the scales that its rows can have: what the tensors are.
FORMATS = {
    # rows                 scales: where, what, their tensor                       rows' tensor
    ("fp32", "none", None): (None, torch.float32),
    ("bf16", "none", None): (None, torch.bfloat16),
    ("fp8", "per_token_per_128_columns", "float32"): (torch.float32, torch.float8_e4m3fn),
    ("fp8", "per_token_per_128_columns", "ue8m0"): (torch.int32, torch.float8_e4m3fn),
    ("int8", "per_token", "float32"): (torch.float32, torch.int8),
    ("nvfp4", "per_16_elements_with_global_scale", "e4m3"): (torch.float8_e4m3fn, torch.uint8),
}
# What experts multiply, by scheme and whether a scale of their input is stored. Unquantised rows
# meet quantised weights in either compute dtype, since the method quantises them.
MULTIPLIED = {
    # scheme         without a stored scale   with one
    "float32": ("fp32", "fp32"),
    "bfloat16": ("bf16", "bf16"),
    "fp8_block": ("fp32 bf16 fp8", "fp32 bf16 fp8"),
    "w8a8": ("fp32 bf16 int8", "fp32 bf16"),
    "w4a8": ("fp32 bf16 int8", "fp32 bf16 int8"),
    "w4a4": ("fp32 bf16", "fp32 bf16"),
    "w4a16": ("fp32 bf16", "fp32 bf16"),
    "nvfp4": ("fp32 bf16", "fp32 bf16 nvfp4"),
}
ROW_TENSORS = MappingProxyType(
    {dtype: torch.zeros(ROWS, COLUMNS).to(dtype) for _, dtype in FORMATS.values()}
)
SCALE_TENSORS = MappingProxyType(
    {None: None}
    | {
        dtype: torch.ones(ROWS, 1).to(dtype)
        for dtype in (torch.float32, torch.float8_e4m3fn, torch.int32, torch.bfloat16)
    }
)


def stated(name: str, where: str, what: str | None) -> DispatchFormat:
    return DispatchFormat(
        dtype=DispatchDtype(name),
        scale_layout=ScaleLayout(where),
        scale_format=None if what is None else ScaleFormat(what),
        global_scale=0.5 if name == "nvfp4" else None,
    )


def tokens(
    format: DispatchFormat, rows: torch.Tensor, scales: torch.Tensor | None, **changes: Any
) -> DispatchedTokens:
    fields = {
        "rows": rows,
        "scales": scales,
        "group_list": torch.tensor([1, 2]),
        "group_list_kind": GroupListKind.COUNTS,
        "group_counts": (1, 2),
        "format": format,
    }
    return DispatchedTokens(**(fields | changes))


def experts(scheme: str, *, static_input: bool = False) -> ExpertWeights:
    """Experts of which the check looks at scheme, dtype and number alone."""
    kept = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    stored = StoredWeight(
        scheme=WeightScheme.FLOAT if scheme in kept else WeightScheme(scheme),
        weight=torch.zeros(NUM_EXPERTS, 4, COLUMNS, dtype=kept.get(scheme, torch.int8)),
        input_scale=torch.ones(NUM_EXPERTS, 1) if static_input else None,
    )
    return ExpertWeights(
        layer=LAYER,
        w13=stored,
        w2=stored,
        num_local_experts=NUM_EXPERTS,
        hidden_size=COLUMNS,
        intermediate_size=2,
    )


def refusal(dispatched: DispatchedTokens, met: ExpertWeights) -> str:
    """The one message, or nothing where the rows are accepted."""
    try:
        check_dispatched_tokens(dispatched, met)
    except ContractError as error:
        message = f"{error.what}; {error.expected}; {error.reason}"
    else:
        return ""
    assert error_is_complete(message), message
    return message


def error_is_complete(message: str) -> bool:
    what, expected, reason = message.split("; ")
    return what.startswith(f"layer {LAYER}: ") and expected not in {"", "None"} and bool(reason)


def test_every_combination_of_rows_scales_and_experts() -> None:
    accepted = 0
    for words, row_dtype, scale_dtype, scheme, static_input in product(
        FORMATS, ROW_TENSORS, SCALE_TENSORS, MULTIPLIED, (False, True)
    ):
        dispatched = tokens(stated(*words), ROW_TENSORS[row_dtype], SCALE_TENSORS[scale_dtype])
        message = refusal(dispatched, experts(scheme, static_input=static_input))
        truthful = FORMATS[words] == (scale_dtype, row_dtype)
        multiplied = words[0] in MULTIPLIED[scheme][static_input].split()
        place = (words, row_dtype, scale_dtype, scheme, static_input, message)
        assert (not message) is (truthful and multiplied), place
        assert f"{words[0]} " in message or f"be {words[0]};" in message or not message, place
        accepted += not message
    taken = [word for both in MULTIPLIED.values() for words in both for word in words.split()]
    assert accepted == len(taken) + taken.count("fp8"), "fp8 rows have one of two kinds of scales"


@pytest.mark.parametrize("scheme", ["float32", "bfloat16"])
@pytest.mark.parametrize("words", [words for words in FORMATS if words[2]], ids=str)
def test_quantised_rows_never_meet_unquantised_weights(
    scheme: str, words: tuple[str, str, str | None]
) -> None:
    """int8 rows that met bf16 weights ended servers elsewhere, inside the vendor's kernel."""
    scale_dtype, row_dtype = FORMATS[words]
    dispatched = tokens(stated(*words), ROW_TENSORS[row_dtype], SCALE_TENSORS[scale_dtype])
    message = refusal(dispatched, experts(scheme))
    assert f"{words[0]} rows met torch.{scheme} weights" in message


@pytest.mark.parametrize(
    ("dtype", "where", "what"),
    [
        (dtype, where, what)
        for dtype, where, what in product(DispatchDtype, ScaleLayout, (None, *ScaleFormat))
        if (dtype.value, where.value, what and what.value) not in FORMATS
    ],
)
def test_a_format_that_contradicts_itself_is_refused(
    dtype: DispatchDtype, where: ScaleLayout, what: ScaleFormat | None
) -> None:
    """Also where the tensors are as it says: int8 rows that state no scales and bring none."""
    contradiction = replace(
        stated(dtype.value, where.value, what and what.value),
        global_scale=0.5 if dtype is DispatchDtype.NVFP4 else None,
    )
    rows = next(row for words, (_, row) in FORMATS.items() if words[0] == dtype.value)
    for scales in SCALE_TENSORS.values():
        message = refusal(tokens(contradiction, ROW_TENSORS[rows], scales), experts("w8a8"))
        assert f"a dispatch format of {dtype.value} rows states scales {where.value}" in message


@pytest.mark.parametrize("words", FORMATS, ids=str)
def test_a_global_scale_belongs_to_nvfp4_alone(words: tuple[str, str, str | None]) -> None:
    wrong = None if words[0] == "nvfp4" else 0.5
    scale_dtype, row_dtype = FORMATS[words]
    lying = replace(stated(*words), global_scale=wrong)
    dispatched = tokens(lying, ROW_TENSORS[row_dtype], SCALE_TENSORS[scale_dtype])
    message = refusal(dispatched, experts("nvfp4", static_input=True))
    assert f"{words[0]} rows states the global scale {wrong}" in message


PLAIN = DispatchFormat(dtype=DispatchDtype.FP32)
FLAT = ROW_TENSORS[torch.float32]
DEEP = torch.zeros(NUM_EXPERTS, ROWS, COLUMNS)


@pytest.mark.parametrize("layout", RowLayout)
@pytest.mark.parametrize("rows", [FLAT, DEEP, DEEP[None]], ids=["2D", "3D", "4D"])
def test_rows_have_the_dimensions_of_their_layout(layout: RowLayout, rows: torch.Tensor) -> None:
    message = refusal(tokens(replace(PLAIN, row_layout=layout), rows, None), experts("float32"))
    right = {RowLayout.MASKED: 3}.get(layout, 2)
    assert (message == "") is (rows.dim() == right)
    assert not message or f"{layout.value} rows have {rows.dim()} dimensions" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_list": torch.tensor([1, 2], dtype=torch.int32)}, "the group list is torch.int32"),
        ({"group_list": torch.tensor([1, 1, 1])}, "a group list of 3 met 2 experts"),
        ({"group_list": torch.tensor([3])}, "a group list of 1 met 2 experts"),
        ({"row_weights": torch.ones(ROWS)}, "routing weights do not come with the rows"),
        (
            {"routing_weight_side": RoutingWeightSide.EXPERTS},
            "routing weights do not come with the rows",
        ),
        (
            {
                "format": replace(PLAIN, row_layout=RowLayout.GROUPED_ALIGNED, alignment=2),
                "group_list_kind": GroupListKind.CUMULATIVE,
            },
            "aligned groups came with a cumulative list",
        ),
    ],
)
def test_groups_and_weights_are_what_the_experts_expect(
    changes: dict[str, Any], words: str
) -> None:
    dispatched = replace(tokens(PLAIN, FLAT, None), **changes)
    assert words in refusal(dispatched, experts("float32"))


def test_weights_that_the_experts_multiply_by_come_with_the_rows() -> None:
    dispatched = tokens(
        PLAIN,
        FLAT,
        None,
        row_weights=torch.ones(ROWS),
        routing_weight_side=RoutingWeightSide.EXPERTS,
    )
    assert refusal(dispatched, experts("float32")) == ""


def test_no_row_at_all_is_checked_like_many() -> None:
    nothing = tokens(PLAIN, FLAT[:0], None, group_list=torch.tensor([0, 0]), group_counts=(0, 0))
    assert refusal(nothing, experts("float32")) == ""
    assert "fp32 rows met torch.bfloat16 weights" in refusal(nothing, experts("bfloat16"))


def test_a_refusal_says_what_would_have_been_right() -> None:
    int8 = tokens(stated("int8", "per_token", "float32"), ROW_TENSORS[torch.int8], None)
    with pytest.raises(ContractError) as caught:
        check_dispatched_tokens(int8, experts("w8a8"))
    assert caught.value.reason is ReasonCode.CONTRACT_BROKEN
    assert str(caught.value).splitlines() == [
        f"layer {LAYER}: int8 rows came without scales",
        "  expected: scales of torch.float32",
    ]
