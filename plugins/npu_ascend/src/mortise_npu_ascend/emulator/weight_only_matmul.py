"""``npu_weight_quant_batchmatmul``: floating-point rows with one quantised weight."""

# M rows, K inner axis, N columns, G groups of K.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.expert_products import dequantised
from mortise_npu_ascend.emulator.fixpipe import WORD_DTYPES, offset_of_words, word_scale
from mortise_npu_ascend.emulator.grouped_call import weight_shape, weight_values
from mortise_npu_ascend.emulator.grouped_checks import LARGEST_AXIS
from mortise_npu_ascend.emulator.grouped_modes import GROUPED_FACTS, WORDS
from mortise_npu_ascend.emulator.rejections import device_name, not_emulated, require
from mortise_npu_ascend.emulator.rounding import to_integers

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATOR: Final = "npu_weight_quant_batchmatmul"
KERNEL: Final = "aclnnWeightQuantBatchMatmulV2"

_SIXTEEN_BITS: Final = (torch.float16, torch.bfloat16)
_GROUP_MULTIPLE: Final = 32


def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    """x @ ((weight + offset) * scale) + bias, the weight in the dtype of the rows, sums in float32.

    Args:
        x: fp16 or bf16 ``[M, K]``.
        weight: int8 ``[K, N]``, or int4 words ``[K, N/8]``, or ``[K/8, N]`` in a transposed view.
        antiquant_scale: like ``x``; ``[1]`` or ``[1, 1]``, ``[N]`` or ``[1, N]``, or
            ``[ceil(K / group size), N]``.
        antiquant_offset: added before; of the shape of the scale.
        quant_scale: float32 or int64 words ``[1]``, ``[N]`` or ``[1, N]``: makes the result int8.
        quant_offset: float32, of the shape of ``quant_scale``.
        bias: float32 with bf16 rows, fp16 with fp16 rows, ``[N]`` or ``[1, N]``.
        antiquant_group_size: rows of the weight that share a scale: a multiple of 32 in 32..K-1,
            or 0 for all of them.
        inner_precise: has no effect here.
        weight_dtype: None.

    Returns:
        ``[M, N]`` in the dtype of the rows, or int8 with ``quant_scale``.

    Raises:
        RuntimeError: the chip does not take the arguments together.
    """
    if weight_dtype is not None:
        not_emulated(OPERATOR, f"weight_dtype {weight_dtype}")
    if antiquant_scale.dtype in WORD_DTYPES:
        not_emulated(OPERATOR, "an antiquant_scale of words")
    _check_operands(x, weight, bias)
    _check_scale(x, weight, antiquant_scale, antiquant_offset, antiquant_group_size)
    inner, columns = weight_shape(weight).inner, weight_shape(weight).columns

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        groups = tensor.reshape(-1, tensor.shape[-1])
        size = antiquant_group_size or inner
        return groups.repeat_interleave(size, dim=0)[:inner].expand(inner, columns)

    offset_KN = None if antiquant_offset is None else whole(antiquant_offset)
    weight_KN = dequantised(weight_values(weight), whole(antiquant_scale), offset_KN, x.dtype)
    result_MN = x.float() @ weight_KN.float()
    if bias is not None:
        result_MN = result_MN + bias.float()
    if quant_scale is None:
        _require(quant_offset is None, "quant_offset cannot exist without quant_scale.")
        return result_MN.to(x.dtype)
    return _requantised(result_MN, quant_scale, quant_offset)


def _requantised(
    result_MN: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None
) -> torch.Tensor:
    """result * scale + offset, rounded ties to even and saturated to int8."""
    is_words = scale.dtype in WORD_DTYPES
    _require(
        is_words or scale.dtype == torch.float32,
        f"quant_scale should be DT_FLOAT or DT_INT64, got {device_name(scale.dtype)}.",
    )
    used = word_scale(scale, truncate=True) if is_words else scale
    shift = offset_of_words(scale) if is_words else torch.zeros(1)
    return to_integers(result_MN * used + (shift if offset is None else offset), -128, 127)


def _check_operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    _require(x.ndim == weight.ndim == 2, "x and weight should have 2 dims.")
    _require(
        x.dtype in _SIXTEEN_BITS and weight.dtype in (torch.int8, WORDS),
        f"x dtype {device_name(x.dtype)} and weight dtype {device_name(weight.dtype)} are not "
        "supported.",
    )
    shape = weight_shape(weight)
    _require(
        x.shape[1] == shape.inner,
        f"the K dim of x {x.shape[1]} and of weight {shape.inner} should be equal.",
    )
    _require(
        x.numel() > 0 and 1 <= shape.inner <= LARGEST_AXIS and 1 <= shape.columns <= LARGEST_AXIS,
        f"K and N should be in [1, {LARGEST_AXIS}] and no tensor empty, got {shape.inner} and "
        f"{shape.columns}.",
    )
    if bias is None:
        return
    allowed = GROUPED_FACTS[current_chip().generation].weight_only_bias[x.dtype]
    _require(
        bias.dtype in allowed and bias.numel() == bias.shape[-1] == shape.columns,
        f"bias should be {' or '.join(sorted(map(device_name, allowed)))} of {shape.columns}, got "
        f"{device_name(bias.dtype)} {tuple(bias.shape)}.",
    )


def _check_scale(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
) -> None:
    shape = weight_shape(weight)
    shapes: list[tuple[int, ...]] = [(1,), (1, 1), (shape.columns,), (1, shape.columns)]
    _require(
        scale.dtype == x.dtype,
        f"antiquant_scale should be {device_name(x.dtype)}, got {device_name(scale.dtype)}.",
    )
    _require(
        offset is None or (offset.dtype == scale.dtype and offset.shape == scale.shape),
        "antiquant_offset should have the dtype and shape of antiquant_scale.",
    )
    if group_size:
        in_range = _GROUP_MULTIPLE <= group_size < shape.inner
        _require(
            in_range and group_size % _GROUP_MULTIPLE == 0,
            f"antiquant_group_size should be a multiple of {_GROUP_MULTIPLE} in "
            f"[{_GROUP_MULTIPLE}, {shape.inner - 1}], got {group_size}.",
        )
        shapes = [(-(-shape.inner // group_size), shape.columns)]
    _require(
        tuple(scale.shape) in shapes,
        f"antiquant_scale should have one of the shapes {shapes}, got {tuple(scale.shape)}.",
    )


def _require(condition: bool, reason: str) -> None:
    require(condition, OPERATOR, reason, kernel=KERNEL)


OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = (
    (OPERATOR, npu_weight_quant_batchmatmul),
)
