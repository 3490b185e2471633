"""What npu_dequant_swiglu_quant refuses."""

from __future__ import annotations

import math
from typing import Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.numbers import dtype_of
from mortise_npu_ascend.emulator.rejections import (
    NULL_POINTER,
    device_name,
    not_emulated,
    require,
    require_dtype,
)

OPERATOR: Final = "npu_dequant_swiglu_quant"
KERNEL: Final = "aclnnDequantSwigluQuantV2"

STATIC: Final = 0
DYNAMIC: Final = 1

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
_ALIGNMENT: Final = 64


def check_attributes(
    x: torch.Tensor,
    quant_mode: int,
    swiglu_mode: int,
    variant: tuple[float, float, float],
) -> None:
    """The modes, the constants of the variants (limit, alpha, bias), and the width of ``x``."""
    require(x.ndim > 1, OPERATOR, "x dim should larger than 1")
    require(
        quant_mode in {STATIC, DYNAMIC},
        OPERATOR,
        f"quant_mode only support 0 or 1, but got {quant_mode}",
    )
    require(
        swiglu_mode in {0, 1, 2},
        OPERATOR,
        f"swiglu_mode only support 0, 1 or 2, but got {swiglu_mode}",
    )
    clamp_limit, glu_alpha, glu_bias = variant
    require(
        math.isfinite(clamp_limit) and clamp_limit > 0,
        OPERATOR,
        f"clamp_limit should be positive finite, got {clamp_limit}",
    )
    require(math.isfinite(glu_alpha), OPERATOR, f"glu_alpha should be finite, got {glu_alpha}")
    require(math.isfinite(glu_bias), OPERATOR, f"glu_bias should be finite, got {glu_bias}")
    require(x.shape[-1] % 2 == 0, OPERATOR, f"x last dim should be even, got {x.shape[-1]}")


def check_side(activate_left: bool, swiglu_mode: int) -> None:
    """Interleaved columns have no left and right half, and the manual asks for the left one."""
    require(
        activate_left or swiglu_mode != 1,
        OPERATOR,
        "activate_left must be set to True when swiglu_mode is 1",
    )


def check_newest_attributes(
    dst_type: int | None,
    round_mode: int | None,
    activate_dim: int | None,
    swiglu_mode: int,
) -> None:
    """What only A5 looks at, of which the emulator has the defaults."""
    if current_chip().generation is not Generation.A5:
        return
    if dst_type is not None and dtype_of(dst_type) is not torch.int8:
        not_emulated(OPERATOR, f"dst_type {dtype_of(dst_type) or dst_type}")
    if round_mode:
        not_emulated(OPERATOR, f"round_mode {round_mode}")
    if activate_dim not in {None, -1}:
        not_emulated(OPERATOR, f"activate_dim {activate_dim}")
    if swiglu_mode:
        not_emulated(OPERATOR, f"swiglu_mode {swiglu_mode}")


def check_group_index(x: torch.Tensor, group_index: torch.Tensor | None) -> None:
    """Dtypes and shape of the rows and of the counts, and that the counts are of these rows."""
    dtypes = (torch.int32, torch.bfloat16, torch.float16)
    if group_index is None:
        require_dtype(x, "x", dtypes, OPERATOR, kernel=KERNEL)
        return
    newest = current_chip().generation is Generation.A5
    require_dtype(x, "x", dtypes if newest else dtypes[:2], OPERATOR, kernel=KERNEL)
    require_dtype(group_index, "group_index", (torch.int64,), OPERATOR, kernel=KERNEL)
    require(
        newest or x.shape[-1] % _ALIGNMENT == 0,
        OPERATOR,
        f"The last dimension of x must be exactly divisible by {_ALIGNMENT}, got {x.shape[-1]}",
        kernel=KERNEL,
    )
    require(
        group_index.ndim == 1 and len(group_index) > 0,
        OPERATOR,
        f"group_index is expected to have 1 dimension and a group, got {tuple(group_index.shape)}",
        kernel=KERNEL,
    )
    num_rows, total = x.shape[:-1].numel(), int(group_index.sum())
    require(
        int(group_index.min()) >= 0 and total <= num_rows,
        OPERATOR,
        f"group_index counts {total} rows of {num_rows}: the device would read and write outside "
        "of its tensors",
    )


def check_dequantisation(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
) -> None:
    """What turns an int32 product into numbers, and that nothing else does."""
    if x.dtype is not torch.int32:
        # A2 and A3 do not look at what they do not need.
        given = [
            name
            for name, value in (("weight_scale", weight_scale), ("bias", bias))
            if value is not None
        ]
        newest = current_chip().generation is Generation.A5
        require(
            not newest or not given,
            OPERATOR,
            f"x is {device_name(x.dtype)}, so {' and '.join(given)} must be a null pointer",
            kernel=KERNEL,
        )
        return
    require(
        weight_scale is not None,
        OPERATOR,
        "weight_scale must not be None when x is DT_INT32",
        kernel=KERNEL,
        code=NULL_POINTER,
    )
    assert weight_scale is not None
    require_dtype(weight_scale, "weight_scale", (torch.float32,), OPERATOR, kernel=KERNEL)
    _check_shape("weight_scale", weight_scale, num_groups, x.shape[-1])
    if activation_scale is not None:
        num_rows = x.shape[:-1].numel()
        require_dtype(
            activation_scale, "activation_scale", (torch.float32,), OPERATOR, kernel=KERNEL
        )
        require(
            activation_scale.numel() == num_rows,
            OPERATOR,
            f"activation_scale num({activation_scale.numel()}) must be equal to the tokens "
            f"num({num_rows}), please check.",
            kernel=KERNEL,
        )
    if bias is not None:
        require_dtype(bias, "bias", (*_FLOATS, torch.int32), OPERATOR, kernel=KERNEL)
        _check_shape("bias", bias, num_groups, x.shape[-1])


def check_quantisation(
    x: torch.Tensor,
    quant_mode: int,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    num_groups: int,
) -> None:
    """Smooth scales of dynamic, scales and offsets of static quantisation."""
    half = x.shape[-1] // 2
    if quant_scale is not None:
        require_dtype(quant_scale, "quant_scale", _FLOATS, OPERATOR, kernel=KERNEL)
    if quant_mode == DYNAMIC:
        require(
            quant_offset is None,
            OPERATOR,
            "Quant_offset must be None in dynamic quant mode (quant_mode=1)",
            kernel=KERNEL,
        )
        if quant_scale is not None:
            _check_shape("quant_scale", quant_scale, num_groups, half)
        return
    for name, value in (("quant_scale", quant_scale), ("quant_offset", quant_offset)):
        require(
            value is not None,
            OPERATOR,
            f"{name} must not be None in static quant mode (quant_mode=0)",
            kernel=KERNEL,
            code=NULL_POINTER,
        )
        assert value is not None
        require(
            value.shape in {(num_groups,), (num_groups, half)},
            OPERATOR,
            f"{name} is {list(value.shape)}, expected [{num_groups}, ] or [{num_groups}, {half}]",
            kernel=KERNEL,
        )
    assert quant_scale is not None and quant_offset is not None
    require(
        quant_scale.dtype is quant_offset.dtype and quant_scale.shape == quant_offset.shape,
        OPERATOR,
        "The dtypes of quant_offset and quant_scale dtype must be the same, and their shapes",
        kernel=KERNEL,
    )


def _check_shape(name: str, value: torch.Tensor, num_groups: int, columns: int) -> None:
    expected = {(num_groups, columns)} | ({(columns,)} if num_groups == 1 else set())
    require(
        tuple(value.shape) in expected,
        OPERATOR,
        f"{name} is {list(value.shape)}: the first dimension of {name} must be equal to the first "
        f"dimension of group_index ({num_groups}), the last to {columns}",
        kernel=KERNEL,
    )
