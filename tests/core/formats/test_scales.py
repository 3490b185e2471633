"""Scales that cannot be used are refused by name, with how many and where."""

from __future__ import annotations

import pytest
import torch

from mortise.errors import ScaleError
from mortise.formats.fp8 import quantise_fp8_block
from mortise.formats.integer import pack_int4, quantise_int_weight
from mortise.formats.nvfp4 import quantise_nvfp4
from mortise.formats.scales import check_scale

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu)
NAME = "model.layers.3.mlp.experts.7.up_proj.weight_scale"


def scales_with(value: float, dtype: torch.dtype) -> torch.Tensor:
    """Ones, and the value at [1, 2] and at [2, 0]."""
    scale = torch.ones(3, 4)
    scale[1, 2] = scale[2, 0] = value
    return scale.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_good_scales_pass(dtype: torch.dtype) -> None:
    check_scale(NAME, scales_with(0.25, dtype), (3, 4))
    check_scale(NAME, torch.ones(2, dtype=dtype), [2])
    check_scale(NAME, torch.ones((), dtype=dtype), ())
    check_scale(NAME, torch.ones(0, 4, dtype=dtype), (0, 4))


@pytest.mark.parametrize(
    ("value", "what", "dtypes"),
    [
        (float("nan"), "NaN", DTYPES),
        (float("inf"), "infinite", DTYPES[:2]),
        (-float("inf"), "infinite", DTYPES[:2]),
        (-2.0, "negative", DTYPES[:3]),
        (0.0, "zero", DTYPES[:3]),
        (-0.0, "zero", DTYPES[:3]),
    ],
)
def test_bad_scales_are_counted_and_found(
    value: float, what: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    for dtype in dtypes:
        with pytest.raises(ScaleError) as caught:
            check_scale(NAME, scales_with(value, dtype), (3, 4))
        assert caught.value.what.startswith(
            f"scale {NAME} is unusable: 2 of 12 values are {what}, the first at [1, 2]: "
        )


def test_every_kind_of_problem_is_told_at_once() -> None:
    scale = torch.tensor([1.0, -3.0, float("nan"), 0.0, float("inf")])
    with pytest.raises(ScaleError) as caught:
        check_scale("s", scale, (5,))
    lines = (caught.value.what, *caught.value.details)
    assert [line.split("values are ")[1] for line in lines] == [
        "NaN, the first at [2]: nan",
        "infinite, the first at [4]: inf",
        "negative, the first at [1]: -3",
        "zero, the first at [3]: 0",
    ]


@pytest.mark.parametrize("shape", [(4, 3), (3,), (12,), (3, 4, 1), ()])
def test_the_shape_is_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(ScaleError, match=r"has the shape \[3, 4\]") as caught:
        check_scale(NAME, torch.ones(3, 4), shape)
    assert caught.value.expected == f"shape {list(shape)}"


def one_zero_block(rows: int, columns: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose last group of the second row is zero, and which scale that is."""
    weight = torch.ones(rows, columns)
    weight[1, -group:] = 0
    where = torch.zeros(rows, columns // group, dtype=torch.bool)
    where[1, -1] = True
    return weight, where


def stored_forms() -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Name, values, scales with one zero over zeros, and where a value is under that scale."""
    weight, where = one_zero_block(4, 64, 16)
    packed, e4m3 = quantise_nvfp4(weight, 1 / 448)
    int8, scale = quantise_int_weight(weight, 8, group_size=16)
    int4, scale4 = quantise_int_weight(weight, 4, group_size=16)
    edge = torch.ones(200, 130)
    edge[128:, 128:] = -0.0
    fp8, blocks = quantise_fp8_block(edge)
    blocks[1, 1] = 0
    return [
        ("nvfp4", packed, e4m3, torch.tensor([1, 31])),
        ("int8", int8, scale.masked_fill(where, 0), torch.tensor([1, 63])),
        ("int4", pack_int4(int4), scale4.masked_fill(where, 0), torch.tensor([1, 7])),
        ("fp8", fp8, blocks, torch.tensor([199, 129])),
        ("fp8 edge", fp8, blocks, torch.tensor([128, 128])),
    ]


@pytest.mark.parametrize("form", stored_forms(), ids=lambda form: form[0])
def test_a_zero_passes_over_zeros_alone(
    form: tuple[str, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, values, scale, position = form
    check_scale(NAME, scale, scale.shape, values=values)
    with pytest.raises(ScaleError, match=r"1 of .* values are zero"):
        check_scale(NAME, scale, scale.shape)
    changed = values.clone()
    changed.view(torch.uint8 if values.element_size() == 1 else values.dtype)[tuple(position)] = 1
    with pytest.raises(ScaleError, match=r"1 of .* values are zero"):
        check_scale(NAME, scale, scale.shape, values=changed)


def test_zeros_of_either_sign_are_zeros() -> None:
    scale = torch.zeros(1, 1)
    check_scale("s", scale, (1, 1), values=torch.full((1, 8), 0x88, dtype=torch.uint8))
    negative = torch.full((1, 16), -0.0).to(torch.float8_e4m3fn)
    check_scale("s", scale, (1, 1), values=negative)


def test_values_of_every_expert() -> None:
    weight = torch.ones(3, 4, 64)
    weight[2, 1, 16:32] = 0
    packed, scale = quantise_nvfp4(weight, 1 / 448)
    check_scale("s", scale, (3, 4, 4), values=packed)
    packed[2, 1, 8] = 0x10
    with pytest.raises(ScaleError, match=r"the first at \[2, 1, 1\]: 0"):
        check_scale("s", scale, (3, 4, 4), values=packed)
