"""One expert's share of a tensor that holds a projection of all experts of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mortise.checkpoint.placement import Placement, StoredForm

if TYPE_CHECKING:
    from mortise.checkpoint.placement import Read

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def fused_placement(
    name: str,
    target: torch.Tensor,
    *,
    expert: int,
    num_experts: int,
    part: int = 0,
    num_parts: int = 1,
) -> Placement:
    """Where the unquantised weight of one expert is in a tensor ``[E, N * num_parts, K]``.

    Qwen3.5 is published in this form, and transformers holds the experts of every family in it
    (``transformers/models/qwen3_5_moe/modeling_qwen3_5_moe.py``, ``Qwen3_5MoeExperts``).

    Args:
        name: of the tensor of all experts.
        target: ``[N, K]`` of one of them.
        expert: which.
        num_experts: E.
        part: which of ``num_parts`` equal parts of its rows; gate is before up.
        num_parts: projections that are in one tensor.
    """
    rows, columns = target.shape

    def own(stored: torch.Tensor, read: Read) -> torch.Tensor:  # noqa: ARG001
        return stored[expert].chunk(num_parts)[part]

    form = StoredForm(shapes=((num_experts, num_parts * rows, columns),), dtypes=FLOATS)
    return Placement(name, target, stored=form, convert=own)
