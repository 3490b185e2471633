"""Dynamic quantisation, against numpy and against what the operator's manual prints."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def int4_values(words: torch.Tensor) -> np.ndarray:
    """The eight values of each word, the first in its lowest four bits."""
    unsigned = words.numpy().astype(np.int64)[..., None] >> np.arange(0, 32, 4) & 0xF
    return np.where(unsigned > 7, unsigned - 16, unsigned).reshape(*words.shape[:-1], -1)


# torch_npu.npu_dynamic_quant in the manual of op-plugin: input, smooth scales, output and scale as
# a device printed them, four digits behind the point.
PRINTED = (
    (
        [[0.7261, 0.3726, 0.9126], [0.9023, 0.9990, 0.1279], [0.8628, 0.6240, 0.9028]],
        None,
        [[101, 52, 127], [115, 127, 16], [121, 88, 127]],
        [0.0072, 0.0079, 0.0071],
    ),
    (
        [[0.6680, 0.9492, 0.0845], [0.1924, 0.5278, 0.1484], [0.6631, 0.9497, 0.0957]],
        [0.8042, 0.0884, 0.8901],
        [[127, 20, 18], [127, 38, 108], [127, 20, 20]],
        [0.0042, 0.0012, 0.0042],
    ),
)


@pytest.mark.parametrize(("rows", "smooth", "integers", "scales"), PRINTED)
def test_what_the_manual_prints(
    npu: EmulatedNpu,
    rows: list[list[float]],
    smooth: list[float] | None,
    integers: list[list[int]],
    scales: list[float],
) -> None:
    values = torch.tensor(rows, dtype=torch.float16)
    factors = None if smooth is None else torch.tensor(smooth, dtype=torch.float16)
    quantised, scale = npu.npu_dynamic_quant(values, smooth_scales=factors)
    assert quantised.tolist() == integers
    np.testing.assert_allclose(scale.numpy(), scales, atol=5e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_ties_go_to_even(npu: EmulatedNpu, dtype: torch.dtype) -> None:
    """With 127 as the largest value the scale is exactly 1."""
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]], dtype=dtype)
    quantised, scale = npu.npu_dynamic_quant(rows)
    assert quantised.tolist() == [[127, 0, 2, 2, 0, -2, -2, 4]]
    assert scale.tolist() == [1.0]


def test_int4_ties_go_to_even_and_the_first_value_is_the_lowest_nibble(npu: EmulatedNpu) -> None:
    rows = torch.tensor([[7.0, 0.5, 1.5, 2.5, -7.0, -1.5, 3.0, -2.5]], dtype=torch.bfloat16)
    words, scale = npu.npu_dynamic_quant(rows, dst_type=torch.quint4x2)
    assert (words.dtype, words.shape, scale.tolist()) == (torch.int32, (1, 1), [1.0])
    expected = [7, 0, 2, 2, -7, -2, 3, -2]
    packed = sum((value % 16) << (4 * place) for place, value in enumerate(expected))
    assert words.item() % 2**32 == packed


def test_a_row_of_zeros_has_scale_zero(npu: EmulatedNpu) -> None:
    rows = torch.tensor([[0.0] * 8, [1.0] * 8], dtype=torch.bfloat16)
    for dst_type, largest in ((None, 127), (torch.quint4x2, 7)):
        quantised, scale = npu.npu_dynamic_quant(rows, dst_type=dst_type)
        assert not quantised[0].any()
        assert scale[0] == 0
        assert scale[1].item() == pytest.approx(1 / largest, rel=1e-6)


FINITE = st.floats(-1e4, 1e4, width=16)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float16, hnp.array_shapes(min_dims=2, max_dims=3, max_side=8), elements=FINITE),
    st.sampled_from(Generation),
)
def test_int8_is_the_published_definition(rows: np.ndarray, generation: Generation) -> None:
    """scale = max|x| / 127 and y = round(x / scale), with the tolerance of the vendor's tests."""
    quantised, scale = install(generation).npu_dynamic_quant(torch.from_numpy(rows))
    exact = np.abs(rows.astype(np.float64)).max(axis=-1) / 127
    np.testing.assert_allclose(scale.numpy(), exact, rtol=1e-6)
    safe = np.where(exact == 0, 1, exact)[..., None]
    assert np.abs(quantised.numpy() - np.rint(rows / safe)).max() <= 1
    error = np.abs(quantised.numpy() * exact[..., None] - rows)
    assert (error <= 0.5001 * exact[..., None]).all()


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float16, (3, 16), elements=FINITE), st.sampled_from(Generation))
def test_int4_is_the_published_definition(rows: np.ndarray, generation: Generation) -> None:
    words, scale = install(generation).npu_dynamic_quant(
        torch.from_numpy(rows), dst_type=torch.quint4x2
    )
    exact = np.abs(rows.astype(np.float64)).max(axis=-1) / 7
    np.testing.assert_allclose(scale.numpy(), exact, rtol=1e-6)
    error = np.abs(int4_values(words) * exact[:, None] - rows)
    assert (error <= 0.5001 * exact[:, None]).all()


def test_smooth_scales_of_groups_and_poison_behind_the_last(npu: EmulatedNpu) -> None:
    """``group_index`` says where groups end; the second of three groups is empty here."""
    rows = torch.tensor([[1.0, 2.0]] * 5, dtype=torch.float16)
    smooth = torch.tensor([[1.0, 1.0], [9.0, 9.0], [2.0, 0.5]], dtype=torch.float16)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    quantised, scale = npu.npu_dynamic_quant(rows, smooth_scales=smooth, group_index=ends)
    assert quantised[:4].tolist() == [[64, 127], [64, 127], [127, 64], [127, 64]]
    np.testing.assert_allclose(scale[:4].numpy(), 2 / 127, rtol=1e-6)
    assert quantised[4].tolist() == [-128, -128]
    assert math.isnan(scale[4].item())


def test_poison_behind_the_last_group_of_int4_rows_in_more_dimensions(npu: EmulatedNpu) -> None:
    rows = torch.ones(2, 2, 8, dtype=torch.bfloat16)
    words, scale = npu.npu_dynamic_quant(
        rows,
        smooth_scales=torch.ones(1, 8, dtype=torch.bfloat16),
        group_index=torch.tensor([3], dtype=torch.int32),
        dst_type=torch.quint4x2,
    )
    assert words.view(-1).tolist() == [0x77777777] * 3 + [-(2**31)]
    assert scale.view(-1).isnan().tolist() == [False] * 3 + [True]


def test_the_newest_chip_has_a_scale_for_everything_or_for_a_column() -> None:
    npu = install("A5")
    rows = torch.tensor([[1.0, -4.0], [2.0, 0.0]], dtype=torch.bfloat16)
    quantised, scale = npu.npu_dynamic_quant(rows, quant_mode="pertensor")
    assert (quantised.tolist(), scale.shape) == ([[32, -127], [64, 0]], (1,))
    assert scale.item() == pytest.approx(4 / 127)
    quantised, scale = npu.npu_dynamic_quant(rows, quant_mode="perchannel")
    assert quantised.tolist() == [[64, -127], [127, 0]]
    np.testing.assert_allclose(scale.numpy(), [2 / 127, 4 / 127], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float16, (2, 8), elements=FINITE), st.booleans())
def test_asymmetric_is_the_published_definition(rows: np.ndarray, int4: bool) -> None:
    quantised, scale, offset = install("A2").npu_dynamic_quant_asymmetric(
        torch.from_numpy(rows), dst_type=torch.quint4x2 if int4 else None
    )
    steps, largest = (15, 7) if int4 else (255, 127)
    values = rows.astype(np.float64)
    high, low = values.max(axis=-1), values.min(axis=-1)
    exact = np.maximum((high - low) / steps, 1e-12)
    np.testing.assert_allclose(scale.numpy(), exact, rtol=1e-6)
    ratio = high / exact
    tolerance = 1e-6 * (largest + np.abs(ratio))
    assert (np.abs(offset.numpy() - (largest - ratio)) <= tolerance).all()
    integers = int4_values(quantised) if int4 else quantised.numpy()
    published = np.rint(values / exact[:, None] + (largest - ratio)[:, None])
    difference = np.abs(integers - published.clip(-largest - 1, largest))
    assert (difference <= 1 + 4 * tolerance[:, None]).all()


def test_asymmetric_ties_and_the_whole_range(npu: EmulatedNpu) -> None:
    """A range of 255 makes the scale 1 and the offset exact."""
    rows = torch.tensor([[127.0, -128.0, 0.5, 1.5, -0.5]], dtype=torch.float16)
    quantised, scale, offset = npu.npu_dynamic_quant_asymmetric(rows)
    assert (scale.tolist(), offset.tolist()) == ([1.0], [0.0])
    assert quantised.tolist() == [[127, -128, 0, 2, 0]]


ROWS = torch.zeros(2, 8, dtype=torch.float16)
OPERATORS = ["npu_dynamic_quant", "npu_dynamic_quant_asymmetric"]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS[0], {}, "Input shape dim should be greater than 1"),
        (ROWS.float(), {}, r"Tensor x not implemented for DT_FLOAT, .*\[DT_FLOAT16,DT_BFLOAT16\]"),
        (
            ROWS[:, :7],
            {"dst_type": torch.quint4x2},
            "Input shape last dim must be divded by 8 when int4 quantization, got 7",
        ),
        (ROWS, {"quant_mode": "perhead"}, "must be pertoken, pertensor or perchannel"),
        (
            ROWS,
            {"smooth_scales": torch.ones(8)},
            "dtypes of x and smooth_scales are not equal: DT_FLOAT16 and DT_FLOAT",
        ),
        (
            ROWS,
            {"smooth_scales": torch.ones(7, dtype=torch.float16)},
            r"smooth_scales is \(7,\), expected \(8,\)",
        ),
        (
            ROWS,
            {
                "smooth_scales": torch.ones(1, 8, dtype=torch.float16),
                "group_index": torch.tensor([2]),
            },
            r"Tensor groupIndex not implemented for DT_INT64, .*\[DT_INT32\]",
        ),
        (
            ROWS,
            {
                "smooth_scales": torch.ones(1, 8, dtype=torch.float16),
                "group_index": torch.tensor([[2]], dtype=torch.int32),
            },
            r"The dimNum\[2\] of group_indexs should be equal to one",
        ),
        (
            ROWS,
            {
                "smooth_scales": torch.ones(1, 8, dtype=torch.float16),
                "group_index": torch.tensor([1, 2], dtype=torch.int32),
            },
            r"smooth_scales is \(1, 8\), expected \(2, 8\)",
        ),
        (ROWS, {"group_index": torch.tensor([2], dtype=torch.int32)}, "there are none"),
    ],
)
def test_refusals(
    npu: EmulatedNpu, operator: str, rows: torch.Tensor, options: dict, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        getattr(npu, operator)(rows, **options)
    assert f"{operator} on an emulated Ascend {npu.chip.generation}: " in str(caught.value)


@pytest.mark.parametrize("generation", [Generation.A2, Generation.A3])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_mode": "pertensor"}, "aclnnDynamicQuantV3 only support socVersion Ascend950"),
        ({"quant_mode": "perchannel"}, "aclnnDynamicQuantV3 only support socVersion Ascend950"),
        ({"dst_type_max": 448.0}, "aclnnDynamicQuantV4 only support socVersion Ascend950"),
        ({"dst_type": torch.float8_e4m3fn}, r"DT_FLOAT8_E4M3FN, .*\[DT_INT8,DT_INT32,DT_INT4\]"),
        ({"dst_type": 290}, "not implemented for 290"),
    ],
)
def test_refusals_of_the_older_chips(generation: Generation, options: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        install(generation).npu_dynamic_quant(ROWS, **options)
    assert not isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize(
    "options",
    [
        {"dst_type_max": 448.0},
        {"dst_type": torch.float8_e4m3fn},
        {"dst_type": 290},
        {"quant_mode": "pertensor", "smooth_scales": torch.ones(8, dtype=torch.float16)},
    ],
)
def test_what_the_newest_chip_can_and_the_emulator_cannot(options: dict) -> None:
    with pytest.raises(NotImplementedError, match=r"Ascend A5: .* is not emulated"):
        install("A5").npu_dynamic_quant(ROWS, **options)
    with pytest.raises(NotImplementedError, match="quant_mode 'perchannel' is not emulated"):
        install("A5").npu_dynamic_quant_asymmetric(ROWS, quant_mode="perchannel")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dst_type", [None, torch.int8, torch.quint4x2])
def test_schema(npu: EmulatedNpu, operator: str, dst_type: torch.dtype | None) -> None:
    smooth = torch.ones(1, 8, dtype=torch.float16)
    options = {
        "dst_type": dst_type,
        "smooth_scales": smooth,
        "group_index": torch.tensor([1], dtype=torch.int32),
    }
    with npu.active():
        torch.library.opcheck(
            getattr(torch.ops.npu, operator).default, (ROWS,), options, test_utils=("test_schema",)
        )
