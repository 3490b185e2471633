"""The split of gated delta net projections equals transformers' in both stored layouts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mortise.reference.qkv import qkv_split
from mortise.spec.qkv import QKVLayout, QKVParts, QKVShape

layouts = pytest.mark.parametrize("layout", QKVLayout)


def widths(shape: QKVShape) -> tuple[int, int]:
    keys = shape.num_key_heads * shape.key_head_dim
    values = shape.num_value_heads * shape.value_head_dim
    return 2 * keys + 2 * values, 2 * shape.num_value_heads


def projections(shape: QKVShape, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every element is another number."""
    qkvz, ba = widths(shape)
    return (
        torch.arange(num_tokens * qkvz, dtype=torch.float32).view(num_tokens, qkvz),
        -torch.arange(1, num_tokens * ba + 1, dtype=torch.float32).view(num_tokens, ba),
    )


@st.composite
def shapes(draw: st.DrawFn, layout: QKVLayout | None = None) -> QKVShape:
    num_key_heads = draw(st.integers(1, 4))
    return QKVShape(
        num_key_heads=num_key_heads,
        num_value_heads=num_key_heads * draw(st.integers(1, 4)),
        key_head_dim=draw(st.integers(1, 5)),
        value_head_dim=draw(st.integers(1, 5)),
        layout=layout or draw(st.sampled_from(QKVLayout)),
    )


def transformers_interleaved(
    qkvz: torch.Tensor, ba: torch.Tensor, shape: QKVShape
) -> tuple[torch.Tensor, ...]:
    """Qwen3-Next's own reordering, called without building a layer."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    layer = SimpleNamespace(
        num_k_heads=shape.num_key_heads,
        num_v_heads=shape.num_value_heads,
        head_k_dim=shape.key_head_dim,
        head_v_dim=shape.value_head_dim,
    )
    reorder = Qwen3NextGatedDeltaNet.fix_query_key_value_ordering
    query, key, value, z, b, a = reorder(layer, qkvz.unsqueeze(0), ba.unsqueeze(0))
    mixed = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1)
    return tuple(part.squeeze(0) for part in (mixed, z, b, a))


def contiguous(qkvz: torch.Tensor, ba: torch.Tensor, shape: QKVShape) -> tuple[torch.Tensor, ...]:
    """Qwen3.5 stores four matrices; side by side they are this layout."""
    values = shape.num_value_heads * shape.value_head_dim
    z = qkvz[:, -values:].reshape(-1, shape.num_value_heads, shape.value_head_dim)
    heads = shape.num_value_heads
    return qkvz[:, :-values], z, ba[:, :heads], ba[:, heads:]


def parts_of(parts: QKVParts) -> tuple[torch.Tensor, ...]:
    return parts.mixed_qkv, parts.z, parts.b, parts.a


@given(shapes(QKVLayout.INTERLEAVED), st.integers(1, 4))
def test_the_interleaved_layout_is_qwen3_nexts(shape: QKVShape, num_tokens: int) -> None:
    inputs = projections(shape, num_tokens)
    expected = transformers_interleaved(*inputs, shape)
    for got, wanted in zip(parts_of(qkv_split(*inputs, shape)), expected, strict=True):
        assert torch.equal(got, wanted)


@given(shapes(QKVLayout.CONTIGUOUS), st.integers(1, 4))
def test_the_contiguous_layout_is_qwen3_5s(shape: QKVShape, num_tokens: int) -> None:
    inputs = projections(shape, num_tokens)
    expected = contiguous(*inputs, shape)
    for got, wanted in zip(parts_of(qkv_split(*inputs, shape)), expected, strict=True):
        assert torch.equal(got, wanted)


@given(shapes(), st.integers(0, 3), st.booleans())
def test_every_part_is_dense_in_memory_of_its_own(
    shape: QKVShape, num_tokens: int, from_a_slice: bool
) -> None:
    qkvz, ba = projections(shape, num_tokens)
    if from_a_slice:
        # One matrix may compute both: what arrives is a slice of its rows.
        fused = torch.cat([qkvz, ba], dim=-1)
        qkvz, ba = fused[:, : qkvz.shape[1]], fused[:, qkvz.shape[1] :]
    before = qkvz.clone(), ba.clone()
    parts = parts_of(qkv_split(qkvz, ba, shape))
    tokens, heads = (num_tokens,), (num_tokens, shape.num_value_heads)
    assert parts[0].shape == (*tokens, widths(shape)[0] - heads[1] * shape.value_head_dim)
    assert [part.shape for part in parts[1:]] == [(*heads, shape.value_head_dim), heads, heads]
    for part in parts:
        assert part.is_contiguous()
        # Consumers index by hand: strides must be those of a fresh tensor, not merely harmless.
        assert part.stride() == torch.empty(part.shape).stride()
        part.fill_(0)
    assert torch.equal(qkvz, before[0])
    assert torch.equal(ba, before[1])


@given(shapes())
def test_the_two_layouts_are_not_interchangeable(shape: QKVShape) -> None:
    inputs = projections(shape, 2)
    both = [qkv_split(*inputs, replace(shape, layout=layout)) for layout in QKVLayout]
    if shape.num_key_heads > 1:
        assert not torch.equal(both[0].z, both[1].z)
        assert not torch.equal(both[0].b, both[1].b)
    else:
        assert torch.equal(both[0].mixed_qkv, both[1].mixed_qkv)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_dtype_is_kept(layout: QKVLayout, dtype: torch.dtype) -> None:
    shape = QKVShape(
        num_key_heads=2, num_value_heads=4, key_head_dim=3, value_head_dim=2, layout=layout
    )
    qkvz, ba = projections(shape, 3)
    parts = parts_of(qkv_split(qkvz.to(dtype), ba.to(dtype), shape))
    assert {part.dtype for part in parts} == {dtype}


@layouts
def test_more_tokens_than_a_launch_grid_takes(layout: QKVLayout) -> None:
    shape = QKVShape(
        num_key_heads=2, num_value_heads=4, key_head_dim=2, value_head_dim=1, layout=layout
    )
    few = projections(shape, 4)
    many = [torch.cat([part] * 17_500) for part in few]
    got = qkv_split(*many, shape)
    assert got.b.shape == (70_000, 4)
    for part, wanted in zip(parts_of(got), parts_of(qkv_split(*few, shape)), strict=True):
        assert torch.equal(part[-4:], wanted)
