"""The experts of each token and their weights, from the scores of a router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.poison import unwritten
from mortise_npu_ascend.emulator.rejections import device_name, require
from mortise_npu_ascend.emulator.routing import FLOAT_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_EXPERTS: Final = 2048
_MOST_CHOSEN: Final = 1024
_MOST_CHOSEN_BY_HASH: Final = 64
_SORT_WIDTH: Final = 32

SOFTMAX: Final = 0
SIGMOID: Final = 1
SQRT_SOFTPLUS: Final = 2

_TOP_K: Final = "npu_moe_gating_top_k"
_TOP_K_SOFTMAX: Final = "npu_moe_gating_top_k_softmax"


def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose ``k`` experts of the best groups; of equal scores the lower expert comes first.

    Args:
        x: router logits ``[T, E]``, float16, bfloat16 or float32.
        k: experts of a token.
        bias: ``[E]`` in the dtype of ``x``; chooses, and is not part of the weights.
        input_ids: int32 or int64 ``[T]``: take the experts from ``tid2eid`` instead of choosing.
        tid2eid: int32 or int64 ``[vocabulary, k]``.
        k_group: groups that may be chosen from.
        group_count: groups that the experts are divided into.
        group_select_mode: a group's score is its best expert's (0) or the sum of the best two (1).
        renorm: 1 divides softmax weights by their sum too.
        norm_type: 0 softmax, 1 sigmoid, on A5 also 2 square root of softplus; the weights of 1 and
            2 are divided by their sum.
        out_flag: whether the third result is written.
        routed_scaling_factor: multiplies the weights.
        eps: added to the sum before dividing.

    Returns:
        Weights ``[T, k]`` in the dtype of ``x``, int32 ``[T, k]`` experts, and float32 ``[T, E]``
        all weights. Computed in float32.

    Raises:
        RuntimeError: what the device refuses.
    """
    _check_top_k(x, k, bias, norm_type=norm_type, renorm=renorm)
    _check_groups(x.shape[1], k, k_group, group_count, group_select_mode)
    weights_TE = _normalise(x.float(), norm_type)
    if input_ids is None or tid2eid is None:
        require(input_ids is tid2eid, _TOP_K, "input_ids and tid2eid must be both provided")
        scores_TE = weights_TE if bias is None else weights_TE + bias.float()
        scores_TE = _only_best_groups(scores_TE, k_group, group_count, group_select_mode)
        experts_TK = _best(scores_TE, k)
    else:
        _check_hash(x, k, input_ids, tid2eid, k_group, group_count)
        experts_TK = tid2eid[input_ids].long()
    chosen_TK = weights_TE.gather(1, experts_TK)
    if norm_type != SOFTMAX or renorm == 1:
        chosen_TK = chosen_TK / (chosen_TK.sum(1, keepdim=True) + eps)
    all_TE = weights_TE if out_flag else unwritten(x.shape, torch.float32)
    chosen_TK = (chosen_TK * routed_scaling_factor).to(x.dtype)
    return chosen_TK, experts_TK.to(torch.int32), all_TE


def _normalise(logits_TE: torch.Tensor, norm_type: int) -> torch.Tensor:
    if norm_type == SOFTMAX:
        return logits_TE.softmax(1)
    if norm_type == SIGMOID:
        return logits_TE.sigmoid()
    return torch.sqrt(torch.logaddexp(logits_TE, torch.zeros(())))


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the highest scores of the last axis; of equal ones the lower comes first."""
    order: torch.Tensor = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count]


def _only_best_groups(
    scores_TE: torch.Tensor, k_group: int, group_count: int, group_select_mode: int
) -> torch.Tensor:
    if group_count == 1:
        return scores_TE
    grouped_TGE: torch.Tensor = scores_TE.unflatten(1, (group_count, -1))
    best = 1 if group_select_mode == 0 else 2
    score_TG = grouped_TGE.topk(best, dim=2).values.sum(2)
    chosen_TG = torch.zeros(score_TG.shape, dtype=torch.bool)
    chosen_TG.scatter_(1, _best(score_TG, k_group), value=True)
    return grouped_TGE.masked_fill(~chosen_TG.unsqueeze(2), float("-inf")).flatten(1)


def _need(condition: bool, reason: str) -> None:
    require(condition, _TOP_K, reason, kernel="aclnnMoeGatingTopK")


def _check_top_k(
    x: torch.Tensor, k: int, bias: torch.Tensor | None, *, norm_type: int, renorm: int
) -> None:
    require(x.ndim == 2, _TOP_K, "The x should be 2D")
    require(
        x.dtype in FLOAT_ROWS,
        _TOP_K,
        f"float16, float32 or bfloat16 tensor expected but got a tensor with dtype: {x.dtype}",
    )
    if bias is not None:
        require(x.dtype == bias.dtype, _TOP_K, "The dtype of x and bias should be same")
        require(bias.ndim == 1, _TOP_K, "The bias should be 1D")
        require(
            bias.shape[0] == x.shape[1],
            _TOP_K,
            "The bias first dim should be same as x second dim",
        )
    _need(x.shape[1] <= _MOST_EXPERTS, f"expert_count should be at most {_MOST_EXPERTS}")
    _need(0 < k <= x.shape[1], f"k {k} should be in [1, {x.shape[1]}]")
    known: tuple[int, ...] = (SOFTMAX, SIGMOID)
    if current_chip().generation is Generation.A5:
        known = (*known, SQRT_SOFTPLUS)
    _need(norm_type in known, f"norm_type {norm_type} should be in {known}")
    _need(renorm in (0, 1), f"renorm {renorm} should be 0 or 1")


def _check_groups(experts: int, k: int, k_group: int, group_count: int, mode: int) -> None:
    _need(group_count > 0, f"group_count {group_count} should be greater than 0")
    _need(0 < k_group <= group_count, f"k_group {k_group} should be in [1, {group_count}]")
    _need(mode in (0, 1), f"group_select_mode {mode} should be 0 or 1")
    _need(experts % group_count == 0, f"expert_count {experts} must be divisible by group_count")
    size = experts // group_count
    _need(size > 2, f"expert_count / group_count {size} should be greater than 2")
    aligned = -(-size // _SORT_WIDTH) * _SORT_WIDTH
    _need(
        aligned * group_count <= _MOST_EXPERTS,
        f"group_count * group_expert_count_align {aligned * group_count} should be at most "
        f"{_MOST_EXPERTS}",
    )
    _need(k <= k_group * size, f"k {k} should be at most k_group * group_expert_count")


def _check_hash(
    x: torch.Tensor,
    k: int,
    input_ids: torch.Tensor,
    tid2eid: torch.Tensor,
    k_group: int,
    group_count: int,
) -> None:
    for name, tensor in (("input_ids", input_ids), ("tid2eid", tid2eid)):
        known = tensor.dtype in (torch.int32, torch.int64)
        _need(known, f"int32 or int64 tensor expected for {name}, got {device_name(tensor.dtype)}")
    _need(input_ids.ndim == 1, "The input_ids should be 1D")
    _need(
        input_ids.shape[0] == x.shape[0],
        "The input_ids first dim should be same as x first dim",
    )
    _need(tid2eid.ndim == 2, "The tid2eid should be 2D")
    _need(tid2eid.shape[1] == k, "The tid2eid second dim should be same as k")
    _need(k <= _MOST_CHOSEN_BY_HASH, f"k {k} should be at most {_MOST_CHOSEN_BY_HASH} with tid2eid")
    _need(
        group_count in (k_group, x.shape[1]),
        "tid2eid does not go with a choice among groups",
    )


def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the ``k`` experts of highest softmax; of equal ones the lower comes first.

    Args:
        x: router logits ``[..., E]``, two or three axes, float16, bfloat16 or float32.
        finished: bool ``[...]``: such a token's experts become E, which is none.
        k: experts of a token, at most 1024.

    Returns:
        Weights ``[..., k]`` in the dtype of ``x``, which do not sum to 1; int32 experts; and int32
        numbers of the copies, column after column, for ``npu_moe_init_routing``.

    Raises:
        RuntimeError: what the device refuses.
    """
    _check_top_k_softmax(x, finished, k)
    shape = (*x.shape[:-1], k)
    weights_TE = x.float().flatten(0, -2).softmax(1)
    experts_TK = _best(weights_TE, k)
    chosen_TK = weights_TE.gather(1, experts_TK).to(x.dtype)
    if finished is not None:
        experts_TK = experts_TK.masked_fill(finished.flatten().unsqueeze(1), x.shape[-1])
    tokens = weights_TE.shape[0]
    copies_TK = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).T.contiguous()
    return chosen_TK.view(shape), experts_TK.to(torch.int32).view(shape), copies_TK.view(shape)


def _check_top_k_softmax(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> None:
    def need(condition: bool, reason: str) -> None:
        require(condition, _TOP_K_SOFTMAX, reason)

    need(x.ndim in (2, 3), "The x should be 2D or 3D")
    need(
        x.dtype in FLOAT_ROWS,
        f"float16, float32 or bfloat16 tensor expected but got a tensor with dtype: {x.dtype}",
    )
    need(0 <= k <= x.shape[-1], f"The k should be in [0, {x.shape[-1]}]")
    need(k <= _MOST_CHOSEN, f"The k {k} should be at most {_MOST_CHOSEN}")
    if finished is not None:
        need(
            finished.dtype == torch.bool,
            f"bool tensor expected but got a tensor with dtype: {finished.dtype}",
        )
        need(finished.shape == x.shape[:-1], "Input rows should be same.")


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (_TOP_K, npu_moe_gating_top_k),
    (_TOP_K_SOFTMAX, npu_moe_gating_top_k_softmax),
)
