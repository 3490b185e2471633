"""What a grouped product refuses in its modes with int4 weights and quantised rows."""

from __future__ import annotations

from typing import Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.grouped_arguments import (
    check_bias,
    check_columns,
    check_dtype,
    check_group_size,
    check_result,
    check_row_scale,
    check_words,
    must_be_given,
    must_be_none,
    must_be_single,
    num_groups,
)
from mortise_npu_ascend.emulator.grouped_call import GroupedCall, weight_shape
from mortise_npu_ascend.emulator.grouped_checks import refuse_unless
from mortise_npu_ascend.emulator.grouped_modes import Mode
from mortise_npu_ascend.emulator.rejections import device_name

SIXTEEN_BITS: Final = (torch.float16, torch.bfloat16)

# int4 weights with int8 rows: the largest K, and the only size of groups of K.
_LARGEST_INNER: Final = 18432
_GROUP_SIZE: Final = 256

# The same mode of the newest generation: sizes of groups, and what divides K and N.
_NEWEST_GROUP_SIZES: Final = (128, 192, 256, 512)
_NEWEST_MULTIPLE: Final = 64


def check_int4(call: GroupedCall) -> None:
    """Rows and weights of int4."""
    must_be_single(call, Mode.A4W4)
    check_result(call, Mode.A4W4, SIXTEEN_BITS)
    for name in ("offset", "bias"):
        refuse_unless(
            getattr(call, name) is None,
            call,
            f"when A4W4 quant, [{name}] is not supported. Constraint:[{name} must be nullptr].",
        )
    must_be_none(call, Mode.A4W4, "antiquant_scale", "antiquant_offset")
    must_be_given(call, Mode.A4W4, "scale")
    check_words(call, Mode.A4W4)
    check_columns(call, "scale", groups=True)
    check_row_scale(call, Mode.A4W4)
    rule = "per-group num k/G should be divisible by 2"
    check_group_size(call, "scale", lambda size: size % 2 == 0, rule)
    if weight_shape(call.weight[0]).is_transposed:
        _check_transposed_int4(call)


def _check_transposed_int4(call: GroupedCall) -> None:
    shape = weight_shape(call.weight[0])
    refuse_unless(
        call.is_tiled, call, "when A4W4 quant, a transposed weight must be in FRACTAL_NZ."
    )
    size = shape.inner // num_groups(call, "scale")
    refuse_unless(
        shape.inner % 64 == 0 and size % 64 == 0 and shape.columns % 16 == 0,
        call,
        "when A4W4 quant, a transposed weight needs k and k/G aligned to 64 and n to 16, got "
        f"k[{shape.inner}], k/G[{size}], n[{shape.columns}].",
    )


def check_assisted(call: GroupedCall) -> None:
    """int4 weights with int8 rows, where the kernel multiplies two halves of every row."""
    must_be_single(call, Mode.A8W4)
    check_result(call, Mode.A8W4, SIXTEEN_BITS)
    must_be_none(call, Mode.A8W4, "antiquant_scale", "antiquant_offset")
    must_be_given(call, Mode.A8W4, "scale", "per_token_scale", "bias")
    check_bias(call, Mode.A8W4, (torch.float32,))
    check_words(call, Mode.A8W4)
    check_columns(call, "scale", groups=True)
    check_row_scale(call, Mode.A8W4, column=call.offset is not None)
    shape = weight_shape(call.weight[0])
    _refuse_transposed(call)
    refuse_unless(
        shape.inner <= _LARGEST_INNER,
        call,
        f"when A8W4 quant, k should be less than or equal to {_LARGEST_INNER}, got {shape.inner}.",
    )
    if call.offset is not None:
        _check_asymmetric(call)
    # The manual wants a multiple of 256 for one scale per column too; the kernel does without.
    is_uneven = current_chip().strict and shape.inner % _GROUP_SIZE
    whole = 0 if is_uneven else shape.inner
    rule = f"k should be a multiple of quantGroupSize, which is {_GROUP_SIZE}"
    check_group_size(call, "scale", lambda size: size in (_GROUP_SIZE, whole), rule)


def _check_asymmetric(call: GroupedCall) -> None:
    refuse_unless(
        call.out_dtype == torch.float16,
        call,
        "when A8W4 asymmetric quant, the data type of [y] is not supported, got "
        f"[{device_name(call.out_dtype)}].",
    )
    check_dtype(call, Mode.A8W4, "offset", torch.float32)
    check_columns(call, "offset", groups=True)
    refuse_unless(
        num_groups(call, "scale") == 1,
        call,
        "when A8W4 asymmetric quant, the shape of [scale] should be (E, 1, N).",
    )


def check_rescaled(call: GroupedCall) -> None:
    """int4 weights with int8 rows, where the kernel makes the weights int8 first."""
    must_be_single(call, Mode.A8W4)
    refuse_unless(call.is_tiled, call, "when A8W4 quant, weight must be in FRACTAL_NZ.")
    must_be_none(call, Mode.A8W4, "offset", "antiquant_offset")
    must_be_given(call, Mode.A8W4, "antiquant_scale", "scale", "per_token_scale")
    check_result(call, Mode.A8W4, SIXTEEN_BITS)
    check_bias(call, Mode.A8W4, (torch.float32,))
    check_dtype(call, Mode.A8W4, "antiquant_scale", torch.float16)
    check_dtype(call, Mode.A8W4, "scale", torch.float32)
    check_columns(call, "scale")
    check_columns(call, "antiquant_scale", groups=True)
    check_row_scale(call, Mode.A8W4)
    _refuse_transposed(call)
    shape = weight_shape(call.weight[0])
    refuse_unless(
        shape.inner % _NEWEST_MULTIPLE == 0 and shape.columns % _NEWEST_MULTIPLE == 0,
        call,
        f"The value of dim n, k should be an integer multiple of {_NEWEST_MULTIPLE}, got "
        f"n={shape.columns}, k={shape.inner}.",
    )
    check_group_size(
        call,
        "antiquant_scale",
        lambda size: size in _NEWEST_GROUP_SIZES,
        f"antiquantGroupSize should be one of {_NEWEST_GROUP_SIZES}",
    )


def _refuse_transposed(call: GroupedCall) -> None:
    transposed = weight_shape(call.weight[0]).is_transposed
    refuse_unless(not transposed, call, "when A8W4 quant, weight cannot be transposed.")
