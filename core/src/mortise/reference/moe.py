"""The experts' two grouped products with SwiGLU between them, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never, cast

import torch
import torch.nn.functional as F

from mortise.errors import ContractError
from mortise.spec.dispatch import DispatchDecision, DispatchedTokens, GroupListKind, RowLayout
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from mortise.spec.experts import ExpertWeights


def prepare_expert_weights(experts: ExpertWeights, decision: DispatchDecision) -> ExpertWeights:
    """Leave the stored layout: the reference computes on it as it is."""
    return experts


def quantized_moe_apply(
    tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """Run each expert on its group of rows, one after the other."""
    _check_consumable(tokens, experts)
    match tokens.format.row_layout:
        case RowLayout.GROUPED:
            return _apply_grouped(tokens, experts, out_dtype, alignment=1)
        case RowLayout.GROUPED_ALIGNED:
            return _apply_grouped(tokens, experts, out_dtype, tokens.format.alignment)
        case RowLayout.MASKED:
            return _apply_masked(tokens, experts, out_dtype)
        case _:
            assert_never(tokens.format.row_layout)


def _check_consumable(tokens: DispatchedTokens, experts: ExpertWeights) -> None:
    schemes = {experts.w13.scheme, experts.w2.scheme}
    if schemes != {WeightScheme.FLOAT}:
        raise ContractError(
            f"layer {experts.layer}: experts of scheme {', '.join(sorted(schemes))}",
            reason=ReasonCode.REQUEST_UNSUPPORTED,
            expected=WeightScheme.FLOAT.value,
        )
    if tokens.scales is not None or tokens.rows.dtype != experts.w13.weight.dtype:
        scales = "with" if tokens.scales is not None else "without"
        raise ContractError(
            f"layer {experts.layer}: {tokens.rows.dtype} rows {scales} scales met "
            f"{experts.w13.weight.dtype} weights",
            reason=ReasonCode.CONTRACT_BROKEN,
            expected="unquantised rows of the weights' dtype",
        )


def _counts(tokens: DispatchedTokens) -> tuple[int, ...]:
    if tokens.group_counts is not None:
        return tokens.group_counts
    group_list = cast("list[int]", tokens.group_list.tolist())
    if tokens.group_list_kind is GroupListKind.COUNTS:
        return tuple(group_list)
    return tuple(end - start for start, end in zip([0, *group_list], group_list, strict=False))


def _apply_grouped(
    tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype, alignment: int
) -> torch.Tensor:
    rows, outputs, start = tokens.rows, [], 0
    for expert, count in enumerate(_counts(tokens)):
        if count:
            outputs.append(_expert(rows[start : start + count], experts, expert, out_dtype))
            start += count
            padding = -count % alignment
            if padding:
                outputs.append(_undefined(padding, tokens, experts, out_dtype))
                start += padding
    if start < rows.shape[0] or not outputs:
        outputs.append(_undefined(rows.shape[0] - start, tokens, experts, out_dtype))
    return torch.cat(outputs)


def _undefined(
    count: int, tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    """Rows of no group: padding, and what comes after the last group."""
    return tokens.rows.new_empty(count, experts.hidden_size, dtype=out_dtype)


def _apply_masked(
    tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
) -> torch.Tensor:
    output = tokens.rows.new_empty(*tokens.rows.shape[:2], experts.hidden_size, dtype=out_dtype)
    for expert, count in enumerate(_counts(tokens)):
        if count:
            output[expert, :count] = _expert(
                tokens.rows[expert, :count], experts, expert, out_dtype
            )
    return output


def _expert(
    rows_RH: torch.Tensor, experts: ExpertWeights, expert: int, out_dtype: torch.dtype
) -> torch.Tensor:
    gate_RI, up_RI = F.linear(rows_RH, experts.w13.weight[expert]).chunk(2, dim=-1)
    return F.linear(F.silu(gate_RI) * up_RI, experts.w2.weight[expert]).to(out_dtype)
