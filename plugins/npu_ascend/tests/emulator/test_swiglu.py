"""SwiGLU by itself, against numpy in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-50, 50, width=32)))
def test_the_first_half_is_activated(rows: np.ndarray) -> None:
    gate, up = np.split(rows.astype(np.float64), 2, axis=-1)
    published = gate / (1 + np.exp(-gate)) * up
    result = install("A2").npu_swiglu(torch.from_numpy(rows))
    np.testing.assert_allclose(result.numpy(), published, rtol=1e-5, atol=1e-30)


def test_another_axis(npu: EmulatedNpu) -> None:
    halves = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    expected = 3 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(npu.npu_swiglu(halves, 0).numpy(), [[0, expected]], rtol=1e-6)
    assert npu.npu_swiglu(halves, dim=-2).shape == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(npu: EmulatedNpu, dtype: torch.dtype) -> None:
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = npu.npu_swiglu(rows)
    assert result.dtype == dtype
    assert torch.equal(result, npu.npu_swiglu(rows.float()).to(dtype))


def test_far_from_zero(npu: EmulatedNpu) -> None:
    """exp overflows to infinity, and the quotient is zero, not NaN."""
    assert npu.npu_swiglu(torch.tensor([[-200.0, 200.0, 1.0, 1.0]])).tolist() == [[0.0, 200.0]]


@pytest.mark.parametrize(
    ("rows", "dim", "message"),
    [
        (torch.zeros(2, 7), -1, r"The shape \[2, 7\] is not divisible by 2"),
        (torch.zeros(3, 8), 0, r"The shape \[3, 8\] is not divisible by 2"),
        (torch.zeros(2, 8), 2, r"in the range \[-2, 1\], but got \[2\]"),
        (torch.zeros(2, 8, dtype=torch.int8), -1, "Tensor x not implemented for DT_INT8"),
    ],
)
def test_refusals(npu: EmulatedNpu, rows: torch.Tensor, dim: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        npu.npu_swiglu(rows, dim)
    assert "call aclnnSwiGlu failed, error code is 161002, EZ1001" in str(caught.value)


def test_schema(npu: EmulatedNpu) -> None:
    with npu.active():
        torch.library.opcheck(
            torch.ops.npu.npu_swiglu.default, (torch.ones(2, 4), 0), test_utils=("test_schema",)
        )
