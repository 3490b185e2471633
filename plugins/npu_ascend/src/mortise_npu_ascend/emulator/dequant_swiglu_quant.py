"""Dequantisation of an int32 product, SwiGLU, and quantisation for the next product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator import dequant_swiglu_checks as checks
from mortise_npu_ascend.emulator.poison import poison_rows, unwritten
from mortise_npu_ascend.emulator.rounding import by_largest, group_of_each_row, to_integers
from mortise_npu_ascend.emulator.swiglu import silu

if TYPE_CHECKING:
    from collections.abc import Callable


def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantise an int32 product, apply SwiGLU, and quantise to int8, in float32 throughout.

    value = (x + int32 bias) * weight_scale * activation_scale + float bias, for int32 ``x`` only.
    Then the activated half goes through silu and is multiplied with the other. ``activate_left``
    is False unless given: then the *right* half is activated.

    Dynamic: times ``quant_scale`` if there is one, scale = amax * (1 / 127), integer = rint(value /
    scale). Static: rint(value / quant_scale + quant_offset), saturated.

    Args:
        x: int32, bfloat16 or float16 (the last without groups) ``[M, 2H]``; with groups 2H is a
            multiple of 64 on A2 and A3.
        weight_scale: float32 ``[2H]``, with groups ``[E, 2H]``; required for int32.
        activation_scale: float32 ``[M]`` or ``[M, 1]``.
        bias: int32 or a float ``[2H]``, with groups ``[E, 2H]``.
        quant_scale: dynamic ``[H]`` or ``[E, H]``; static ``[E]`` or ``[E, H]``, required.
        quant_offset: of the shape and dtype of a static ``quant_scale``, required there.
        group_index: int64 ``[E]``, how many rows each group has.
        activate_left: whether silu is applied to the left half.
        quant_mode: 0 static, 1 dynamic.
        dst_type: int8 or None; A2 and A3 do not look at it.
        round_mode: 0 or None; A2 and A3 do not look at it.
        activate_dim: -1 or None; A2 and A3 do not look at it.
        swiglu_mode: 1 takes even columns as gate and odd ones as the other half, 2 takes halves;
            both clamp, and compute gate * sigmoid(glu_alpha * gate) * (up + glu_bias).
        clamp_limit: of modes 1 and 2: gate at most this, the other half within plus and minus.
        glu_alpha: of modes 1 and 2.
        glu_bias: of modes 1 and 2.

    Returns:
        int8 ``[M, H]`` and float32 ``[M]``. Rows behind the last group, and the scales of static
        quantisation, are poison.
    """
    checks.check_attributes(x, quant_mode, swiglu_mode, (clamp_limit, glu_alpha, glu_bias))
    checks.check_side(activate_left, swiglu_mode)
    checks.check_newest_attributes(dst_type, round_mode, activate_dim, swiglu_mode)
    checks.check_group_index(x, group_index)
    num_groups = 1 if group_index is None else len(group_index)
    checks.check_dequantisation(x, weight_scale, activation_scale, bias, num_groups)
    checks.check_quantisation(x, quant_mode, quant_scale, quant_offset, num_groups)

    rows = x.flatten(0, -2)
    group, written = _group_of_rows(len(rows), group_index)
    values = _dequantised(rows, weight_scale, activation_scale, bias, group)
    gate, up = _halves(values, activate_left, interleaved=swiglu_mode == 1)
    if swiglu_mode == 0:
        activated = silu(gate) * up
    else:
        gate, up = gate.clamp(max=clamp_limit), up.clamp(-clamp_limit, clamp_limit)
        activated = gate / (1 + torch.exp(-glu_alpha * gate)) * (up + glu_bias)
    if quant_mode == checks.DYNAMIC:
        smoothed = activated * _of_rows(quant_scale, group, activated.shape[-1])
        integers, scale = by_largest(smoothed, 127, divide=True)
        scale = poison_rows(scale.squeeze(-1), written)
    else:
        integers = _static(activated, quant_scale, quant_offset, group)
        scale = unwritten((len(rows),), torch.float32)
    half = (*x.shape[:-1], x.shape[-1] // 2)
    return poison_rows(integers, written).view(half), scale.view(x.shape[:-1])


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (checks.OPERATOR, npu_dequant_swiglu_quant),
)


def _group_of_rows(num_rows: int, group_index: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """The group of each row, the last for rows that have none, and how many rows have one."""
    if group_index is None:
        return torch.zeros(num_rows, dtype=torch.int64), num_rows
    ends = group_index.cumsum(0)
    group = group_of_each_row(ends, num_rows)
    return group.clamp(max=len(ends) - 1), int(ends[-1])


def _of_rows(parameters: torch.Tensor | None, group: torch.Tensor, columns: int) -> torch.Tensor:
    """Float32 parameters of each row's group, ``[M, columns]``; ones where there are none."""
    if parameters is None:
        return torch.ones(1, 1)
    return parameters.float().reshape(-1, columns)[group]


def _dequantised(
    rows: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: torch.Tensor,
) -> torch.Tensor:
    """Float32 values of the rows ``[M, 2H]``."""
    if rows.dtype is not torch.int32:
        return rows.float()
    columns = rows.shape[-1]
    values = rows.float()
    if bias is not None and bias.dtype is torch.int32:
        # Added before the conversion: both are integers.
        values = (rows + bias.reshape(-1, columns)[group]).float()
    values = values * _of_rows(weight_scale, group, columns)
    if activation_scale is not None:
        values = values * activation_scale.reshape(-1, 1)
    if bias is not None and bias.dtype is not torch.int32:
        values = values + _of_rows(bias, group, columns)
    return values


def _halves(
    values: torch.Tensor, activate_left: bool, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The half that is activated, and the other."""
    if interleaved:
        return values[:, 0::2], values[:, 1::2]
    left, right = values.chunk(2, dim=-1)
    return (left, right) if activate_left else (right, left)


def _static(
    activated: torch.Tensor,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    group: torch.Tensor,
) -> torch.Tensor:
    assert quant_scale is not None and quant_offset is not None
    columns = 1 if quant_scale.ndim == 1 else activated.shape[-1]
    scaled = activated / _of_rows(quant_scale, group, columns)
    return to_integers(scaled + _of_rows(quant_offset, group, columns), -128, 127)
