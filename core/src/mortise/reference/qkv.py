"""The split of gated delta net projections, in plain torch."""

from __future__ import annotations

from typing import assert_never

import torch

from mortise.spec.qkv import QKVLayout, QKVParts, QKVShape


def qkv_split(
    projected_qkvz: torch.Tensor, projected_ba: torch.Tensor, shape: QKVShape
) -> QKVParts:
    """Cut the projections along their stored layout; any number of tokens, none included."""
    match shape.layout:
        case QKVLayout.INTERLEAVED:
            return _split_interleaved(projected_qkvz, projected_ba, shape)
        case QKVLayout.CONTIGUOUS:
            return _split_contiguous(projected_qkvz, projected_ba, shape)
        case _:
            assert_never(shape.layout)


def _split_interleaved(qkvz: torch.Tensor, ba: torch.Tensor, shape: QKVShape) -> QKVParts:
    tokens, groups = qkvz.shape[0], shape.num_key_heads
    key_dim, value_dim = shape.key_head_dim, shape.value_head_dim
    per_group = shape.num_value_heads // groups
    # Not view(tokens, groups, -1): the last size of no tokens could be anything.
    q, k, v, z = qkvz.unflatten(-1, (groups, -1)).split(
        [key_dim, key_dim, per_group * value_dim, per_group * value_dim], dim=-1
    )
    b, a = ba.unflatten(-1, (groups, -1)).split([per_group, per_group], dim=-1)
    return QKVParts(
        mixed_qkv=torch.cat(
            [part.reshape(tokens, groups * part.shape[-1]) for part in (q, k, v)], dim=-1
        ),
        z=_own(z.reshape(tokens, shape.num_value_heads, value_dim), qkvz),
        b=_own(b.reshape(tokens, shape.num_value_heads), ba),
        a=_own(a.reshape(tokens, shape.num_value_heads), ba),
    )


def _split_contiguous(qkvz: torch.Tensor, ba: torch.Tensor, shape: QKVShape) -> QKVParts:
    tokens = qkvz.shape[0]
    values = shape.num_value_heads * shape.value_head_dim
    mixed, z = qkvz.split([qkvz.shape[-1] - values, values], dim=-1)
    b, a = ba.split([shape.num_value_heads, shape.num_value_heads], dim=-1)
    return QKVParts(
        mixed_qkv=_own(mixed, qkvz),
        z=_own(z, qkvz).view(tokens, shape.num_value_heads, shape.value_head_dim),
        b=_own(b, ba),
        a=_own(a, ba),
    )


def _own(part: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in storage of its own, also where a slice happens to be contiguous."""
    if part.is_contiguous() and part.untyped_storage().data_ptr() != (
        source.untyped_storage().data_ptr()
    ):
        return part
    return part.clone(memory_format=torch.contiguous_format)
