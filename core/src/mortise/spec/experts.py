"""The weights of a layer's experts as records: stored tensors, schemes, prepared layout."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ExpertScheme(StrEnum):
    """How the weights of one grouped projection are stored, and what its input must be."""

    FLOAT = "float"
    """bfloat16 or float32, as the tensors are."""
    FP8_BLOCK = "fp8_block"
    W8A8 = "w8a8"
    W4A8 = "w4a8"
    W4A4 = "w4a4"
    W4A16 = "w4a16"
    NVFP4 = "nvfp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedWeight:
    """One grouped projection of all local experts.

    Args:
        scheme: how it is stored.
        weight: ``[E_l, N, K]`` for ``FLOAT``; packed dtypes as the scheme says.
        scale: weight scales of quantised schemes.
        global_scale: per expert ``[E_l]`` float32 (NVFP4).
        input_scale: static input scale where the checkpoint has one.
    """

    scheme: ExpertScheme
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The experts of one layer.

    ``w13`` is gate over up ``[E_l, 2I, H]``, ``w2`` is down ``[E_l, H, I]``.
    ``prepared`` is what ``prepare_expert_weights`` made of them: opaque to the core, owned by the
    backend, None until prepared.
    """

    layer: str
    w13: GroupedWeight
    w2: GroupedWeight
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    prepared: object | None = None
