"""The fused projections of gated delta net attention and the pieces they are split into."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class QKVLayout(StrEnum):
    """The two stored layouts of the fused projections; never mixed."""

    INTERLEAVED = "interleaved"
    """Per key-head group: q, k, its v heads, its z heads; b and a likewise (Qwen3-Next)."""
    CONTIGUOUS = "contiguous"
    """All q, all k, all v, all z; all b, all a (Qwen3.5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QKVShape:
    """Heads and head sizes of keys and of values, and the stored layout.

    Args:
        num_key_heads: nk, heads of queries and of keys.
        num_value_heads: nv, a multiple of nk.
        key_head_dim: hk, of queries too.
        value_head_dim: hv.
        layout: how the fused projections are stored.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    layout: QKVLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class QKVParts:
    """The split projections, every one contiguous, dtype of the input.

    Args:
        mixed_qkv: ``[T, 2*nk*hk + nv*hv]``: all q, all k, all v.
        z: ``[T, nv, hv]``, the gates of the output.
        b: ``[T, nv]``, from which the strength of an update comes.
        a: ``[T, nv]``, from which the decay comes.
    """

    mixed_qkv: torch.Tensor
    z: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
