"""What the product of quantised rows with one quantised weight refuses, and its table of dtypes."""

# Source: the checks of torch_npu, and the tables of aclnnQuantMatmulV5 (ops-nn).

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise_npu_ascend.emulator.chip import current_chip
from mortise_npu_ascend.emulator.fixpipe import WORD_DTYPES
from mortise_npu_ascend.emulator.generation import Generation
from mortise_npu_ascend.emulator.grouped_call import inner_size, is_transposed, weight_shape
from mortise_npu_ascend.emulator.grouped_checks import LARGEST_AXIS
from mortise_npu_ascend.emulator.grouped_modes import WORDS
from mortise_npu_ascend.emulator.rejections import device_name, require
from mortise_npu_ascend.emulator.storage import Format, storage_format

if TYPE_CHECKING:
    from collections.abc import Mapping

OPERATOR: Final = "npu_quant_matmul"
KERNEL: Final = "aclnnQuantMatmulV5"

_BF16, _FP16, _FP32, _INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
_WORD: Final = torch.int64

# Dtypes of a bias besides int32.
_NO_MORE: Final = frozenset[torch.dtype]()
_BF16_FP32: Final = frozenset({_BF16, _FP32})
_FP16_FP32: Final = frozenset({_FP16, _FP32})

# (dtype of both operands, whether rows have a scale, dtype of the scale, of the result): dtypes of
# the bias. int32 operands are int4 words; a uint64 scale counts as int64.
_Key = tuple[torch.dtype, bool, torch.dtype, torch.dtype]


def _entries(
    *rows: tuple[torch.dtype, bool, tuple[torch.dtype, ...], torch.dtype, frozenset[torch.dtype]],
) -> Mapping[_Key, frozenset[torch.dtype]]:
    return MappingProxyType(
        {
            (operand, by_row, scale, out): bias | {_INT32}
            for operand, by_row, scales, out, bias in rows
            for scale in scales
        }
    )


_INT8_ROWS: Final = (
    (torch.int8, False, (_WORD, _FP32), torch.int8, _NO_MORE),
    (torch.int8, False, (_WORD, _FP32), _FP16, _NO_MORE),
    (torch.int8, False, (_FP32, _BF16), _BF16, _BF16_FP32),
    (torch.int8, False, (_FP32, _BF16), _INT32, _NO_MORE),
    (torch.int8, True, (_FP32, _BF16), _BF16, _BF16_FP32),
    (torch.int8, True, (_FP32,), _FP16, _FP16_FP32),
    (WORDS, False, (_WORD, _FP32), _FP16, _NO_MORE),
)

_OLDER: Final = _entries(
    *_INT8_ROWS,
    (WORDS, True, (_FP32, _BF16), _BF16, _BF16_FP32),
    (WORDS, True, (_FP32,), _FP16, _FP16_FP32),
)

# The newest generation takes int4 with scales of rows only in a dtype that torch lacks.
_BIASES: Final[Mapping[Generation, Mapping[_Key, frozenset[torch.dtype]]]] = MappingProxyType(
    {
        Generation.A2: _OLDER,
        Generation.A3: _OLDER,
        Generation.A5: _entries(*_INT8_ROWS, (torch.int8, False, (_WORD,), _BF16, _NO_MORE)),
    }
)


def check(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Refuse what the chip refuses.

    Raises:
        RuntimeError: with the reason.
    """
    _check_dtypes(x1, x2, scale, pertoken_scale, bias, out_dtype)
    _check_operands(x1, x2)
    columns = weight_shape(x2).columns
    _check_vector("scale", scale, columns)
    if offset is not None:
        _require(
            offset.dtype == _FP32,
            f"offset's type supported for float32, but offset.dtype is {offset.dtype}",
        )
        _require(out_dtype == torch.int8, "offset is supported only where the result is DT_INT8")
        _check_vector("offset", offset, columns)
    if pertoken_scale is not None:
        _check_row_scale(x1, pertoken_scale)
    if bias is not None:
        _check_bias_shape(x1, x2, bias, columns)


def _check_dtypes(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    wanted = _WORD if scale.dtype in WORD_DTYPES else scale.dtype
    key = (x1.dtype, pertoken_scale is not None, wanted, out_dtype)
    biases = _BIASES[current_chip().generation].get(key) if x1.dtype == x2.dtype else None
    found = ", ".join(device_name(t.dtype) for t in (x1, x2, scale))
    _require(
        biases is not None,
        f"the data types of [x1, x2, scale] {found} are not supported with output_dtype "
        f"{device_name(out_dtype)} {'and' if pertoken_scale is not None else 'without'} "
        "pertoken_scale.",
    )
    assert biases is not None
    _require(
        bias is None or bias.dtype in biases,
        f"bias dtype {'' if bias is None else device_name(bias.dtype)} is not supported with "
        f"output_dtype {device_name(out_dtype)}.",
    )


def _check_operands(x1: torch.Tensor, x2: torch.Tensor) -> None:
    is_words = x1.dtype == WORDS
    for name, tensor, dims in (("x1", x1, 6), ("x2", x2, 2 if is_words else 6)):
        _require(
            2 <= tensor.ndim <= dims,
            f"{name} dim num should be 2 ~ {dims}, please check {name} dim num",
        )
        _require(
            tensor.shape[-1] <= LARGEST_AXIS,
            f"the last axis of {name} should be at most {LARGEST_AXIS}, got {tensor.shape[-1]}",
        )
        _require(tensor.numel() > 0, f"{name} must not be empty.")
    shape = weight_shape(x2)
    _require(
        not is_words or (x1.is_contiguous() and (x2.is_contiguous() or shape.is_transposed)),
        "x1 of int4 words must be contiguous, and x2 contiguous or a transposed view.",
    )
    _require(
        inner_size(x1) == shape.inner,
        f"k dim of x1 and x2 need be same, please check k dim of x1 and x2: {inner_size(x1)} and "
        f"{shape.inner}",
    )
    _require(
        storage_format(x2) is Format.ND or 1 not in (shape.inner, shape.columns),
        "Not support mat2 n = 1 or k = 1 when foramt is FRACTAL_NZ",
    )
    _require(not is_transposed(x1) or x1.dtype != WORDS, "x1 cannot be transposed.")


def _check_vector(name: str, tensor: torch.Tensor, columns: int) -> None:
    _require(tensor.ndim == 1, f"the {name} dim num must be 1, please check {name} dim num")
    _require(
        len(tensor) in (1, columns),
        f"the {name} 1st dim value must be 1 or x2 n dim value, got {len(tensor)} for {columns}",
    )


def _check_row_scale(x1: torch.Tensor, pertoken_scale: torch.Tensor) -> None:
    _require(
        pertoken_scale.ndim == 1,
        "the pertoken_scale dim num must be 1, please check scale dim num",
    )
    _require(
        len(pertoken_scale) == x1.shape[-2] and pertoken_scale.dtype == _FP32,
        f"pertoken_scale must be DT_FLOAT of x1's m {x1.shape[-2]}, got "
        f"{device_name(pertoken_scale.dtype)} of {len(pertoken_scale)}",
    )


def _check_bias_shape(x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor, columns: int) -> None:
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    shapes = [(columns,)]
    if x1.dtype != WORDS and len(batch) == 1:
        shapes.append((*batch, 1, columns))
    _require(
        tuple(bias.shape) in shapes,
        f"bias shape should be one of {shapes}, got {tuple(bias.shape)}: bias_first_dim should be "
        "equal to x2 n dim",
    )


def _require(condition: bool, reason: str) -> None:
    require(condition, OPERATOR, reason, kernel=KERNEL)
