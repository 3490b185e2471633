"""SwiGLU with quantisation, whose dynamic scale is a factor, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

CUMULATIVE, COUNTS = 0, 1


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def activated(rows: np.ndarray, left: bool) -> np.ndarray:
    gate, up = np.split(rows.astype(np.float64), 2, axis=-1)
    if not left:
        gate, up = up, gate
    return gate / (1 + np.exp(-gate)) * up


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.integers(0, 2**16),
    st.booleans(),
    st.sampled_from([CUMULATIVE, COUNTS]),
    st.booleans(),
)
def test_dynamic(counts: list[int], seed: int, left: bool, kind: int, int4: bool) -> None:
    """The scale that comes back is what was multiplied by: 127 / amax, not its reciprocal."""
    draw, total = np.random.default_rng(seed), sum(counts)
    rows = draw.normal(size=(total + 1, 16)).astype(np.float32)
    smooth = draw.uniform(0.5, 2, (len(counts), 8)).astype(np.float32)
    index = np.array(counts if kind == COUNTS else np.cumsum(counts), dtype=np.int32)
    integers, scale = install("A2").npu_swiglu_quant(
        torch.from_numpy(rows),
        smooth_scales=torch.from_numpy(smooth),
        group_index=torch.from_numpy(index),
        activate_left=left,
        quant_mode=1,
        group_list_type=kind,
        dst_type=torch.quint4x2 if int4 else torch.int8,
    )
    published = activated(rows, left)
    published[:total] *= smooth[np.repeat(np.arange(len(counts)), counts)]
    factor = (7 if int4 else 127) / np.abs(published).max(axis=-1)
    np.testing.assert_allclose(scale.numpy(), factor, rtol=1e-5)
    values = integers.numpy()
    if int4:
        nibbles = np.stack([values & 0xF, values >> 4 & 0xF], axis=-1).reshape(total + 1, 8)
        values = np.where(nibbles > 7, nibbles - 16, nibbles)
    difference = np.abs(values - np.rint(published * factor[:, None]))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.98


def test_rows_behind_the_last_group_are_quantised_without_smoothing(npu: EmulatedNpu) -> None:
    rows = torch.tensor([[100.0, 100.0, 2.0, 1.0]] * 2)
    integers, scale = npu.npu_swiglu_quant(
        rows,
        smooth_scales=torch.tensor([[0.0, 1.0]]),
        group_index=torch.tensor([1], dtype=torch.int32),
        activate_left=True,
        quant_mode=1,
    )
    assert integers.tolist() == [[0, 127], [127, 64]]
    np.testing.assert_allclose(scale.numpy(), [1.27, 0.635], rtol=1e-6)


@pytest.mark.parametrize("per_column", [False, True])
def test_static(npu: EmulatedNpu, per_column: bool) -> None:
    """rint(value * smooth_scales + offsets): here the scale multiplies."""
    draw = np.random.default_rng(0)
    rows = draw.normal(scale=3, size=(4, 16)).astype(np.float32)
    shape = (2, 8) if per_column else (2,)
    smooth = draw.uniform(5, 20, shape).astype(np.float32)
    offsets = draw.uniform(-9, 9, shape).astype(np.float32)
    integers, unused = npu.npu_swiglu_quant(
        torch.from_numpy(rows),
        smooth_scales=torch.from_numpy(smooth),
        offsets=torch.from_numpy(offsets),
        group_index=torch.tensor([1, 3], dtype=torch.int32),
    )
    group, columns = np.array([0, 1, 1]), slice(None) if per_column else None
    published = activated(rows, left=False)
    published[:3] = published[:3] * smooth[group][:, columns] + offsets[group][:, columns]
    assert np.abs(integers.numpy() - np.rint(published).clip(-128, 127)).max() <= 1
    assert np.abs(published).max() > 128, "saturation is part of the test"
    assert unused.isnan().all()


def test_ties_go_to_even(npu: EmulatedNpu) -> None:
    """silu(100) is 100 in float32, so a scale of 0.005 makes halves of the other half."""
    rows = torch.tensor([[1.0, 3.0, 5.0, -1.0, 100.0, 100.0, 100.0, 100.0]])
    integers, _ = npu.npu_swiglu_quant(
        rows, smooth_scales=torch.tensor([0.005]), offsets=torch.tensor([0.0])
    )
    assert integers.tolist() == [[0, 2, 2, 0]]


def test_rows_without_groups_and_of_zeros(npu: EmulatedNpu) -> None:
    integers, scale = npu.npu_swiglu_quant(
        torch.zeros(2, 8, dtype=torch.bfloat16), smooth_scales=torch.ones(1, 4), quant_mode=1
    )
    assert not integers.any()
    assert scale.tolist() == [float("inf")] * 2


ROWS = torch.ones(2, 8)
SMOOTH = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"quant_mode": 2}, r"only support 0\(static\) or 1\(dynamic\), but got 2"),
        (ROWS, {"group_list_type": 2}, r"only support 0\(cumsum\) or 1\(count\), but got 2"),
        (ROWS, {"dst_type": torch.uint8}, "dtype must be torch.int8 for int8 or torch.quint4x2"),
        (ROWS.int(), {}, "Tensor x not implemented for DT_INT32"),
        (ROWS[0], {}, "Input x shape dimension is less than 2"),
        (torch.ones(1, 8194), {}, "should not be larger than 8192, but got 8194"),
        (ROWS[:, :7], {}, "x last dim size should be even, got 7"),
        (ROWS[:, :6], {"dst_type": torch.quint4x2}, "must be divded by 4 when dst_type .* got 6"),
        (ROWS, {"quant_mode": 0}, "smooth_scales and offsets should have the same shape"),
        (ROWS, {"smooth_scales": None}, "smooth_scales is None"),
        (ROWS, {"smooth_scales": SMOOTH.half()}, "smooth_scales not implemented for DT_FLOAT16"),
        (ROWS, {"offsets": SMOOTH.half()}, "offsets not implemented for DT_FLOAT16"),
        (ROWS, {"group_index": torch.tensor([2])}, "Tensor group not implemented for DT_INT64"),
        (
            ROWS,
            {"smooth_scales": torch.ones(2, 4)},
            r"expert nums is :1, smooth_scales is \[2, 4\]",
        ),
        (ROWS, {"smooth_scales": torch.ones(1)}, r"smooth_scales is \[1\], expected \(1, 4\)$"),
    ],
)
def test_refusals(
    npu: EmulatedNpu, rows: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        npu.npu_swiglu_quant(rows, **({"smooth_scales": SMOOTH, "quant_mode": 1} | options))


@pytest.mark.parametrize("dst_type", [None, torch.int8, torch.quint4x2])
@pytest.mark.parametrize("mode", [0, 1])
def test_schema(npu: EmulatedNpu, dst_type: torch.dtype | None, mode: int) -> None:
    options = {"smooth_scales": SMOOTH, "offsets": SMOOTH, "quant_mode": mode, "dst_type": dst_type}
    with npu.active():
        torch.library.opcheck(
            torch.ops.npu.npu_swiglu_quant.default, (ROWS,), options, test_utils=("test_schema",)
        )
