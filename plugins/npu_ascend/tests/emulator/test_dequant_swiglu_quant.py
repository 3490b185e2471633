"""Dequantisation, SwiGLU and quantisation in one, against numpy in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise_npu_ascend.emulator import EmulatedNpu, Generation, install

COLUMNS = 64
HALF = COLUMNS // 2


@pytest.fixture(params=Generation)
def npu(request: pytest.FixtureRequest) -> EmulatedNpu:
    return install(request.param)


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def quantised(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The published dynamic quantisation: largest magnitude to 127."""
    scale = np.abs(values).max(axis=-1) / 127
    return np.rint(values / scale[:, None]), scale


def check(result: tuple[torch.Tensor, torch.Tensor], published: np.ndarray) -> None:
    """Integers within 1 of the published ones, as the vendor's tests allow, and equal scales."""
    integers, scale = quantised(published)
    rows = len(published)
    assert np.abs(result[0][:rows].numpy() - integers).max() <= 1
    assert (result[0][:rows].numpy() == integers).mean() > 0.98
    np.testing.assert_allclose(result[1][:rows].numpy(), scale, rtol=2e-5)


def test_the_right_half_is_activated_unless_told_otherwise(npu: EmulatedNpu) -> None:
    """The trap of the default: weights that are [gate | up] need ``activate_left=True``."""
    rows = np.zeros((1, COLUMNS), dtype=np.int32)
    rows[0, :HALF], rows[0, HALF:] = 3, -2
    rows[0, 0] = 30
    arguments: dict[str, Any] = {"weight_scale": torch.ones(COLUMNS), "quant_mode": 1}
    gate, up = np.split(rows.astype(np.float64), 2, axis=-1)
    right = npu.npu_dequant_swiglu_quant(torch.from_numpy(rows), **arguments)
    left = npu.npu_dequant_swiglu_quant(torch.from_numpy(rows), activate_left=True, **arguments)
    check(right, silu(up) * gate)
    check(left, silu(gate) * up)
    assert not torch.equal(right[0], left[0])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    st.integers(0, 2**16),
    st.sampled_from(["none", "int32", "float32", "bfloat16"]),
    st.booleans(),
    st.sampled_from(Generation),
)
def test_dynamic(
    counts: list[int], seed: int, bias: str, smooth: bool, generation: Generation
) -> None:
    draw = random(seed)
    total, groups = sum(counts), len(counts)
    rows = draw.integers(-4000, 4000, (total + 2, COLUMNS), dtype=np.int32)
    weight_scale = draw.uniform(1e-4, 1e-3, (groups, COLUMNS)).astype(np.float32)
    activation_scale = draw.uniform(0.5, 2, total + 2).astype(np.float32)
    arguments: dict[str, Any] = {
        "weight_scale": torch.from_numpy(weight_scale),
        "activation_scale": torch.from_numpy(activation_scale),
        "group_index": torch.tensor(counts),
        "activate_left": True,
        "quant_mode": 1,
    }
    group = np.repeat(np.arange(groups), counts)
    values = rows[:total].astype(np.float64)
    if bias == "int32":
        added = draw.integers(-500, 500, (groups, COLUMNS), dtype=np.int32)
        arguments["bias"] = torch.from_numpy(added)
        values = values + added[group]
    values = values * weight_scale[group] * activation_scale[:total, None]
    if bias in {"float32", "bfloat16"}:
        fraction = torch.from_numpy(draw.uniform(-1, 1, (groups, COLUMNS))).to(getattr(torch, bias))
        arguments["bias"] = fraction
        values = values + fraction.double().numpy()[group]
    published = silu(values[:, :HALF]) * values[:, HALF:]
    if smooth:
        factors = draw.uniform(0.5, 2, (groups, HALF)).astype(np.float32)
        arguments["quant_scale"] = torch.from_numpy(factors)
        published = published * factors[group]

    result = install(generation).npu_dequant_swiglu_quant(torch.from_numpy(rows), **arguments)

    check(result, published)
    assert result[0][total:].unique().tolist() == [-128], "rows behind the last group are poison"
    assert result[1][total:].isnan().all()


def test_ties_go_to_even(npu: EmulatedNpu) -> None:
    """silu(128) is 128 in float32, so every number here is exact until it is rounded."""
    rows = torch.full((1, COLUMNS), 128, dtype=torch.int32)
    values = torch.zeros(HALF)
    values[:8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5])
    scale = torch.cat([torch.ones(HALF), values / 128])
    expected = [127, 0, 2, 2, 0, -2, -2, 4] + [0] * (HALF - 8)
    dynamic = npu.npu_dequant_swiglu_quant(
        rows, weight_scale=scale, activate_left=True, quant_mode=1
    )
    static = npu.npu_dequant_swiglu_quant(
        rows,
        weight_scale=scale,
        quant_scale=torch.tensor([128.0]),
        quant_offset=torch.tensor([0.0]),
        activate_left=True,
    )
    assert (dynamic[0].tolist(), dynamic[1].tolist()) == ([expected], [128.0])
    assert static[0].tolist() == [expected]


def test_a_row_of_zeros(npu: EmulatedNpu) -> None:
    rows = torch.zeros(2, COLUMNS, dtype=torch.bfloat16)
    integers, scale = npu.npu_dequant_swiglu_quant(rows, quant_mode=1)
    assert not integers.any()
    assert scale.tolist() == [0.0, 0.0]


def test_rows_that_are_no_integers_skip_the_dequantisation(npu: EmulatedNpu) -> None:
    rows = torch.from_numpy(random(1).normal(size=(3, COLUMNS))).to(torch.bfloat16)
    values = rows.double().numpy()
    result = npu.npu_dequant_swiglu_quant(rows, activate_left=True, quant_mode=1)
    check(result, silu(values[:, :HALF]) * values[:, HALF:])


@pytest.mark.parametrize("generation", [Generation.A2, Generation.A3])
def test_scales_that_are_not_needed_are_not_looked_at(generation: Generation) -> None:
    npu = install(generation)
    rows = torch.ones(1, COLUMNS, dtype=torch.bfloat16)
    plain = npu.npu_dequant_swiglu_quant(rows, quant_mode=1)
    scaled = npu.npu_dequant_swiglu_quant(rows, weight_scale=torch.full((5,), 9.0), quant_mode=1)
    assert torch.equal(plain[0], scaled[0])


@pytest.mark.parametrize("per_column", [False, True])
def test_static(npu: EmulatedNpu, per_column: bool) -> None:
    """rint(value / quant_scale + quant_offset); the scale that is returned was never written."""
    draw = random(2)
    rows = draw.integers(-3000, 3000, (4, COLUMNS), dtype=np.int32)
    weight_scale = np.full((2, COLUMNS), 1e-3, dtype=np.float32)
    shape = (2, HALF) if per_column else (2,)
    scale = draw.uniform(0.02, 0.05, shape).astype(np.float32)
    offset = draw.uniform(-9, 9, shape).astype(np.float32)
    counts, group = torch.tensor([1, 2]), np.array([0, 1, 1])
    integers, unused = npu.npu_dequant_swiglu_quant(
        torch.from_numpy(rows),
        weight_scale=torch.from_numpy(weight_scale),
        quant_scale=torch.from_numpy(scale),
        quant_offset=torch.from_numpy(offset),
        group_index=counts,
        activate_left=True,
    )
    values = rows[:3].astype(np.float64) * np.float64(np.float32(1e-3))
    activated = silu(values[:, :HALF]) * values[:, HALF:]
    columns = slice(None) if per_column else None
    published = activated / scale[group][:, columns] + offset[group][:, columns]
    difference = np.abs(integers[:3].numpy() - np.rint(published).clip(-128, 127))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.98
    assert np.abs(published).max() > 128, "saturation is part of the test"
    assert integers[3].unique().tolist() == [-128]
    assert unused.isnan().all()


@pytest.mark.parametrize("generation", [Generation.A2, Generation.A3])
@pytest.mark.parametrize("mode", [1, 2])
def test_the_variant_with_limits(generation: Generation, mode: int) -> None:
    """gpt-oss: interleaved columns in mode 1, halves in mode 2."""
    rows = torch.from_numpy(random(3).normal(scale=6, size=(3, COLUMNS))).to(torch.bfloat16)
    values = rows.double().numpy()
    gate, up = (
        (values[:, 0::2], values[:, 1::2]) if mode == 1 else (values[:, :HALF], values[:, HALF:])
    )
    gate, up = np.minimum(gate, 5), np.clip(up, -5, 5)
    published = gate / (1 + np.exp(-1.5 * gate)) * (up + 0.25)
    result = install(generation).npu_dequant_swiglu_quant(
        rows,
        activate_left=True,
        quant_mode=1,
        swiglu_mode=mode,
        clamp_limit=5.0,
        glu_alpha=1.5,
        glu_bias=0.25,
    )
    check(result, published)


def test_without_rows(npu: EmulatedNpu) -> None:
    integers, scale = npu.npu_dequant_swiglu_quant(
        torch.zeros(0, COLUMNS, dtype=torch.int32),
        weight_scale=torch.ones(2, COLUMNS),
        group_index=torch.tensor([0, 0]),
        quant_mode=1,
    )
    assert (integers.shape, scale.shape) == ((0, HALF), (0,))


ROWS = torch.ones(4, COLUMNS, dtype=torch.int32)
WEIGHT_SCALE = torch.ones(COLUMNS)
PER_GROUP = torch.ones(2, COLUMNS)
COUNTS = torch.tensor([1, 2])
STATIC = {"quant_scale": torch.ones(1), "quant_offset": torch.zeros(1)}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS[0], {}, "x dim should larger than 1"),
        (ROWS[:, :63], {}, "x last dim should be even, got 63"),
        (ROWS, {"quant_mode": 2}, "quant_mode only support 0 or 1, but got 2"),
        (ROWS, {"swiglu_mode": 3}, "swiglu_mode only support 0, 1 or 2, but got 3"),
        (ROWS, {"clamp_limit": 0.0}, "clamp_limit should be positive finite"),
        (ROWS, {"glu_alpha": float("inf")}, "glu_alpha should be finite"),
        (ROWS, {"glu_bias": float("nan")}, "glu_bias should be finite"),
        (ROWS, {"swiglu_mode": 1}, "activate_left must be set to True"),
        (ROWS.float(), {}, r"Tensor x not implemented for DT_FLOAT, .*DT_INT32,DT_BFLOAT16"),
        (ROWS, {"weight_scale": None}, "error code is 161001, .*weight_scale must not be None"),
        (
            ROWS,
            {"weight_scale": WEIGHT_SCALE.bfloat16()},
            "weight_scale not implemented for DT_BFL",
        ),
        (ROWS, {"weight_scale": PER_GROUP}, r"weight_scale is \[2, 64\]: .*group_index \(1\)"),
        (
            ROWS,
            {"weight_scale": WEIGHT_SCALE, "group_index": COUNTS},
            r"weight_scale is \[64\]: .*group_index \(2\)",
        ),
        (
            ROWS,
            {"weight_scale": PER_GROUP, "group_index": COUNTS.int()},
            r"Tensor group_index not implemented for DT_INT32, .*\[DT_INT64\]",
        ),
        (ROWS, {"group_index": COUNTS.view(1, 2)}, "group_index is expected to have 1 dimension"),
        (ROWS, {"group_index": COUNTS + 1}, "group_index counts 5 rows of 4: .* outside"),
        (ROWS, {"group_index": torch.tensor([-1, 3])}, "group_index counts 2 rows of 4: .*outside"),
        (
            ROWS,
            {"activation_scale": torch.ones(3)},
            r"activation_scale num\(3\) must be equal to the tokens num\(4\)",
        ),
        (ROWS, {"activation_scale": torch.ones(4).half()}, "activation_scale not implemented for"),
        (ROWS, {"bias": torch.ones(COLUMNS).double()}, "Tensor bias not implemented for DT_DOUBLE"),
        (ROWS, {"bias": torch.ones(HALF)}, r"bias is \[32\]"),
        (ROWS, {"quant_mode": 1, "quant_offset": torch.ones(1)}, "Quant_offset must be None in"),
        (ROWS, {"quant_mode": 1, "quant_scale": torch.ones(COLUMNS)}, r"quant_scale is \[64\]"),
        (ROWS, {}, "quant_scale must not be None in static quant mode"),
        (
            ROWS,
            {"quant_scale": torch.ones(1)},
            "quant_offset must not be None in static quant mode",
        ),
        (ROWS, STATIC | {"quant_scale": torch.ones(2)}, r"quant_scale is \[2\], expected \[1, \]"),
        (
            ROWS,
            STATIC | {"quant_scale": torch.ones(1).half()},
            "dtypes of quant_offset and quant_s",
        ),
        (ROWS, STATIC | {"quant_scale": torch.ones(1).int()}, "quant_scale not implemented for DT"),
    ],
)
def test_refusals(
    npu: EmulatedNpu, rows: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        npu.npu_dequant_swiglu_quant(rows, **({"weight_scale": WEIGHT_SCALE} | options))
    assert not isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("generation", Generation)
def test_rows_of_groups_are_of_64_columns_on_the_older_chips(generation: Generation) -> None:
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = install(generation).npu_dequant_swiglu_quant(
            ROWS[:, :32], weight_scale=PER_GROUP[:, :32], group_index=COUNTS, quant_mode=1
        )
        return result

    if generation is Generation.A5:
        assert call()[0].shape == (4, 16)
        return
    with pytest.raises(RuntimeError, match="must be exactly divisible by 64, got 32"):
        call()


@pytest.mark.parametrize("generation", Generation)
def test_half_precision_rows_of_groups_are_for_the_newest_chip(generation: Generation) -> None:
    npu, rows = install(generation), torch.ones(4, COLUMNS, dtype=torch.float16)
    if generation is Generation.A5:
        npu.npu_dequant_swiglu_quant(rows, group_index=COUNTS, quant_mode=1)
        return
    with pytest.raises(RuntimeError, match=r"DT_FLOAT16, .*\[DT_INT32,DT_BFLOAT16\]"):
        npu.npu_dequant_swiglu_quant(rows, group_index=COUNTS, quant_mode=1)


def test_the_newest_chip_refuses_scales_of_rows_that_need_none() -> None:
    rows = torch.ones(1, COLUMNS, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="x is DT_BFLOAT16, so weight_scale must be a null"):
        install("A5").npu_dequant_swiglu_quant(rows, weight_scale=WEIGHT_SCALE, quant_mode=1)


@pytest.mark.parametrize(
    "options",
    [
        {"dst_type": torch.float8_e4m3fn},
        {"round_mode": 1},
        {"activate_dim": 0},
        {"swiglu_mode": 2},
    ],
)
def test_what_the_newest_chip_can_and_the_emulator_cannot(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"Ascend A5: .* is not emulated"):
        install("A5").npu_dequant_swiglu_quant(ROWS, weight_scale=WEIGHT_SCALE, **options)


@pytest.mark.parametrize("options", [{"quant_mode": 1}, STATIC])
def test_schema(npu: EmulatedNpu, options: dict[str, Any]) -> None:
    arguments = {"weight_scale": WEIGHT_SCALE, "activation_scale": torch.ones(4), **options}
    with npu.active():
        torch.library.opcheck(
            torch.ops.npu.npu_dequant_swiglu_quant.default,
            (ROWS,),
            arguments,
            test_utils=("test_schema",),
        )
