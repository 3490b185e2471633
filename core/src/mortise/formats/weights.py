"""A projection's weights as each scheme stores them: layout, quantisation, and the way back."""

# ``...`` is nothing or ``E_l`` local experts; N rows, K columns, S parts of N, G groups of columns,
# as in ``mortise.spec.weights.StoredWeight``.

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, assert_never

import torch

from mortise.errors import QuantizationConfigError
from mortise.formats.fp8 import GROUP, dequantise_fp8_block, quantise_fp8_block
from mortise.formats.integer import (
    VALUES_PER_WORD,
    dequantise_int,
    pack_int4,
    quantise_int_weight,
    require_divisible,
    unpack_int4,
)
from mortise.formats.layout import TensorLayout
from mortise.formats.nvfp4 import BLOCK, dequantise_nvfp4, global_scale_of, quantise_nvfp4
from mortise.spec.weights import ScaleFormat, StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

INT4_SCHEMES: Final = frozenset({WeightScheme.W4A8, WeightScheme.W4A4, WeightScheme.W4A16})
"""Schemes whose columns may share scales in groups."""

STATIC_INPUT_SCHEMES: Final = frozenset({WeightScheme.W8A8, WeightScheme.NVFP4})
"""Schemes that may store a static scale of the input."""


def stored_layout(
    scheme: WeightScheme,
    out_features: int,
    in_features: int,
    *,
    num_groups: int = 1,
    num_parts: int = 1,
    static_input: bool = False,
    asymmetric_input: bool = False,
    float_dtype: torch.dtype = torch.bfloat16,
) -> Mapping[str, TensorLayout]:
    """Say which tensors a scheme stores, by their names in ``StoredWeight``, without ``E_l``.

    Args:
        scheme: how the weights are stored.
        out_features: N.
        in_features: K.
        num_groups: G (int4).
        num_parts: S.
        static_input: an ``input_scale`` is stored (W8A8, NVFP4).
        asymmetric_input: an ``input_offset`` is stored beside it (W8A8).
        float_dtype: dtype of unquantised weights.

    Raises:
        QuantizationConfigError: N or K cannot be divided as the scheme needs, or the scheme has no
            such groups or input scale.
    """
    rows, columns = out_features, in_features
    _check_sizes(scheme, rows, columns, num_parts)
    _check_groups(scheme, num_groups > 1)
    _check_input(scheme, static_input, asymmetric_input)
    layout: dict[str, TensorLayout]
    match scheme:
        case WeightScheme.FLOAT:
            layout = {"weight": TensorLayout((rows, columns), float_dtype)}
        case WeightScheme.FP8_BLOCK:
            blocks = (num_parts * _ceil_div(rows // num_parts, GROUP), _ceil_div(columns, GROUP))
            layout = {
                "weight": TensorLayout((rows, columns), torch.float8_e4m3fn),
                "scale": TensorLayout(blocks, torch.float32),
            }
        case WeightScheme.W8A8:
            layout = {
                "weight": TensorLayout((rows, columns), torch.int8),
                "scale": TensorLayout((rows, 1), torch.float32),
            }
        case WeightScheme.W4A8 | WeightScheme.W4A4 | WeightScheme.W4A16:
            require_divisible(columns, num_groups, "groups of columns")
            layout = {
                "weight": TensorLayout((rows, columns // VALUES_PER_WORD), torch.int32),
                "scale": TensorLayout((rows, num_groups), torch.float32),
            }
        case WeightScheme.NVFP4:
            layout = {
                "weight": TensorLayout((rows, columns // 2), torch.uint8),
                "scale": TensorLayout((rows, columns // BLOCK), torch.float8_e4m3fn),
                "global_scale": TensorLayout((num_parts,), torch.float32),
            }
        case _:
            assert_never(scheme)
    if static_input:
        layout["input_scale"] = TensorLayout((num_parts,), torch.float32)
    if asymmetric_input:
        layout["input_offset"] = TensorLayout((num_parts,), torch.float32)
    return MappingProxyType(layout)


def quantise_weight(
    weight: torch.Tensor,
    scheme: WeightScheme,
    *,
    group_size: int | None = None,
    scale_format: ScaleFormat = ScaleFormat.FLOAT32,
    num_parts: int = 1,
    input_scale: torch.Tensor | None = None,
) -> StoredWeight:
    """Store a weight by a scheme; each part of N as if it were a projection of its own.

    Args:
        weight: float32 or bfloat16 ``[..., N, K]``.
        scheme: how to store it; FLOAT keeps the tensor as it is.
        group_size: columns that share a scale (int4); None is all of them.
        scale_format: what the scales of FP8_BLOCK are.
        num_parts: S. Parts have blocks of rows of their own (FP8_BLOCK) and a global scale each,
            made of their own largest magnitude (NVFP4).
        input_scale: float32 ``[..., S]``, handed on to the record (W8A8, NVFP4).

    Raises:
        QuantizationConfigError: N or K cannot be divided as the scheme needs, or the scheme has no
            such groups, scale format or input scale.
    """
    _check_sizes(scheme, weight.shape[-2], weight.shape[-1], num_parts)
    _check_groups(scheme, group_size is not None)
    _check_input(scheme, input_scale is not None, asymmetric=False)
    _check_scale_format(scheme, scale_format)
    scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    match scheme:
        case WeightScheme.FLOAT:
            values = weight
        case WeightScheme.FP8_BLOCK:
            values, scale = _join(quantise_fp8_block(_split(weight, num_parts), scale_format))
        case WeightScheme.W8A8:
            values, scale = quantise_int_weight(weight, 8)
        case WeightScheme.W4A8 | WeightScheme.W4A4 | WeightScheme.W4A16:
            int4, scale = quantise_int_weight(weight, 4, group_size)
            values = pack_int4(int4)
        case WeightScheme.NVFP4:
            parts = _split(weight.float(), num_parts)
            global_scale = global_scale_of(parts.abs().amax(dim=(-2, -1)))
            values, scale = _join(quantise_nvfp4(parts, global_scale[..., None, None]))
        case _:
            assert_never(scheme)
    return StoredWeight(
        scheme=scheme,
        weight=values,
        scale=scale,
        global_scale=global_scale,
        input_scale=input_scale,
        num_parts=num_parts,
        scale_format=scale_format,
    )


def dequantise_weight(stored: StoredWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Give back the weight ``[..., N, K]`` in ``dtype``; products are taken in float32.

    The record must be complete: a checkpoint's tensors were checked when they were loaded.
    """
    match stored.scheme:
        case WeightScheme.FLOAT:
            return stored.weight.to(dtype)
        case WeightScheme.FP8_BLOCK:
            values, scale = _parts(stored)
            return dequantise_fp8_block(values, scale, dtype).flatten(-3, -2)
        case WeightScheme.W8A8:
            return dequantise_int(stored.weight, _scale(stored), dtype)
        case WeightScheme.W4A8 | WeightScheme.W4A4 | WeightScheme.W4A16:
            return dequantise_int(unpack_int4(stored.weight), _scale(stored), dtype)
        case WeightScheme.NVFP4:
            assert stored.global_scale is not None
            values, scale = _parts(stored)
            global_scale = stored.global_scale[..., None, None]
            return dequantise_nvfp4(values, scale, global_scale, dtype).flatten(-3, -2)
        case _:
            assert_never(stored.scheme)


def _scale(stored: StoredWeight) -> torch.Tensor:
    assert stored.scale is not None, "a quantised weight has scales"
    return stored.scale


def _parts(stored: StoredWeight) -> tuple[torch.Tensor, torch.Tensor]:
    return _split(stored.weight, stored.num_parts), _split(_scale(stored), stored.num_parts)


def _split(tensor: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Give the parts of the rows a dimension of their own: ``[..., S, N/S, K]``."""
    parts: torch.Tensor = tensor.unflatten(-2, (num_parts, tensor.shape[-2] // num_parts))
    return parts


def _join(parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = parts
    return values.flatten(-3, -2), scale.flatten(-3, -2)


def _check_sizes(scheme: WeightScheme, rows: int, columns: int, num_parts: int) -> None:
    require_divisible(rows, num_parts, "equal parts of rows")
    if scheme in INT4_SCHEMES:
        require_divisible(columns, VALUES_PER_WORD, "int32 words of eight int4 values")
    if scheme is WeightScheme.NVFP4:
        require_divisible(columns, BLOCK, "blocks of columns")


def _check_groups(scheme: WeightScheme, grouped: bool) -> None:
    if grouped and scheme not in INT4_SCHEMES:
        raise QuantizationConfigError(
            f"weights of scheme {scheme.value} are to have scales for groups of columns",
            expected=f"groups only in {_names(INT4_SCHEMES)}",
        )


def _check_input(scheme: WeightScheme, static: bool, asymmetric: bool) -> None:
    if static and scheme not in STATIC_INPUT_SCHEMES:
        raise QuantizationConfigError(
            f"weights of scheme {scheme.value} are to have a static scale of their input",
            expected=f"one only beside {_names(STATIC_INPUT_SCHEMES)}",
        )
    if asymmetric and not (static and scheme is WeightScheme.W8A8):
        raise QuantizationConfigError(
            f"weights of scheme {scheme.value} are to have an offset of their input",
            expected="one only beside the static input scale of w8a8",
        )


def _check_scale_format(scheme: WeightScheme, scale_format: ScaleFormat) -> None:
    powers_of_two = scale_format is ScaleFormat.UE8M0 and scheme is WeightScheme.FP8_BLOCK
    if scale_format is not ScaleFormat.FLOAT32 and not powers_of_two:
        raise QuantizationConfigError(
            f"weights of scheme {scheme.value} are to have scales of format {scale_format.value}",
            expected="float32, or ue8m0 beside fp8_block; nvfp4 has e4m3 scales unasked",
        )


def _names(schemes: frozenset[WeightScheme]) -> str:
    return ", ".join(sorted(scheme.value for scheme in schemes))


def _ceil_div(size: int, divisor: int) -> int:
    return -(-size // divisor)
