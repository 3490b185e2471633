"""What the grouped products that end in SwiGLU and int8 rows refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.grouped_arguments import (
    check_bias,
    check_columns,
    check_group_size,
    check_row_scale,
    check_words,
    first,
    must_be_given,
    must_be_none,
    num_groups,
)
from mortise_npu_ascend.emulator.grouped_call import weight_shape
from mortise_npu_ascend.emulator.grouped_checks import refuse, refuse_unless
from mortise_npu_ascend.emulator.grouped_modes import GROUPED_FACTS, Mode
from mortise_npu_ascend.emulator.rejections import device_name

if TYPE_CHECKING:
    from mortise_npu_ascend.emulator.grouped_call import GroupedCall

_MOST_COLUMNS: Final = 10240
_INNER_BELOW: Final = 65536
_INNER_BELOW_OF_INT4: Final = 20000
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


def check_fused(
    call: GroupedCall,
    mode: Mode,
    smooth_scale: torch.Tensor | None,
    dequant_mode: int | None,
) -> None:
    """Refuse what the operator does not take; ``dequant_mode`` None is the first version.

    Raises:
        RuntimeError: with the reason.
    """
    _check_mode(call, mode, second=dequant_mode is not None)
    _check_sizes(call, mode)
    if mode is Mode.A8W8:
        _check_int8(call)
    else:
        check_words(call, mode)
        check_columns(call, "scale", groups=True)
        check_group_size(call, "scale", lambda size: size > 0, "K % G == 0")
    check_row_scale(call, mode)
    must_be_given(call, mode, "bias") if mode is Mode.A8W4 else must_be_none(call, mode, "bias")
    check_bias(call, mode, (torch.float32,))
    groups = mode is not Mode.A8W8 and first(call, "scale").ndim == 3
    refuse_unless(
        dequant_mode is None or dequant_mode == int(groups),
        call,
        f"when {mode}, [dequantMode] is not supported, got [{dequant_mode}] with "
        f"{num_groups(call, 'scale')} groups in weightScale.",
    )
    _check_smooth(call, mode, smooth_scale)


def _check_mode(call: GroupedCall, mode: Mode, *, second: bool) -> None:
    quantised = mode in (Mode.A8W8, Mode.A8W4) or (mode is Mode.A4W4 and second)
    newest = not GROUPED_FACTS[current_chip().generation].assist_bias
    if not quantised or (newest and mode is not Mode.A8W8):
        x, weight = (device_name(tensors[0].dtype) for tensors in (call.x, call.weight))
        refuse(
            call,
            f"the data types of [x, weight...] are mismatched, the reason is: [there is no "
            f"matching x dtype {x} and weight dtype {weight} pattern].",
        )
    refuse_unless(
        newest or mode is not Mode.A8W8 or call.is_tiled,
        call,
        "when A8W8, the format of [weight] is not supported, got [ND].",
    )
    refuse_unless(
        not (newest and call.is_tiled),
        call,
        "the format of [weight] is not supported, got [FRACTAL_NZ].",
    )


def _check_sizes(call: GroupedCall, mode: Mode) -> None:
    shape = weight_shape(call.weight[0])
    refuse_unless(
        shape.columns % 2 == 0 and shape.columns <= _MOST_COLUMNS,
        call,
        f"the shape of [weightScale] is not supported, got [N {shape.columns}]. Constraint:[N must "
        f"be even and less than or equal to {_MOST_COLUMNS}].",
    )
    below = _INNER_BELOW if mode is Mode.A8W8 else _INNER_BELOW_OF_INT4
    refuse_unless(
        shape.inner < below,
        call,
        f"the shape of [x] is not supported, got [tail axis dimension {shape.inner}]. "
        f"Constraint:[tail axis dimension must be lower than {below}].",
    )
    refuse_unless(
        not shape.is_transposed or (mode is Mode.A4W4 and call.is_tiled),
        call,
        f"when {mode}, weight cannot be transposed.",
    )


def _check_int8(call: GroupedCall) -> None:
    found = first(call, "scale").dtype
    refuse_unless(
        found in _FLOATS,
        call,
        f"when A8W8, the data type of [weightScale] is not supported, got [{device_name(found)}].",
    )
    check_columns(call, "scale")


def _check_smooth(call: GroupedCall, mode: Mode, smooth_scale: torch.Tensor | None) -> None:
    if smooth_scale is None:
        return
    refuse_unless(mode is Mode.A4W4, call, f"when {mode}, [smoothScale] must be nullptr.")
    columns = weight_shape(call.weight[0]).columns
    refuse_unless(
        smooth_scale.dtype == torch.float32
        and tuple(smooth_scale.shape) in ((call.num_experts,), (call.num_experts, columns // 2)),
        call,
        f"[smoothScale] should be DT_FLOAT of shape (E,) or (E, N / 2), got "
        f"{device_name(smooth_scale.dtype)} {tuple(smooth_scale.shape)}.",
    )
