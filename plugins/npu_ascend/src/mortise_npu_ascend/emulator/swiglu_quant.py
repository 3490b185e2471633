"""SwiGLU with quantisation in one kernel, whose dynamic scale is a factor and not a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.poison import unwritten
from mortise_npu_ascend.emulator.rejections import require, require_dtype
from mortise_npu_ascend.emulator.rounding import group_of_each_row, to_integers
from mortise_npu_ascend.emulator.swiglu import silu

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL: Final = "aclnnSwiGluQuantV2"
OPERATOR: Final = "npu_swiglu_quant"

STATIC: Final = 0
DYNAMIC: Final = 1

CUMULATIVE: Final = 0
COUNTS: Final = 1

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
_MOST_COLUMNS: Final = 8192


def npu_swiglu_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU, times smooth scales, and quantisation to int8 or int4, in float32.

    Dynamic: the second result is 127 / amax (int4: 7 / amax), what values were *multiplied* by.
    Other operators return its reciprocal. Static: rint(value * smooth_scales + offsets), saturated.

    Rows behind the last group are not smoothed, and quantised all the same.

    Args:
        x: float32, float16 or bfloat16 ``[M, 2H]``, 2H at most 8192.
        smooth_scales: float32 ``[E, H]``, static also ``[E]``; E is 1 without groups.
        offsets: float32 of the same shape, of static quantisation.
        group_index: int32 ``[E]``.
        activate_left: whether silu is applied to the left half; False unless given.
        quant_mode: 0 static, 1 dynamic.
        group_list_type: 0 where groups end, 1 how many rows they have.
        dst_type: int8 or None; ``quint4x2`` for two int4 values to a byte.

    Returns:
        int8 ``[M, H]``, for int4 ``[M, H/2]``; float32 ``[M]``, poison in static quantisation.
    """
    int4 = dst_type is torch.quint4x2
    _check(x, quant_mode, group_list_type, dst_type)
    _check_parameters(x, smooth_scales, offsets, group_index, quant_mode)
    assert smooth_scales is not None

    rows = x.float().flatten(0, -2)
    left, right = rows.chunk(2, dim=-1)
    activated = silu(left) * right if activate_left else silu(right) * left
    group, grouped = _groups(len(rows), group_index, group_list_type)
    smooth = _of_rows(smooth_scales, group, activated.shape[-1])
    values = torch.where(grouped, activated * smooth, activated)
    largest = 7 if int4 else 127
    if quant_mode == DYNAMIC:
        amax = values.abs().amax(dim=-1, keepdim=True)
        factor = torch.full_like(amax, largest) / amax
        values, scale = values * factor, factor.squeeze(-1)
    else:
        assert offsets is not None
        offset = _of_rows(offsets, group, activated.shape[-1])
        values = torch.where(grouped, values + offset, values)
        scale = unwritten((len(rows),), torch.float32)
    integers = to_integers(values, -largest - 1, largest).view(*x.shape[:-1], -1)
    return _bytes_of_two(integers) if int4 else integers, scale.view(x.shape[:-1])


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = ((OPERATOR, npu_swiglu_quant),)


def _groups(
    num_rows: int, group_index: torch.Tensor | None, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The group of each row (the last where it has none), and ``[M, 1]`` whether it has one."""
    if group_index is None:
        return torch.zeros(num_rows, dtype=torch.int64), torch.ones(num_rows, 1, dtype=torch.bool)
    ends = group_index if kind == CUMULATIVE else group_index.cumsum(0)
    group = group_of_each_row(ends, num_rows)
    return group.clamp(max=len(ends) - 1), (group < len(ends)).unsqueeze(-1)


def _of_rows(parameters: torch.Tensor, group: torch.Tensor, columns: int) -> torch.Tensor:
    return parameters.reshape(-1, 1 if parameters.ndim == 1 else columns)[group]


def _bytes_of_two(integers: torch.Tensor) -> torch.Tensor:
    """Two int4 values to an int8 byte, the first in the lower half."""
    low, high = integers[..., 0::2], integers[..., 1::2]
    return (high << 4) | (low & 0xF)


def _check(
    x: torch.Tensor, quant_mode: int, group_list_type: int, dst_type: torch.dtype | None
) -> None:
    require(
        quant_mode in {STATIC, DYNAMIC},
        OPERATOR,
        f"quant_mode only support 0(static) or 1(dynamic), but got {quant_mode}",
    )
    require(
        group_list_type in {CUMULATIVE, COUNTS},
        OPERATOR,
        f"group_list_type only support 0(cumsum) or 1(count), but got {group_list_type}",
    )
    require(
        dst_type in {None, torch.int8, torch.quint4x2},
        OPERATOR,
        f"dtype must be torch.int8 for int8 or torch.quint4x2 for int4, got {dst_type}",
    )
    require_dtype(x, "x", _FLOATS, OPERATOR, kernel=KERNEL)
    require(x.ndim > 1, OPERATOR, "Input x shape dimension is less than 2.", kernel=KERNEL)
    columns = x.shape[-1]
    require(
        columns <= _MOST_COLUMNS,
        OPERATOR,
        f"x last dim size should not be larger than {_MOST_COLUMNS}, but got {columns}",
    )
    require(columns % 2 == 0, OPERATOR, f"x last dim size should be even, got {columns}")
    require(
        dst_type is not torch.quint4x2 or columns % 4 == 0,
        OPERATOR,
        f"x shape last dim must be divded by 4 when dst_type is torch.quint4x2, but got {columns}",
    )


def _check_parameters(
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    group_index: torch.Tensor | None,
    quant_mode: int,
) -> None:
    shapes = [None if value is None else value.shape for value in (smooth_scales, offsets)]
    require(
        quant_mode == DYNAMIC or shapes[0] == shapes[1],
        OPERATOR,
        "smooth_scales and offsets should have the same shape when quant_mode is 0",
    )
    require(
        smooth_scales is not None,
        OPERATOR,
        "smooth_scales is None: the device reads them without looking whether they are there",
    )
    assert smooth_scales is not None
    for name, value in (("smooth_scales", smooth_scales), ("offsets", offsets)):
        if value is not None:
            require_dtype(value, name, (torch.float32,), OPERATOR, kernel=KERNEL)
    num_groups = 1
    if group_index is not None:
        require_dtype(group_index, "group", (torch.int32,), OPERATOR, kernel=KERNEL)
        num_groups = group_index.numel()
    half = x.shape[-1] // 2
    expected = [(num_groups, half), *([(num_groups,)] if quant_mode == STATIC else [])]
    require(
        num_groups > 0 and smooth_scales.shape in expected,
        OPERATOR,
        f"moe expert and smooth_scales first dim is not equal! expert nums is :{num_groups}, "
        f"smooth_scales is {list(smooth_scales.shape)}, expected {' or '.join(map(str, expected))}",
        kernel=KERNEL,
    )
