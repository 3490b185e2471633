"""The experts' products equal a loop over rows in every layout of the dispatched tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.errors import ContractError
from mortise.reference.dispatch import LocalDispatcher
from mortise.reference.moe import prepare_expert_weights, quantized_moe_apply
from mortise.spec.dispatch import (
    DecisionRule,
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    GroupListKind,
    Routing,
    RowLayout,
)
from mortise.spec.experts import ExpertWeights
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN, INTERMEDIATE = 6, 4


def experts_of(num_experts: int, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(num_experts)
    w13 = torch.randn(num_experts, 2 * INTERMEDIATE, HIDDEN, generator=generator).to(dtype)
    w2 = torch.randn(num_experts, HIDDEN, INTERMEDIATE, generator=generator).to(dtype)
    return ExpertWeights(
        layer="model.layers.1.mlp",
        w13=StoredWeight(scheme=WeightScheme.FLOAT, weight=w13),
        w2=StoredWeight(scheme=WeightScheme.FLOAT, weight=w2),
        num_local_experts=num_experts,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
    )


def one_row(row: torch.Tensor, experts: ExpertWeights, expert: int) -> torch.Tensor:
    """Gate first, then up; silu; down."""
    projected = experts.w13.weight[expert].double() @ row.double()
    gate, up = projected[:INTERMEDIATE], projected[INTERMEDIATE:]
    activated = gate / (1 + torch.exp(-gate)) * up
    return experts.w2.weight[expert].double() @ activated


def tokens_of(
    counts: Sequence[int],
    *,
    spare_rows: int = 0,
    kind: GroupListKind = GroupListKind.COUNTS,
    host_counts: bool = True,
    alignment: int = 1,
    dtype: torch.dtype = torch.float32,
) -> DispatchedTokens:
    """Grouped rows; padding and spare rows are NaN."""
    generator = torch.Generator().manual_seed(sum(counts))
    parts = []
    for count in counts:
        parts.append(torch.randn(count, HIDDEN, generator=generator))
        parts.append(torch.full((-count % alignment, HIDDEN), torch.nan))
    parts.append(torch.full((spare_rows, HIDDEN), torch.nan))
    group_list = torch.tensor(counts, dtype=torch.int64)
    return DispatchedTokens(
        rows=torch.cat(parts).to(dtype),
        scales=None,
        group_list=group_list if kind is GroupListKind.COUNTS else group_list.cumsum(0),
        group_list_kind=kind,
        group_counts=tuple(counts) if host_counts else None,
        format=DispatchFormat(
            dtype=DispatchDtype.FP32 if dtype is torch.float32 else DispatchDtype.BF16,
            row_layout=RowLayout.GROUPED if alignment == 1 else RowLayout.GROUPED_ALIGNED,
            alignment=alignment,
        ),
    )


counts_of_groups = st.lists(st.integers(0, 5), min_size=1, max_size=6)


kinds_and_alignments = st.sampled_from(
    [
        (GroupListKind.COUNTS, 1),
        (GroupListKind.COUNTS, 4),
        (GroupListKind.CUMULATIVE, 1),
    ]
)


@given(counts_of_groups, st.integers(0, 3), kinds_and_alignments, st.booleans())
def test_grouped_rows(
    counts: list[int], spare_rows: int, listed: tuple[GroupListKind, int], host_counts: bool
) -> None:
    kind, alignment = listed
    experts = experts_of(len(counts))
    tokens = tokens_of(
        counts, spare_rows=spare_rows, kind=kind, host_counts=host_counts, alignment=alignment
    )
    before = tokens.rows.clone()
    got = quantized_moe_apply(tokens, experts, torch.float32)
    assert got.shape == tokens.rows.shape
    start = 0
    for expert, count in enumerate(counts):
        for row in range(start, start + count):
            expected = one_row(tokens.rows[row], experts, expert)
            torch.testing.assert_close(got[row].double(), expected, atol=1e-4, rtol=1e-4)
        start += count + -count % alignment
    got.zero_()
    torch.testing.assert_close(tokens.rows, before, equal_nan=True, rtol=0, atol=0)


@given(counts_of_groups, st.sampled_from(GroupListKind), st.booleans())
def test_masked_rows(counts: list[int], kind: GroupListKind, host_counts: bool) -> None:
    experts = experts_of(len(counts))
    rows = torch.full((len(counts), 5, HIDDEN), torch.nan)
    for expert, count in enumerate(counts):
        rows[expert, :count] = torch.randn(
            count, HIDDEN, generator=torch.Generator().manual_seed(expert)
        )
    tokens = replace(
        tokens_of(counts, kind=kind, host_counts=host_counts),
        rows=rows,
        format=DispatchFormat(dtype=DispatchDtype.FP32, row_layout=RowLayout.MASKED),
    )
    got = quantized_moe_apply(tokens, experts, torch.float32)
    assert got.shape == rows.shape
    for expert, count in enumerate(counts):
        for row in range(count):
            expected = one_row(rows[expert, row], experts, expert)
            torch.testing.assert_close(got[expert, row].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 7, 0], [1, 0, 0], [0, 0, 1]])
@pytest.mark.parametrize("layout", [RowLayout.GROUPED, RowLayout.MASKED])
def test_empty_and_lonely_groups(counts: list[int], layout: RowLayout) -> None:
    tokens = tokens_of(counts)
    if layout is RowLayout.MASKED:
        tokens = replace(
            tokens,
            rows=torch.zeros(3, 7, HIDDEN),
            format=DispatchFormat(dtype=DispatchDtype.FP32, row_layout=layout),
        )
    got = quantized_moe_apply(tokens, experts_of(3), torch.bfloat16)
    assert got.shape == tokens.rows.shape
    assert got.dtype == torch.bfloat16


def test_the_output_dtype_is_the_asked_one_and_the_products_are_not_rounded_to_it_first() -> None:
    counts = [2, 1]
    experts, tokens = experts_of(2), tokens_of(counts)
    precise = quantized_moe_apply(tokens, experts, torch.float32)
    rounded = quantized_moe_apply(tokens, experts, torch.bfloat16)
    assert torch.equal(rounded, precise.to(torch.bfloat16))


def test_the_whole_layer_equals_transformers() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    num_experts, num_tokens, num_choices = 5, 12, 3
    experts = experts_of(num_experts)
    theirs = DeepseekV3Experts(
        DeepseekV3Config(
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            n_routed_experts=num_experts,
            hidden_act="silu",
        )
    )
    theirs.config._experts_implementation = "eager"
    theirs.load_state_dict(
        {"gate_up_proj": experts.w13.weight, "down_proj": experts.w2.weight}, strict=True
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    ids = torch.stack(
        [torch.randperm(num_experts, generator=generator)[:num_choices] for _ in range(num_tokens)]
    )
    weights = torch.rand(num_tokens, num_choices, generator=generator)
    dispatcher = LocalDispatcher(num_experts)
    tokens, handle = dispatcher.dispatch(
        hidden,
        Routing(topk_ids=ids, topk_weights=weights),
        DispatchFormat(dtype=DispatchDtype.FP32),
    )
    got = dispatcher.combine(quantized_moe_apply(tokens, experts, torch.float32), handle)
    with torch.inference_mode():
        expected = theirs(hidden, ids, weights)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_preparing_is_idempotent_and_changes_nothing() -> None:
    decision = DispatchDecision(
        format=DispatchFormat(dtype=DispatchDtype.FP32),
        rule=DecisionRule.DEVICE_DEFAULT,
        reason="as it is",
    )
    experts, tokens = experts_of(2), tokens_of([2, 3])
    plain = quantized_moe_apply(tokens, experts, torch.float32)
    once = prepare_expert_weights(experts, decision)
    twice = prepare_expert_weights(once, decision)
    for prepared in (once, twice):
        assert torch.equal(quantized_moe_apply(tokens, prepared, torch.float32), plain)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (tokens_of([1, 1], dtype=torch.bfloat16), "bf16 rows met torch.float32 weights"),
        (replace(tokens_of([1, 1]), scales=torch.ones(2)), "fp32 rows came with scales"),
        (
            replace(tokens_of([1, 1]), rows=torch.zeros(2, HIDDEN, dtype=torch.int8)),
            "rows of torch.int8 are said to be fp32",
        ),
        (tokens_of([1, 1, 1]), "a group list of 3 met 2 experts"),
        (
            tokens_of([1, 1], kind=GroupListKind.CUMULATIVE, alignment=4),
            "aligned groups came with a cumulative list",
        ),
    ],
)
def test_rows_that_the_weights_cannot_take_are_refused(
    tokens: DispatchedTokens, message: str
) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        quantized_moe_apply(tokens, experts_of(2), torch.float32)
    assert "model.layers.1.mlp" in caught.value.what
